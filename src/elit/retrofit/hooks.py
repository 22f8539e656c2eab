"""The hooks that put Read before a transformer's core and Write after it.

transformer   a call begins: its grid, its number of latents            `ModelHook`
first block   Read: tokens -> latents                                   `CoreHook`
core blocks   rotary embeddings and what else follows the tokens        `CoreHook`
last block    Write: latents -> tokens                                  `CoreHook`

They are diffusers' hooks, registered before any cache's: a cache then sees spatial tokens only,
and is right at any budget.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from elit.caching.ports import BlockPort
from elit.interface.budget import check_num_latents
from elit.interface.grid import TokenGrid, format_size
from elit.retrofit.adapters import install_adapters
from elit.retrofit.branches import join_batch, split_batch
from elit.retrofit.layout import BlockSignature
from elit.retrofit.places import latent_places
from elit.retrofit.session import Call, Session

_SKIPPED = (
    "the {} block of the core did not run ({}): other code skips it; have it skip other blocks, or "
    "switch it on before elasticize"
)
MODEL_HOOK, CORE_HOOK = "elit_model", "elit_core"


class ElasticModelHook(ModelHook):
    """Around the transformer: takes `num_latents`, finds the grid, begins a call."""

    def __init__(self, session: Session):
        super().__init__()
        self.session = session

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Remember the names of the forward's arguments."""
        self.parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        return module

    def new_forward(
        self, module: Any, *args: Any, num_latents: int | None = None, **kwargs: Any
    ) -> Any:
        """The transformer's forward, with one argument more."""
        arguments = dict(zip(self.parameters, args, strict=False)) | kwargs
        is_odd = len(arguments) != len(args) + len(kwargs) or self.parameters[0] not in arguments
        if is_odd:  # too many, twice, or none: the forward itself says so
            return self.fn_ref.original_forward(*args, **kwargs)
        branches = self.session.branches
        if num_latents is not None or not branches.are_batched:
            kept = branches.num_latents() if num_latents is None else num_latents
            return self._run(module, arguments, kept)
        outputs = []
        parts = split_batch(arguments, self.parameters[0])
        for part, is_guide in zip(parts, branches.halves, strict=True):
            # A name of its own gives each branch a step cache of its own.
            with module.cache_context("uncond" if is_guide else "cond"):
                outputs.append(self._run(module, part, branches.num_latents()))
        return join_batch(outputs)

    def _run(self, module: Any, arguments: Mapping[str, Any], num_latents: int) -> Any:
        call = self._begin(module, arguments, num_latents)
        try:
            with self.session.running(call), self._checkpointing(module, call):
                return self.fn_ref.original_forward(**arguments)
        finally:  # whatever the latents led to behind the core
            if call.groups is not None and not (call.is_written or call.in_core):
                raise ValueError(_SKIPPED.format("last", "Read without Write"))

    def _begin(self, module: Any, arguments: Mapping[str, Any], num_latents: int) -> Call:
        """A call with these arguments, or a ValueError if the interface doesn't fit them."""
        session, group = self.session, self.session.settings.group
        self._check(arguments)
        hidden_states = arguments[self.parameters[0]]
        if not isinstance(hidden_states, Tensor):
            raise ValueError(f"{self.parameters[0]} {hidden_states!r:.60} is no tensor")
        size = session.layout.size(module, arguments, hidden_states)
        if len(size) != len(group):
            raise ValueError(
                f"the tokens lie on {format_size(size)}, but the model was elasticized with "
                f"groups of {format_size(group)}; give a group of {len(size)} numbers"
            )
        grid = TokenGrid(size, group)
        most = grid.tokens_per_group
        check_num_latents(num_latents, most)
        central = not session.interface.is_lossless
        places = latent_places(grid, num_latents, hidden_states.device, central)
        leaves_out = num_latents == most and not central and not session.is_compiled
        condition = None if leaves_out else self._condition(arguments, hidden_states)
        return Call(grid, places, condition, torch.is_grad_enabled(), leaves_out)

    def _condition(self, arguments: Mapping[str, Any], hidden_states: Tensor) -> Tensor:
        timestep = arguments.get("timestep")
        if timestep is None:
            timestep = hidden_states.new_zeros(1)
        timestep = torch.as_tensor(timestep, device=hidden_states.device)
        level = timestep.float() / self.session.layout.time_scale
        return self.session.interface.condition(level, len(hidden_states))

    def _check(self, arguments: Mapping[str, Any]) -> None:
        for name in self.session.layout.not_elastic:
            if arguments.get(name) is not None:
                raise ValueError(
                    f"{name} act on the tokens of every block, but the core of an elastic model "
                    f"has latents; leave them out, or use the model from before elasticize"
                )
        skipped, edges = arguments.get("skip_layers") or (), self.session.settings.edges
        if any(block in edges for block in skipped):
            raise ValueError(
                f"skip_layers={list(skipped)} would leave out Read or Write, which belong to the "
                f"blocks {edges[0]} and {edges[1]}; skip others"
            )

    @contextmanager
    def _checkpointing(self, module: Any, call: Call) -> Iterator[None]:
        """Have blocks that are computed again in the backward pass find their own call."""
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is None:
            yield
            return

        def with_call(block: Any, *args: Any, **kwargs: Any) -> Any:
            def again(*args: Any, **kwargs: Any) -> Any:
                with self.session.running(call):
                    return block(*args, **kwargs)

            return checkpoint(again, *args, **kwargs)

        module._gradient_checkpointing_func = with_call
        self.session.reruns_blocks = True
        try:
            yield
        finally:
            module._gradient_checkpointing_func = checkpoint
            self.session.reruns_blocks = False


