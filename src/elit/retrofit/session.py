"""The state that the hooks of one transformer share: the call that is running, and its budget."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elit.interface.grid import TokenGrid
from elit.retrofit.branches import Branches
from elit.retrofit.interface import LatentInterface
from elit.retrofit.layout import Layout
from elit.retrofit.places import LatentPlaces
from elit.retrofit.settings import Settings


@dataclass
class Call:
    """One call of the transformer: what Read leaves for the core and for Write.

    Attributes:
        grid: of the tokens.
        places: of the latents.
        condition: (B, D) for Read and Write; None where they are not told.
        with_grad: whether gradients were wanted when it began.
        leaves_out: whether to leave out what counts nothing, because the budget is full.
        groups: (B, G, P, D), the tokens that entered Read.
        latents: (B, G * n, D), as they left Read.
        in_core: whether a block of the core runs, or has failed.
        is_written: whether Write came after it.
        selected: the blocks' arguments that follow the tokens, at the latents' places.
    """

    grid: TokenGrid
    places: LatentPlaces
    condition: Tensor | None
    with_grad: bool
    leaves_out: bool
    groups: Tensor | None = None
    latents: Tensor | None = None
    in_core: bool = False
    is_written: bool = False
    selected: dict[str, Any] = field(default_factory=dict)


class Session:
    """What the hooks of one transformer share.

    Attributes:
        interface: Read and Write.
        layout: of the transformer.
        settings: head, tail, group.
        branches: the budgets of calls that don't name theirs.
        call: the call that is running.
        core: the blocks between Read and Write.
        compiles_core: whether they are compiled.
        handles: of the adapters' hooks.
        reruns_blocks: whether checkpointed blocks are run again under their own call.
        leaves_out_core: whether what the core's blocks give is put aside.
        keeps_written: whether Write's tokens are kept, for distillation.
        written: (B, N, D), as the last Write left them.
    """

    def __init__(self, interface: LatentInterface, layout: Layout, settings: Settings):
        self.interface, self.layout, self.settings = interface, layout, settings
        self.branches = Branches(interface.max_latents, layout.guide_half)
        self.call: Call | None = None
        self.core: list[nn.Module] = []
        self.compiles_core = False
        self.handles: list[RemovableHandle] = []
        self.reruns_blocks = False
        self.leaves_out_core = False
        self.keeps_written = False
        self.written: Tensor | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether the core is, or is just being, compiled.

        It then multiplies by zero what it could leave out: a branch would be a graph more.
        """
        return self.compiles_core or torch.compiler.is_compiling()

    def remember(self, hidden_states: Tensor, call: Call) -> None:
        """Tie a call to a block's input, within a checkpoint of the user's own.

        When that computes the block again, in the backward pass, no call is running. Only there:
        a tensor that holds its call, and is held by the call's graph, is freed by backward alone.
        """
        if torch.compiler.is_compiling() or self.reruns_blocks:
            return
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            hidden_states.elit_call = call  # type: ignore[attr-defined]

    def recall(self, hidden_states: Tensor) -> Call | None:
        """The running call, or the one that a block's input is tied to."""
        if self.call is not None or torch.compiler.is_compiling():
            return self.call
        return getattr(hidden_states, "elit_call", None)

    @contextmanager
    def running(self, call: Call | None) -> Iterator[None]:
        """Make a call the running one: also when a block of it is computed again for gradients."""
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before
