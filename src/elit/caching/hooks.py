"""Hooks that leave blocks out, in diffusers' style: on the model, and on each of its blocks.

model         a call begins: which step of which run                      `CallHook`
first block   skip or not? each cache decides in a way of its own         `LeaderHook`
other blocks  run, or give back what they got                             `BlockHook`
last block    keeps what was added, or adds it                            `BlockHook`

What stands between the blocks runs at skipped steps too, on whatever it is given: the last block
gives the right tokens all the same. Calls with gradients are never skipped.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, MagCacheConfig, ModelHook
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks.mag_cache import nearest_interp
from torch import Tensor, nn

from elit.caching.configs import TeaCacheConfig, check_cache
from elit.caching.ports import Block, BlockPort, argument_names
from elit.caching.state import BranchState, Steps

CALL_HOOK, BLOCK_HOOK = "elit_cache_call", "elit_cache_block"
FULL_GRAPH = "a step cache decides between the blocks; use compile_repeated_blocks(fullgraph=False)"


class CallHook(ModelHook):
    """Counts the steps of a run, around the transformer."""

    _is_stateful = True

    def __init__(self, steps: Steps):
        super().__init__()
        self.steps = steps

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Learn the names of the forward's arguments, among which is the noise level."""
        self.names = argument_names(module)
        return module

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        """Begin a call."""
        del module
        given = dict(zip(self.names, args, strict=False)) | kwargs
        self.steps.begin_call(given.get("timestep"))
        return args, kwargs

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget the run."""
        self.steps.reset()
        return module


# ---- the first block: each cache's own decision ----


def relative_change(new: Tensor, old: Tensor) -> float:
    """mean |new - old| / mean |old|, in float32; infinite where old is all zeros."""
    new, old = new.float(), old.float()
    change = float((new - old).abs().mean() / old.abs().mean())
    return math.inf if math.isnan(change) else change


class LeaderHook(ModelHook):
    """Decides whether the step is skipped, around the first block."""

    def __init__(self, steps: Steps, port: BlockPort, config: Any):
        super().__init__()
        self.steps, self.port, self.config = steps, port, config

    @torch.compiler.disable(reason=FULL_GRAPH)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or give back what it got."""
        del module
        forward = self.fn_ref.original_forward
        if torch.is_grad_enabled():
            self.steps.current = None  # the other blocks follow no cache
            return forward(*args, **kwargs)
        streams = self.port.streams_in(self.port.arguments(args, kwargs))
        state = self.steps.begin_branch(streams)
        state.anchor = streams
        result = self.decide(state, streams[0], lambda: forward(*args, **kwargs))
        if state.skips and result is None:
            return self.port.result(state.moulds.get(0), streams)
        state.moulds[0] = self.port.rest(result)
        return result

    def decide(self, state: BranchState, tokens: Tensor, run: Callable[[], Any]) -> Any:
        """Set `state.skips`; run the block on its tokens and return its result, or return None."""
        raise NotImplementedError


class FirstBlockLeader(LeaderHook):
    """FirstBlockCache: skips while the first block adds what it added at the last computed step."""

    config: FirstBlockCacheConfig

    def decide(self, state: BranchState, tokens: Tensor, run: Callable[[], Any]) -> Any:
        result = run()
        state.anchor = after = self.port.streams_out(result)
        added = after[0] - tokens
        before, threshold = state.before, self.config.threshold
        if before is None or relative_change(added, before) > threshold:
            state.before = added
        else:
            state.skips = state.residual is not None
        return result


