"""Hooks that put Read before a transformer's core and Write after it.

transformer   a call begins: its grid, its number of latents            `Session`
first block   Read: tokens -> latents                                   `CoreHook`
core blocks   rotary embeddings and what else follows the tokens        `CoreHook`
last block    Write: latents -> tokens                                  `CoreHook`
others        their adapters, if there are any, find the call           `EdgeHook`

They are diffusers' hooks, registered before any cache's: a cache then sees spatial tokens only,
and is right at any budget.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from elit._locks import alone_with
from elit.caching.hooks import registry_of
from elit.caching.hooks import remove_hooks as remove_named_hooks
from elit.caching.ports import argument_names
from elit.interface.budget import check_num_latents
from elit.interface.fit import format_size
from elit.interface.grid import TokenGrid
from elit.interface.raster import from_groups, to_groups
from elit.retrofit.adapters import install_adapters
from elit.retrofit.branches import Branches, join_batch, split_batch
from elit.retrofit.interface import LatentInterface
from elit.retrofit.layout import Layout
from elit.retrofit.places import LatentPlaces, latent_places
from elit.retrofit.settings import Settings

MODEL_HOOK, BLOCK_HOOK = "elit_model", "elit_core"


@dataclass
class Call:
    """One call of the transformer: what Read leaves for the core and for Write."""

    grid: TokenGrid  # of the tokens
    places: LatentPlaces  # of the latents
    condition: Tensor | None  # (B, D) for Read and Write; None where they are not told
    leaves_out: bool  # what counts nothing, because the budget is full
    with_grad: bool = field(default_factory=torch.is_grad_enabled)  # when it began
    groups: Tensor | None = None  # (B, G, P, D), the tokens that entered Read
    latents: Tensor | None = None  # (B, G * n, D), as they left Read
    in_core: bool = False  # a block of the core runs, or has failed
    is_written: bool = False  # Write came after it
    selected: dict[str, Any] = field(default_factory=dict)  # per-token arguments, of the latents


class Session(ModelHook):
    """State that the hooks of one transformer share, and the hook around it, which begins calls."""

    def __init__(self, interface: LatentInterface, layout: Layout, settings: Settings):
        super().__init__()
        self.interface, self.layout, self.settings = interface, layout, settings
        self.branches = Branches(interface.max_latents, layout.guide_half)
        self.call: Call | None = None  # the one that is running
        self.compiled: dict[nn.Module, Callable] = {}  # the core's blocks, without Read and Write
        self.handles: list[RemovableHandle] = []  # of the adapters' hooks
        self.leaves_out_core = False  # what the core's blocks give is put aside
        self.keeps_written = False  # for distillation:
        self.written: Tensor | None = None  # (B, N, D), as the last Write left the tokens

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Remember the names of the forward's arguments."""
        self.names = argument_names(module)
        return module

    def new_forward(
        self, module: Any, *args: Any, num_latents: int | None = None, **kwargs: Any
    ) -> Any:
        """Run the transformer's forward, which has one argument more now; threads wait.

        Not while it is traced, nor computed again by the backward pass, which on a GPU has threads
        of its own: those that hold the lock wait for it.
        """
        is_free = torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1
        with nullcontext() if is_free else alone_with(module):
            return self._forward(module, args, kwargs, num_latents)

    def _forward(
        self, module: Any, args: Sequence[Any], kwargs: Mapping[str, Any], num_latents: int | None
    ) -> Any:
        arguments = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        is_odd = len(arguments) != len(args) + len(kwargs) or self.names[0] not in arguments
        if is_odd:  # too many, twice, or none: the forward itself says so
            return self.fn_ref.original_forward(*args, **kwargs)
        branches = self.branches
        if num_latents is not None or not branches.are_batched:
            num_latents = branches.num_latents() if num_latents is None else num_latents
            return self._run(module, arguments, num_latents)
        outputs = []
        for name, part in zip(branches.names, split_batch(arguments, self.names[0]), strict=True):
            with module.cache_context(name):  # gives each branch a step cache of its own
                outputs.append(self._run(module, part, branches.num_latents()))
        return join_batch(outputs)

    def _run(self, module: Any, arguments: Mapping[str, Any], num_latents: int) -> Any:
        call = self._begin(module, arguments, num_latents)
        try:
            with self.running(call), self._checkpointing(module, call):
                return self.fn_ref.original_forward(**arguments)
        finally:  # whatever the latents led to behind the core
            if call.groups is not None and not (call.is_written or call.in_core):
                raise _skipped("last", "Read without Write")

    def _begin(self, module: Any, arguments: Mapping[str, Any], num_latents: int) -> Call:
        """Begin a call with these arguments, or raise a ValueError if the interface doesn't fit."""
        group = self.settings.group
        self._check(arguments)
        hidden_states = arguments[self.names[0]]
        if not isinstance(hidden_states, Tensor):
            raise ValueError(f"{self.names[0]} {hidden_states!r:.60} is no tensor")
        size = self.layout.size(module, arguments, hidden_states)
        if len(size) != len(group):
            raise ValueError(
                f"the tokens lie on {format_size(size)}, but the model was elasticized with "
                f"groups of {format_size(group)}; give a group of {len(size)} numbers"
            )
        grid = TokenGrid(size, group)
        check_num_latents(num_latents, grid.tokens_per_group)
        central = not self.interface.is_lossless
        places = latent_places(grid, num_latents, hidden_states.device, central)
        # A compiled core multiplies by zero what counts nothing: a branch would be a graph more.
        is_compiled = bool(self.compiled) or torch.compiler.is_compiling()
        if num_latents == grid.tokens_per_group and not central and not is_compiled:
            return Call(grid, places, None, leaves_out=True)
        timestep = arguments.get("timestep")
        timestep = 0 if timestep is None else timestep
        levels = torch.as_tensor(timestep, device=hidden_states.device).float()
        levels = levels / self.layout.time_scale
        condition = self.interface.condition(levels, hidden_states.shape[0])
        return Call(grid, places, condition, leaves_out=False)

    def _check(self, arguments: Mapping[str, Any]) -> None:
        for name in self.layout.not_elastic:
            if arguments.get(name) is not None:
                raise ValueError(
                    f"{name} act on the tokens of every block, but the core of an elastic model "
                    f"has latents; leave them out, or use the model from before elasticize"
                )
        skipped, edges = arguments.get("skip_layers") or (), self.settings.edges
        if any(block in edges for block in skipped):
            raise ValueError(
                f"skip_layers={list(skipped)} would leave out Read or Write, which belong to the "
                f"blocks {edges[0]} and {edges[1]}; skip others"
            )

    @contextmanager
    def _checkpointing(self, module: Any, call: Call) -> Iterator[None]:
        """Have blocks that diffusers computes again find their call: compiled ones can't look."""
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)

        def again(block: Any, *args: Any, **kwargs: Any) -> Any:
            with self.running(call):
                return block(*args, **kwargs)

        if checkpoint is not None:
            module._gradient_checkpointing_func = lambda block, *args, **kwargs: checkpoint(
                partial(again, block), *args, **kwargs
            )
        try:
            yield
        finally:
            if checkpoint is not None:
                module._gradient_checkpointing_func = checkpoint

    def find_call(self, hidden_states: Tensor) -> Call | None:
        """The running call, or the one that a block's input is tied to.

        Within a checkpoint the input is tied to it: when the backward pass computes the block
        again, no call is running. Only there: a tensor that holds its call, and is held by the
        call's graph, is freed by backward alone.
        """
        if torch.compiler.is_compiling():
            return self.call
        call = self.call or getattr(hidden_states, "elit_call", None)
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            hidden_states.elit_call = call  # type: ignore[attr-defined]
        return call

    @contextmanager
    def running(self, call: Call) -> Iterator[None]:
        """Make a call the running one: also when a block of it is computed again for gradients."""
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before


