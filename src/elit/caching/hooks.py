"""The hooks that leave blocks out, in diffusers' style: on the model, and on each of its blocks.

model         a call begins: which step of which run                      `CallHook`
first block   skip or not?  FirstBlockCache: after it has run, because    `LeaderHook`
              what it adds is compared; MagCache: before; TeaCache: while
              it runs, as soon as its modulated input is there
other blocks  run, or give back what they got                             `BlockHook`
last block    keeps what was added, or adds it                            `BlockHook`

What stands between the blocks runs at skipped steps too, on whatever it is given: the last block
gives the right tokens all the same. Calls with gradients are never skipped.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, MagCacheConfig, ModelHook
from torch import Tensor, nn

from elit.caching.configs import TeaCacheConfig
from elit.caching.policies import first_block_skips, mag_skips, tea_skips
from elit.caching.ports import Block, BlockPort
from elit.caching.state import BranchState, Steps

CALL_HOOK, BLOCK_HOOK = "elit_cache_call", "elit_cache_block"
FULL_GRAPH = "a step cache decides between the blocks; use compile_repeated_blocks(fullgraph=False)"


class CallHook(ModelHook):
    """Around the transformer: counts the steps of a run."""

    _is_stateful = True

    def __init__(self, steps: Steps):
        super().__init__()
        self.steps = steps

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Find the noise level among the forward's arguments."""
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.place = names.index("timestep") if "timestep" in names else None
        return module

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        """Begin a call."""
        del module
        timestep = kwargs.get("timestep")
        if timestep is None and self.place is not None and self.place < len(args):
            timestep = args[self.place]
        self.steps.begin_call(timestep)
        return args, kwargs

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget the run."""
        self.steps.reset()
        return module


class LeaderHook(ModelHook):
    """Around the first block: decides whether the step is skipped. The decision is a subclass's."""

    def __init__(self, steps: Steps, port: BlockPort, config: Any):
        super().__init__()
        self.steps, self.port, self.config = steps, port, config

    @torch.compiler.disable(reason=FULL_GRAPH)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, or nothing."""
        if torch.is_grad_enabled():
            self.steps.current = None  # the other blocks follow no cache
            return self.fn_ref.original_forward(*args, **kwargs)
        streams = self.port.streams_in(args, kwargs)
        state = self.steps.begin_branch(streams)
        state.anchor = streams
        result = self.run(state, module, *args, **kwargs)
        if state.skips and result is None:
            return self.port.result(state.moulds.get(0), streams)
        state.moulds[0] = self.port.rest(result)
        return result

    def run(self, state: BranchState, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Decide, and run the block or return None."""
        raise NotImplementedError