class MagLeader(LeaderHook):
    """MagCache: skips while the residual's magnitude has moved little, by calibrated ratios."""

    config: MagCacheConfig

    def decide(self, state: BranchState, tokens: Tensor, run: Callable[[], Any]) -> Any:
        del tokens
        config, step = self.config, self.steps.step
        num_steps = self.steps.num_steps or config.num_inference_steps
        ratios: Any = config.mag_ratios
        if len(ratios) != num_steps:  # a pipeline told of another number of steps
            ratios = nearest_interp(torch.as_tensor(ratios), num_steps)
        if step < int(config.retention_ratio * num_steps + 0.5):
            return run()
        state.ratio *= float(ratios[step]) if step < len(ratios) else 1.0
        state.skipped += 1
        state.total += abs(1.0 - state.ratio)
        is_near = state.total <= config.threshold and state.skipped <= config.max_skip_steps
        state.skips = is_near and state.residual is not None
        if state.skips:
            return None
        state.ratio, state.skipped, state.total = 1.0, 0, 0.0
        return run()


class TeaLeader(LeaderHook):
    """TeaCache: skips until the output is likely to have changed by the threshold.

    It decides while the block runs, as soon as its modulated input is there: of a skipped block
    nothing runs but what makes that.
    """

    config: TeaCacheConfig

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Listen to the named part, or to all that are no norm until one gets the tokens."""
        parts, name = dict(module.named_modules()), self.config.probe
        self.block_name = type(module).__name__
        if name is not None and name not in parts:
            listed = ", ".join(part for part in parts if part and "." not in part)
            raise ValueError(
                f"the first block, a {self.block_name}, has no part {name!r}, which the "
                f"TeaCacheConfig's probe names; it has {listed}"
            )
        heard = [parts[name]] if name else [
            part for part in parts.values()
            if part is not module and "norm" not in type(part).__name__.lower()
        ]  # fmt: skip
        self.handles = {
            part: part.register_forward_pre_hook(self._hear, with_kwargs=True) for part in heard
        }
        self.listening: tuple[BranchState, Tensor] | None = None
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Listen no more."""
        for handle in self.handles.values():
            handle.remove()
        return module

    def decide(self, state: BranchState, tokens: Tensor, run: Callable[[], Any]) -> Any:
        self.listening = state, tokens
        try:
            result = run()
        except _SkipError:
            return None
        finally:
            was_heard, self.listening = self.listening is None, None
        if not was_heard:
            raise ValueError(
                f"TeaCache finds no modulated input in the first block, {self.block_name}: "
                f"none of its parts that ran got tokens of shape {tuple(tokens.shape)}; name the "
                f"part whose input is to be compared: TeaCacheConfig(probe='attn')"
            )
        return result

    def _hear(self, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        value = kwargs.get("hidden_states", args[0] if args else None)
        if self.listening is None or not isinstance(value, Tensor):
            return
        state, tokens = self.listening
        if not self.config.probe and (value is tokens or value.shape != tokens.shape):
            return
        for other in [other for other in self.handles if other is not part]:
            self.handles.pop(other).remove()  # the others need not listen on
        self.listening = None
        state.skips = self.skips(state, value)
        if state.skips:
            raise _SkipError

    def skips(self, state: BranchState, probed: Tensor) -> bool:
        """Whether the step is skipped, of a modulated input (B, N, D)."""
        before, state.before = state.before, probed
        if before is not None:
            state.total += self.config.output_change(relative_change(probed, before))
        goes_on = state.residual is not None and not self.steps.is_last_step
        if goes_on and state.total < self.config.threshold:
            return True
        state.total = 0.0
        return False


class _SkipError(Exception):
    """Leaves a block that need not run on."""


# ---- the other blocks ----


class BlockHook(ModelHook):
    """Runs a block, or hands on what it got, around every block but the first."""

    def __init__(self, steps: Steps, port: BlockPort, index: int, is_last: bool):
        super().__init__()
        self.steps, self.port, self.index, self.is_last = steps, port, index, is_last

    @torch.compiler.disable(recursive=False, reason=FULL_GRAPH)  # blocks share graphs then
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or give back what it got."""
        del module
        state = self.steps.current
        if state is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        if self.is_last:
            self.steps.current = None
            self.steps.skipped += state.skips
            self.steps.computed += not state.skips
        # A block that the computed step left out, as skip_layers do, has no mould; it just runs.
        if state.skips and self.index in state.moulds:
            streams = self.port.streams_in(self.port.arguments(args, kwargs))
            if self.is_last:
                streams = state.skip_to(streams)
            return self.port.result(state.moulds[self.index], streams)
        result = self.fn_ref.original_forward(*args, **kwargs)
        if state.skips:
            return result
        state.moulds[self.index] = self.port.rest(result)
        if self.is_last:
            self.keep(state, result)
        return result

    def keep(self, state: BranchState, result: Any) -> None:
        """Take the residual of a computed step."""
        state.keep(self.port.streams_out(result))


# ---- on and off ----

LEADERS: dict[Any, type[LeaderHook]] = {
    FirstBlockCacheConfig: FirstBlockLeader,
    MagCacheConfig: MagLeader,
    TeaCacheConfig: TeaLeader,
}


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
    parts = blocks_of(transformer, blocks)
    is_compiled = any(block._compiled_call_impl for block, _ in parts)
    if is_compiled and getattr(transformer, "_is_full_graph", False):
        raise ValueError(f"the blocks were compiled to full graphs; {FULL_GRAPH}")
    check_cache(transformer, config)
    kind = next(leader for known, leader in LEADERS.items() if isinstance(config, known))
    steps = Steps(getattr(config, "num_inference_steps", None))
    put_hooks(transformer, parts, steps, lambda port: kind(steps, port, config))
    transformer._cache_config = config  # what diffusers' models look at


def disable_step_cache(transformer: nn.Module) -> None:
    """Switch off what `enable_step_cache` switched on; without one, nothing happens."""
    remove_hooks(transformer)
    transformer._cache_config = None  # type: ignore[assignment]


def blocks_of(transformer: nn.Module, blocks: Sequence[nn.Module] | None = None) -> list[Block]:
    """The blocks of any transformer: those given, those it names, or those in diffusers' lists."""
    if blocks is None and (named := getattr(transformer, "cache_blocks", None)):
        return named()
    if blocks is None:
        blocks = [
            block
            for name, child in transformer.named_children()
            if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, nn.ModuleList)
            for block in child
        ]
        if not blocks:
            raise ValueError(
                f"{type(transformer).__name__} has none of the lists of blocks that a cache looks "
                f"for: {', '.join(sorted(_ALL_TRANSFORMER_BLOCK_IDENTIFIERS))}; give blocks=[...]"
            )
    return [(block, BlockPort.of(block)) for block in blocks]