class CoreHook(ModelHook):
    """Around a block of the core: Read before the first, Write after the last."""

    def __init__(self, session: Session, is_first: bool, is_last: bool):
        super().__init__()
        self.session, self.is_first, self.is_last = session, is_first, is_last
        self.compiled: Callable[..., Any] | None = None  # the block without Read and Write

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the block alone, as `torch.compile` does."""
        self.compiled = torch.compile(self.fn_ref.original_forward, *args, **kwargs)
        self.session.compiles_core = True

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Find where the tokens go in and out."""
        layout = self.session.layout
        self.signature = BlockSignature.of(module, layout)
        self.port = BlockPort.of(module, layout.hidden_states, layout.output)
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, on latents."""
        del module
        signature = self.signature
        arguments = signature.bind(args, kwargs)
        hidden_states = arguments[signature.hidden_states]
        call = self._call(hidden_states)
        if self.is_first:
            hidden_states = self._owned(self._read(call, arguments, hidden_states))
        arguments |= {signature.hidden_states: hidden_states, **call.selected}
        forward = self.compiled or self.fn_ref.original_forward
        call.in_core = True
        if torch.compiler.is_compiling():
            result = forward(**arguments)
        else:
            with self.session.running(call):  # adapters look there
                result = forward(**arguments)
        if self.session.leaves_out_core:
            result = self.port.result(self.port.rest(result), self.port.streams_in((), arguments))
        call.in_core = False
        latents = signature.tokens_of(result)
        if self.is_last:
            result = signature.with_tokens(result, self._write(call, latents))
            return tree_map(self._owned, result)
        self.session.remember(latents, call)
        return result

    def _owned(self, value: Any) -> Any:
        """A copy of a view, before a compiled block: of views it makes graphs of their own."""
        is_view = self.compiled is not None and isinstance(value, Tensor) and value._is_view()
        return value.clone() if is_view else value

    def _call(self, hidden_states: Tensor) -> Call:
        """The call that the block runs in."""
        call = self.session.recall(hidden_states)
        if call is None:
            raise RuntimeError(
                "a block of the core of an elastic model was called by itself; call the model"
            )
        if call.with_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "a block of the core runs without gradients inside a call with gradients, as "
                "reentrant checkpointing does: Write would get none; use use_reentrant=False"
            )
        return call

    def _read(self, call: Call, arguments: Mapping[str, Any], hidden_states: Tensor) -> Tensor:
        session, index, count = self.session, call.places.index, call.grid.num_tokens
        text, tokens = _split(hidden_states, count, session.layout.with_text)
        if tokens.shape[-1] != session.interface.dim:
            raise ValueError(
                f"the tokens have width {tokens.shape[-1]}, but the interface was made for "
                f"{session.interface.dim}; give layout=Layout(hidden_size={tokens.shape[-1]})"
            )
        session.remember(hidden_states, call)
        for name, per_token in session.layout.per_token.items():
            if name in arguments:
                call.selected[name] = per_token.select(arguments[name], index, count)
        call.groups = call.grid.to_groups(tokens)
        call.latents = session.interface.into_latents(
            call.groups, call.condition, call.grid, call.places
        )
        return _join(text, call.latents)

    def _write(self, call: Call, hidden_states: Tensor) -> Tensor:
        if call.groups is None or call.latents is None:
            raise ValueError(_SKIPPED.format("first", "Write without Read"))
        text, latents = _split(hidden_states, len(call.places.index), self.session.layout.with_text)
        groups = self.session.interface.into_tokens(
            call.groups, call.latents, latents, call.condition, call.grid, call.places
        )
        tokens = call.grid.from_groups(groups)
        call.is_written = True
        if self.session.keeps_written:
            self.session.written = tokens
        return _join(text, tokens)


class EdgeHook(ModelHook):
    """Around a block of head or tail that has adapters: they look for the running call."""

    def __init__(self, session: Session):
        super().__init__()
        self.session = session

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Find where the tokens go in."""
        self.signature = BlockSignature.of(module, self.session.layout)
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, also when a checkpoint computes it again."""
        del module
        session, forward = self.session, self.fn_ref.original_forward
        hidden_states = self.signature.bind(args, kwargs)[self.signature.hidden_states]
        call = session.recall(hidden_states)
        if call is None or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        session.remember(hidden_states, call)
        with session.running(call):
            return forward(*args, **kwargs)


def _split(hidden_states: Tensor, count: int, with_text: bool) -> tuple[Tensor | None, Tensor]:
    """A text's tokens, if there are any, and the `count` others after them."""
    before = hidden_states.shape[1] - count
    if before == 0:
        return None, hidden_states
    if before < 0 or not with_text:
        raise ValueError(
            f"the core got {hidden_states.shape[1]} tokens, but the grid has {count}; "
            f"give a layout whose grid is that of the tokens"
        )
    return hidden_states[:, :before], hidden_states[:, before:]