class EdgeHook(ModelHook):
    """Has the adapters of a block of head or tail find the running call."""

    def __init__(self, session: Session):
        super().__init__()
        self.session = session

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Find where the tokens go in and out."""
        self.port = self.session.layout.port(module)
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block, also when a checkpoint computes it again."""
        del module
        forward = self.fn_ref.original_forward
        call = self.session.find_call(self.port.arguments(args, kwargs)[self.port.tokens])
        if call is None or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with self.session.running(call):
            return forward(*args, **kwargs)


class CoreHook(EdgeHook):
    """Runs a block of the core on latents: Read before the first, Write after the last."""

    def __init__(self, session: Session, is_first: bool, is_last: bool):
        super().__init__(session)
        self.is_first, self.is_last = is_first, is_last

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block, on latents."""
        session, port = self.session, self.port
        arguments = port.arguments(args, kwargs)
        call = self._call(arguments[port.tokens])
        compiled = session.compiled.get(module)

        def owned(value: Any) -> Any:
            """A copy of a view, at a compiled block: of views it makes graphs of their own."""
            is_view = compiled is not None and isinstance(value, Tensor) and value._is_view()
            return value.clone() if is_view else value

        if self.is_first:
            arguments[port.tokens] = owned(self._read(call, arguments))
        arguments |= call.selected
        call.in_core = True
        with session.running(call):  # adapters look there
            result = (compiled or self.fn_ref.original_forward)(**arguments)
        streams = port.streams_out(result)
        if session.leaves_out_core:
            streams = port.streams_in(arguments)
            result = port.result(port.rest(result), streams)
        call.in_core = False
        if not self.is_last:
            return result
        result = port.result(port.rest(result), (self._write(call, streams[0]), streams[1]))
        return tree_map(owned, result)

    def _call(self, hidden_states: Tensor) -> Call:
        """The call that the block runs in."""
        call = self.session.find_call(hidden_states)
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

    def _read(self, call: Call, arguments: Mapping[str, Any]) -> Tensor:
        session, index, count = self.session, call.places.index, call.grid.num_tokens
        text, tokens = self._split(arguments[self.port.tokens], count)
        if tokens.shape[-1] != session.interface.dim:
            raise ValueError(
                f"the tokens have width {tokens.shape[-1]}, but the interface was made for "
                f"{session.interface.dim}; give layout=Layout(hidden_size={tokens.shape[-1]})"
            )
        for name, per_token in session.layout.per_token.items():
            if name in arguments:
                call.selected[name] = per_token.select(arguments[name], index, count)
        call.groups = to_groups(call.grid, tokens)
        call.latents = session.interface.into_latents(
            call.groups, call.condition, call.grid, call.places
        )
        return torch.cat((text, call.latents), dim=1) if text.shape[1] else call.latents

    def _write(self, call: Call, hidden_states: Tensor) -> Tensor:
        if call.groups is None or call.latents is None:
            raise _skipped("first", "Write without Read")
        text, latents = self._split(hidden_states, call.places.index.shape[0])
        groups = self.session.interface.into_tokens(
            call.groups, call.latents, latents, call.condition, call.grid, call.places
        )
        tokens = from_groups(call.grid, groups)
        call.is_written = True
        if self.session.keeps_written:
            self.session.written = tokens
        return torch.cat((text, tokens), dim=1) if text.shape[1] else tokens

    def _split(self, hidden_states: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Split off a text's tokens, if there are any, from the `count` others after them."""
        before = hidden_states.shape[1] - count
        if before < 0 or (before and not self.session.layout.with_text):
            raise ValueError(
                f"the core got {hidden_states.shape[1]} tokens, but the grid has {count}; "
                f"give a layout whose grid is that of the tokens"
            )
        return hidden_states[:, :before], hidden_states[:, before:]


def _skipped(block: str, lacks: str) -> ValueError:
    return ValueError(
        f"the {block} block of the core did not run ({lacks}): other code skips it; have it skip "
        f"other blocks, or switch it on before elasticize"
    )


def install_hooks(model: nn.Module, session: Session) -> None:
    """Put the interface around the core's blocks, and the adapters into all blocks."""
    blocks, adapters = session.layout.find_blocks(model), session.interface.adapters
    if adapters is not None:
        session.handles = install_adapters(blocks, adapters, session)
    registry_of(model).register_hook(session, MODEL_HOOK)
    first, last = session.settings.edges
    for index, block in enumerate(blocks):
        if first <= index <= last:
            hook = CoreHook(session, index == first, index == last)
            registry_of(block).register_hook(hook, BLOCK_HOOK)
        elif adapters is not None:
            registry_of(block).register_hook(EdgeHook(session), BLOCK_HOOK)
    registry_of(model).invalidate_child_registries_cache()


def remove_hooks(model: nn.Module, session: Session) -> None:
    """Take the interface away again."""
    for handle in session.handles:
        handle.remove()
    remove_named_hooks(model, MODEL_HOOK, BLOCK_HOOK)
