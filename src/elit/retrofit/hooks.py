"""Hooks that put Read before a transformer's core and Write after it.

transformer   a call begins: its grid, its number of latents            `ElasticModelHook`
first block   Read: tokens -> latents                                   `CoreHook`
core blocks   rotary embeddings and what else follows the tokens        `CoreHook`
last block    Write: latents -> tokens                                  `CoreHook`
others        their adapters, if there are any, find the call           `EdgeHook`

They are diffusers' hooks, registered before any cache's: a cache then sees spatial tokens only,
and is right at any budget.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from elit.caching.hooks import registry_of
from elit.caching.hooks import remove_hooks as remove_named_hooks
from elit.caching.ports import argument_names
from elit.interface.budget import check_num_latents
from elit.interface.fit import format_size
from elit.interface.grid import TokenGrid
from elit.interface.raster import from_groups, to_groups
from elit.retrofit.adapters import install_adapters
from elit.retrofit.places import latent_places
from elit.retrofit.session import Call, Session, join_batch, split_batch

MODEL_HOOK, CORE_HOOK = "elit_model", "elit_core"


class _Hook(ModelHook):
    def __init__(self, session: Session):
        super().__init__()
        self.session = session


class ElasticModelHook(_Hook):
    """Takes `num_latents`, finds the grid and begins a call, around the transformer."""

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Remember the names of the forward's arguments."""
        self.names = argument_names(module)
        return module

    def new_forward(
        self, module: Any, *args: Any, num_latents: int | None = None, **kwargs: Any
    ) -> Any:
        """Run the transformer's forward, which has one argument more now."""
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        is_odd = len(arguments) != len(args) + len(kwargs) or self.names[0] not in arguments
        if is_odd:  # too many, twice, or none: the forward itself says so
            return self.fn_ref.original_forward(*args, **kwargs)
        branches = self.session.branches
        if num_latents is not None or not branches.are_batched:
            num_latents = branches.num_latents() if num_latents is None else num_latents
            return self._run(module, arguments, num_latents)
        outputs = []
        parts = split_batch(arguments, self.names[0])
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
                raise _skipped("last", "Read without Write")

    def _begin(self, module: Any, arguments: Mapping[str, Any], num_latents: int) -> Call:
        """Begin a call with these arguments, or raise a ValueError if the interface doesn't fit."""
        session, group = self.session, self.session.settings.group
        self._check(arguments)
        hidden_states = arguments[self.names[0]]
        if not isinstance(hidden_states, Tensor):
            raise ValueError(f"{self.names[0]} {hidden_states!r:.60} is no tensor")
        size = session.layout.size(module, arguments, hidden_states)
        if len(size) != len(group):
            raise ValueError(
                f"the tokens lie on {format_size(size)}, but the model was elasticized with "
                f"groups of {format_size(group)}; give a group of {len(size)} numbers"
            )
        grid = TokenGrid(size, group)
        check_num_latents(num_latents, grid.tokens_per_group)
        central = not session.interface.is_lossless
        places = latent_places(grid, num_latents, hidden_states.device, central)
        is_full = num_latents == grid.tokens_per_group
        leaves_out = is_full and not central and not session.is_compiled
        condition = None
        if not leaves_out:
            timestep = arguments.get("timestep")
            timestep = 0 if timestep is None else timestep
            levels = torch.as_tensor(timestep, device=hidden_states.device).float()
            levels = levels / session.layout.time_scale
            condition = session.interface.condition(levels, hidden_states.shape[0])
        return Call(grid, places, condition, torch.is_grad_enabled(), leaves_out)

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


class EdgeHook(_Hook):
    """Has the adapters of a block of head or tail find the running call."""

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Find where the tokens go in and out."""
        self.port = self.session.layout.port(module)
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block, also when a checkpoint computes it again."""
        del module
        session, forward = self.session, self.fn_ref.original_forward
        hidden_states = self.port.arguments(args, kwargs)[self.port.tokens]
        call = session.recall(hidden_states)
        if call is None or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        session.remember(hidden_states, call)
        with session.running(call):
            return forward(*args, **kwargs)