def _join(text: Tensor | None, tokens: Tensor) -> Tensor:
    return tokens if text is None else torch.cat((text, tokens), dim=1)


def install_hooks(model: nn.Module, session: Session) -> None:
    """Put the interface around the core's blocks, and the adapters into all blocks."""
    blocks = session.layout.find_blocks(model)
    if session.interface.adapters is not None:
        session.handles = install_adapters(blocks, session.interface.adapters, session)
    _registry(model).register_hook(ElasticModelHook(session), MODEL_HOOK)
    first, last = session.settings.edges
    core = session.core = blocks[first : last + 1]
    for block in core:
        hook = CoreHook(session, is_first=block is core[0], is_last=block is core[-1])
        _registry(block).register_hook(hook, CORE_HOOK)
    if session.interface.adapters is not None:
        for block in (*blocks[:first], *blocks[last + 1 :]):
            _registry(block).register_hook(EdgeHook(session), CORE_HOOK)
    _registry(model).invalidate_child_registries_cache()


def core_hook(block: nn.Module) -> CoreHook:
    """The hook of a block of the core."""
    return _registry(block).hooks[CORE_HOOK]


def remove_hooks(model: nn.Module, session: Session) -> None:
    """Take the interface away again."""
    for handle in session.handles:
        handle.remove()
    session.handles = []
    registry = _registry(model)
    registry.remove_hook(MODEL_HOOK, recurse=False)
    registry.remove_hook(CORE_HOOK, recurse=True)
    registry.invalidate_child_registries_cache()


def _registry(module: nn.Module) -> HookRegistry:
    return HookRegistry.check_if_exists_or_initialize(module)
