"""Step caches as methods of a model: `enable_cache`, `disable_cache`, `cache_context`.

diffusers' hooks bring peft along, so they are imported when a cache is switched on.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.cache_utils import CacheMixin

from elit.caching.ports import Block


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
        _hooks().enable_step_cache(self, config)

    def disable_cache(self) -> None:
        """Switch it off; without one, nothing happens."""
        _hooks().disable_step_cache(self)

    @contextmanager
    def cached(self, config: Any | None) -> Iterator[None]:
        """Have a cache on for a while; None is none."""
        if config is None:
            yield
            return
        self.enable_cache(config)
        try:
            yield
        finally:
            self.disable_cache()

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks as diffusers does; with a cache on, not to full graphs."""
        full = bool(kwargs.get("fullgraph"))
        if full and self.is_cache_enabled:
            raise ValueError(f"a step cache is on; {_hooks().FULL_GRAPH}")
        super().compile_repeated_blocks(*args, **kwargs)
        self._is_full_graph = full

    @property
    def tells_calls_apart(self) -> bool:
        """Whether a step cache, or its calibration, knows the calls of each branch by name."""
        return _hooks().registry_of(self).get_hook(_hooks().CALL_HOOK) is not None

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
        refuse_cache(self, "copy the model")
        return super().__reduce_ex__(protocol)


def refuse_cache(model: Any, what: str) -> None:
    """Raise a ValueError if a step cache is on."""
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(f"a step cache is on; call disable_cache() before you {what}")