class CoreHook(EdgeHook):
    """Runs a block of the core on latents: Read before the first, Write after the last."""

    def __init__(self, session: Session, is_first: bool, is_last: bool):
        super().__init__(session)
        self.is_first, self.is_last = is_first, is_last
        self.compiled: Callable[..., Any] | None = None  # the block without Read and Write

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the block alone, as `torch.compile` does."""
        self.compiled = torch.compile(self.fn_ref.original_forward, *args, **kwargs)
        self.session.compiles_core = True

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block, on latents."""
        del module
        port = self.port
        arguments = port.arguments(args, kwargs)
        hidden_states = arguments[port.tokens]
        call = self._call(hidden_states)
        if self.is_first:
            hidden_states = self._owned(self._read(call, arguments, hidden_states))
        arguments |= {port.tokens: hidden_states, **call.selected}
        forward = self.compiled or self.fn_ref.original_forward
        call.in_core = True
        if torch.compiler.is_compiling():
            result = forward(**arguments)
        else:
            with self.session.running(call):  # adapters look there
                result = forward(**arguments)
        streams = port.streams_out(result)
        if self.session.leaves_out_core:
            streams = port.streams_in(arguments)
            result = port.result(port.rest(result), streams)
        call.in_core = False
        if not self.is_last:
            self.session.remember(streams[0], call)
            return result
        result = port.result(port.rest(result), (self._write(call, streams[0]), streams[1]))
        return tree_map(self._owned, result)

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
        call.groups = to_groups(call.grid, tokens)
        call.latents = session.interface.into_latents(
            call.groups, call.condition, call.grid, call.places
        )
        return _join(text, call.latents)

    def _write(self, call: Call, hidden_states: Tensor) -> Tensor:
        if call.groups is None or call.latents is None:
            raise _skipped("first", "Write without Read")
        num_latents = call.places.index.shape[0]
        text, latents = _split(hidden_states, num_latents, self.session.layout.with_text)
        groups = self.session.interface.into_tokens(
            call.groups, call.latents, latents, call.condition, call.grid, call.places
        )
        tokens = from_groups(call.grid, groups)
        call.is_written = True
        if self.session.keeps_written:
            self.session.written = tokens
        return _join(text, tokens)


def _skipped(block: str, lacks: str) -> ValueError:
    return ValueError(
        f"the {block} block of the core did not run ({lacks}): other code skips it; have it skip "
        f"other blocks, or switch it on before elasticize"
    )


def _split(hidden_states: Tensor, count: int, with_text: bool) -> tuple[Tensor | None, Tensor]:
    """Split off a text's tokens, if there are any, from the `count` others after them."""
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
    blocks, adapters = session.layout.find_blocks(model), session.interface.adapters
    if adapters is not None:
        session.handles = install_adapters(blocks, adapters, session)
    registry_of(model).register_hook(ElasticModelHook(session), MODEL_HOOK)
    first, last = session.settings.edges
    session.core = blocks[first : last + 1]
    for index, block in enumerate(blocks):
        if first <= index <= last:
            hook: EdgeHook = CoreHook(session, index == first, index == last)
        elif adapters is not None:
            hook = EdgeHook(session)
        else:
            continue
        registry_of(block).register_hook(hook, CORE_HOOK)
    registry_of(model).invalidate_child_registries_cache()


def core_hook(block: nn.Module) -> CoreHook:
    """The hook of a block of the core."""
    return registry_of(block).hooks[CORE_HOOK]


def remove_hooks(model: nn.Module, session: Session) -> None:
    """Take the interface away again."""
    for handle in session.handles:
        handle.remove()
    session.handles = []
    remove_named_hooks(model, MODEL_HOOK, CORE_HOOK)