def put_hooks(
    model: nn.Module,
    blocks: Sequence[Block],
    steps: Steps,
    leader: Callable[[BlockPort], LeaderHook],
    last: type[BlockHook] = BlockHook,
) -> None:
    """Register a hook on the model and one on each block, or raise a ValueError."""
    if len(blocks) < 2:
        raise ValueError(
            f"this {type(model).__name__} has {len(blocks)} block; a step cache needs two, one "
            f"where tokens come in and one where they come out"
        )
    registry = registry_of(model)
    if getattr(model, "is_cache_enabled", False) or registry.get_hook(CALL_HOOK):
        raise ValueError("a step cache is on already; call disable_cache() first")
    first, end = blocks[0], len(blocks) - 1
    registry_of(first[0]).register_hook(leader(first[1]), BLOCK_HOOK)  # may not fit: it comes first
    for index, (block, port) in enumerate(blocks[1:], 1):
        kind = last if index == end else BlockHook
        registry_of(block).register_hook(kind(steps, port, index, index == end), BLOCK_HOOK)
    registry.register_hook(CallHook(steps), CALL_HOOK)
    registry.invalidate_child_registries_cache()


def remove_hooks(model: nn.Module, model_hook: str = CALL_HOOK, hook: str = BLOCK_HOOK) -> None:
    """Take hooks of these names away, from the model and from all that is in it."""
    registry = registry_of(model)
    registry.remove_hook(model_hook, recurse=False)
    registry.remove_hook(hook, recurse=True)
    registry.invalidate_child_registries_cache()


def registry_of(module: nn.Module) -> HookRegistry:
    """diffusers' register of a module's hooks."""
    return HookRegistry.check_if_exists_or_initialize(module)