class FirstBlockLeader(LeaderHook):
    """FirstBlockCache: the first block always runs, and what it adds decides."""

    config: FirstBlockCacheConfig

    def run(self, state: BranchState, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        del module
        result = self.fn_ref.original_forward(*args, **kwargs)
        before = self.port.streams_in(args, kwargs)
        state.anchor = after = self.port.streams_out(result)
        state.skips = first_block_skips(self.config, state, after[0] - before[0])
        return result


class MagLeader(LeaderHook):
    """MagCache: the number of the step decides."""

    config: MagCacheConfig

    def run(self, state: BranchState, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        del module
        state.skips = mag_skips(self.config, state, self.steps)
        return None if state.skips else self.fn_ref.original_forward(*args, **kwargs)


class TeaLeader(LeaderHook):
    """TeaCache: the modulated input decides. Of a skipped block nothing runs but what makes it."""

    config: TeaCacheConfig

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Listen to the block's parts."""
        self.probe = Probe(module, self.config.probe)
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Listen no more."""
        self.probe.remove()
        return module

    def run(self, state: BranchState, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def decide(probed: Tensor) -> None:
            state.skips = self.skips(state, probed)
            if state.skips:
                raise _SkipError

        tokens = self.port.streams_in(args, kwargs)[0]
        try:
            with self.probe.listening(tokens, decide):
                result = self.fn_ref.original_forward(*args, **kwargs)
        except _SkipError:
            return None
        if not self.probe.was_heard:
            raise ValueError(
                f"TeaCache finds no modulated input in the first block, {type(module).__name__}: "
                f"none of its parts that ran got tokens of shape {tuple(tokens.shape)}; name the "
                f"part whose input is to be compared: TeaCacheConfig(probe='attn')"
            )
        return result

    def skips(self, state: BranchState, probed: Tensor) -> bool:
        """Whether the step is skipped, where the modulated input is this one."""
        return tea_skips(self.config, state, self.steps, probed)


class _SkipError(Exception):
    """Leaves a block that need not run on."""


class Probe:
    """Hears the modulated input of a block: what its first part gets that is no norm.

    Args:
        block: to listen to.
        name: of the part; None finds it at the first call.
    """

    def __init__(self, block: nn.Module, name: str | None):
        parts = dict(block.named_modules())
        if name is not None and name not in parts:
            listed = ", ".join(part for part in parts if part and "." not in part)
            raise ValueError(
                f"the first block, a {type(block).__name__}, has no part {name!r}, which the "
                f"TeaCacheConfig's probe names; it has {listed}"
            )
        self.is_named = name is not None
        heard = [parts[name]] if name else [
            part for part in parts.values()
            if part is not block and "norm" not in type(part).__name__.lower()
        ]  # fmt: skip
        self.handles = {
            part: part.register_forward_pre_hook(self._hear, with_kwargs=True) for part in heard
        }
        self._stop()

    def _stop(self) -> None:
        self.tokens: Tensor | None = None
        self.tell: Callable[[Tensor], None] | None = None

    @contextmanager
    def listening(self, tokens: Tensor, tell: Callable[[Tensor], None]) -> Iterator[None]:
        """Tell of the modulated input, once, while a block runs on these tokens."""
        self.tokens, self.tell, self.was_heard = tokens, tell, False
        try:
            yield
        finally:
            self._stop()

    def _hear(self, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.tell is None or self.tokens is None:
            return
        value = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(value, Tensor):
            return
        if not self.is_named and (value is self.tokens or value.shape != self.tokens.shape):
            return
        if len(self.handles) > 1:  # it is found: the others need not listen on
            for other in [other for other in self.handles if other is not part]:
                self.handles.pop(other).remove()
        tell, self.was_heard = self.tell, True
        self._stop()
        tell(value)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles.values():
            handle.remove()


class BlockHook(ModelHook):
    """Around every block but the first: runs it, or hands on what it got."""

    def __init__(self, steps: Steps, port: BlockPort, index: int, is_last: bool):
        super().__init__()
        self.steps, self.port, self.index, self.is_last = steps, port, index, is_last

    @torch.compiler.disable(recursive=False, reason=FULL_GRAPH)  # blocks share graphs then
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, or nothing."""
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
            streams = self.port.streams_in(args, kwargs)
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


LEADERS: dict[type, type[LeaderHook]] = {
    FirstBlockCacheConfig: FirstBlockLeader,
    MagCacheConfig: MagLeader,
    TeaCacheConfig: TeaLeader,
}


def check_can_cache(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Raise a ValueError if no cache can be put on now."""
    if len(blocks) < 2:
        raise ValueError(
            f"this {type(model).__name__} has {len(blocks)} block; a step cache needs two, one "
            f"where tokens come in and one where they come out"
        )
    if getattr(model, "is_cache_enabled", False) or _registry(model).get_hook(CALL_HOOK):
        raise ValueError("a step cache is on already; call disable_cache() first")


def install_cache(model: nn.Module, blocks: Sequence[Block], config: Any) -> None:
    """Put a cache around the blocks of a model, in the order in which tokens pass them."""
    check_can_cache(model, blocks)
    steps = Steps(getattr(config, "num_inference_steps", None))
    kind = next(leader for known, leader in LEADERS.items() if isinstance(config, known))
    leader = kind(steps, blocks[0][1], config)
    hooks: list[ModelHook] = [
        BlockHook(steps, port, index, is_last=index == len(blocks) - 1)
        for index, (_, port) in enumerate(blocks)
    ]
    put_hooks(model, [block for block, _ in blocks], CallHook(steps), [leader, *hooks[1:]])


def put_hooks(
    model: nn.Module, blocks: Sequence[nn.Module], call: ModelHook, hooks: Sequence[ModelHook]
) -> None:
    """Register a hook on the model and one on each block."""
    _registry(blocks[0]).register_hook(hooks[0], BLOCK_HOOK)  # the one that may not fit comes first
    for block, hook in zip(blocks[1:], hooks[1:], strict=True):
        _registry(block).register_hook(hook, BLOCK_HOOK)
    _registry(model).register_hook(call, CALL_HOOK)
    _registry(model).invalidate_child_registries_cache()


def remove_cache(model: nn.Module) -> None:
    """Take the hooks away again."""
    registry = _registry(model)
    registry.remove_hook(CALL_HOOK, recurse=False)
    registry.remove_hook(BLOCK_HOOK, recurse=True)
    registry.invalidate_child_registries_cache()


def reset_cache(model: nn.Module) -> None:
    """Forget what was kept: the next call begins a run."""
    _registry(model).reset_stateful_hooks()


def cache_counts(model: nn.Module) -> tuple[int, int]:
    """How often the blocks were computed, and how often skipped, since the cache is on."""
    hook = _registry(model).get_hook(CALL_HOOK)
    return (0, 0) if hook is None else (hook.steps.computed, hook.steps.skipped)


def _registry(module: nn.Module) -> HookRegistry:
    return HookRegistry.check_if_exists_or_initialize(module)
