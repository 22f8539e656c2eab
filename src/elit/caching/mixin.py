"""Step caches as methods of a model: `enable_cache`, `disable_cache`, `cache_context`.

diffusers' hooks bring peft along, so they are imported when a cache is switched on.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from diffusers.models.cache_utils import CacheMixin
from torch import nn

from elit.caching.ports import Block, BlockPort


def _hooks() -> Any:
    return importlib.import_module("elit.caching.hooks")


class StepCaching(CacheMixin):
    """A model whose caches are ours: right at any budget, and where it changes between steps.

    `cache_context(name)` names the calls of a branch of guidance; each has a state of its own.
    Calls without a name have one too.
    """

    _is_full_graph = False  # what the blocks were compiled to last

    def cache_blocks(self) -> list[Block]:
        """Blocks that a cache may leave out, in the order in which tokens pass them."""
        raise NotImplementedError

    def enable_cache(self, config: Any) -> None:
        """Switch on a FirstBlockCacheConfig or MagCacheConfig of diffusers, or a TeaCacheConfig.

        A ValueError says of another cache what keeps it from working.
        """
        blocks = self.cache_blocks()
        if self._is_full_graph and any(block._compiled_call_impl for block, _ in blocks):
            raise ValueError(f"the blocks were compiled to full graphs; {_hooks().FULL_GRAPH}")
        _hooks().install_cache(self, blocks, config)
        self._cache_config = config

    def disable_cache(self) -> None:
        """Switch it off; without one, nothing happens."""
        if self.is_cache_enabled:
            _hooks().remove_hooks(self)
            self._cache_config = None

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks as diffusers does; with a cache on, not to full graphs."""
        full = bool(kwargs.get("fullgraph"))
        if full and self.is_cache_enabled:
            raise ValueError(f"a step cache is on; {_hooks().FULL_GRAPH}")
        super().compile_repeated_blocks(*args, **kwargs)
        self._is_full_graph = full

    def cache_counts(self) -> tuple[int, int]:
        """Calls in which the blocks were computed, and skipped, since the cache is on."""
        hook = _hooks().registry_of(self).get_hook(_hooks().CALL_HOOK)
        return (0, 0) if hook is None else (hook.steps.computed, hook.steps.skipped)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Begin a new run; pipelines call it."""
        del recurse
        _hooks().registry_of(self).reset_stateful_hooks()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse a copy with a cache on: its hooks would go on running this model's blocks."""
        if self.is_cache_enabled:
            raise ValueError("a step cache is on; call disable_cache() before you copy the model")
        return super().__reduce_ex__(protocol)


def blocks_of(transformer: nn.Module, blocks: Sequence[nn.Module] | None = None) -> list[Block]:
    """The blocks of any transformer: those given, those it names, or those in diffusers' lists."""
    if blocks is None and isinstance(transformer, StepCaching):
        return transformer.cache_blocks()
    if blocks is None:
        from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS

        lists = [
            child
            for name, child in transformer.named_children()
            if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, nn.ModuleList)
        ]
        if not lists:
            raise ValueError(
                f"{type(transformer).__name__} has none of the lists of blocks that a cache looks "
                f"for: {', '.join(sorted(_ALL_TRANSFORMER_BLOCK_IDENTIFIERS))}; give blocks=[...]"
            )
        blocks = [block for some in lists for block in some]
    return [(block, BlockPort.of(block)) for block in blocks]


def enable_step_cache(
    transformer: nn.Module, config: Any, blocks: Sequence[nn.Module] | None = None
) -> None:
    """Switch a step cache on, for a transformer of diffusers', or a module of your own.

    diffusers' pipelines name the branches of guidance and begin runs as with caches of its own.

    Args:
        transformer: any.
        config: a FirstBlockCacheConfig, MagCacheConfig or TeaCacheConfig.
        blocks: in order; by default those in diffusers' usual lists.
    """
    if isinstance(transformer, StepCaching) and blocks is None:
        transformer.enable_cache(config)
        return
    _hooks().install_cache(transformer, blocks_of(transformer, blocks), config)
    transformer._cache_config = config  # what diffusers' models look at


def disable_step_cache(transformer: nn.Module) -> None:
    """Switch off what `enable_step_cache` switched on."""
    if isinstance(transformer, StepCaching):
        transformer.disable_cache()
    else:
        _hooks().remove_hooks(transformer)
        transformer._cache_config = None  # type: ignore[assignment]
