"""State that the hooks of one transformer share: the call that is running, and its budget."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elit.interface.budget import resolve_budget
from elit.interface.grid import TokenGrid
from elit.retrofit.interface import LatentInterface
from elit.retrofit.layout import Layout
from elit.retrofit.places import LatentPlaces
from elit.retrofit.settings import Settings

BOTH = "cond_uncond"


@dataclass
class Call:
    """One call of the transformer: what Read leaves for the core and for Write."""

    grid: TokenGrid  # of the tokens
    places: LatentPlaces  # of the latents
    condition: Tensor | None  # (B, D) for Read and Write; None where they are not told
    with_grad: bool  # when it began
    leaves_out: bool  # what counts nothing, because the budget is full
    groups: Tensor | None = None  # (B, G, P, D), the tokens that entered Read
    latents: Tensor | None = None  # (B, G * n, D), as they left Read
    in_core: bool = False  # a block of the core runs, or has failed
    is_written: bool = False  # Write came after it
    selected: dict[str, Any] = field(default_factory=dict)  # per-token arguments, of the latents


@dataclass
class Branches:
    """Budgets of the branches of guidance, for pipelines that know nothing of budgets.

    diffusers' pipelines name their calls, by `cache_context`: "cond" is the guided branch,
    "uncond" the guide, "cond_uncond" both in one batch. Some batch both and name nothing.
    """

    max_latents: int
    guide_half: str | None = None  # of a batch of both: "first", "second"; None: a call for each
    budget: float = 1.0  # of the guided branch, and of calls without a name
    guide: float | None = None  # budget of the guide; None stands for `budget`
    name: str | None = None  # of the call that runs

    def num_latents(self, is_guide: bool | None = None) -> int:
        """Latents per group of a branch; by default of the call that runs."""
        if is_guide is None:
            is_guide = self.name is not None and "uncond" in self.name
        budget = self.guide if is_guide and self.guide is not None else self.budget
        return resolve_budget(budget, self.max_latents)

    @property
    def are_batched(self) -> bool:
        """Whether the call that runs holds both branches, and their budgets differ."""
        if self.num_latents(True) == self.num_latents(False):
            return False
        return self.name == BOTH or (self.name is None and self.guide_half is not None)

    @property
    def halves(self) -> tuple[bool, bool]:
        """Whether the first and the second half of a batch with both branches is the guide."""
        return self.guide_half != "second", self.guide_half == "second"

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Name the calls within."""
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before


class Session:
    """State of one transformer's hooks."""

    def __init__(self, interface: LatentInterface, layout: Layout, settings: Settings):
        self.interface, self.layout, self.settings = interface, layout, settings
        self.branches = Branches(interface.max_latents, layout.guide_half)
        self.call: Call | None = None  # the one that is running
        self.core: list[nn.Module] = []  # the blocks between Read and Write
        self.compiles_core = False
        self.handles: list[RemovableHandle] = []  # of the adapters' hooks
        self.reruns_blocks = False  # checkpointed blocks run again under their own call
        self.leaves_out_core = False  # what the core's blocks give is put aside
        self.keeps_written = False  # for distillation:
        self.written: Tensor | None = None  # (B, N, D), as the last Write left the tokens

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


def split_batch(arguments: Mapping[str, Any], samples: str) -> list[dict[str, Any]]:
    """Split a forward's arguments, of which `samples` are the samples, into two branches'."""
    batch = arguments[samples]
    size = batch.shape[0]
    # It waits for the device once a call: better than guiding one image by another one.
    if size % 2 or not torch.equal(batch[: size // 2], batch[size // 2 :]):
        raise ValueError(
            f"a guide budget is set, so this call should hold all samples twice, for the guide and "
            f"for what it guides, but its {size} are not: switch the pipeline's guidance on, or "
            f"set no guide budget: set_budget(budget, guide=None)"
        )
    return [
        {name: _half(value, size, part) for name, value in arguments.items()} for part in (0, 1)
    ]


def _half(value: Any, size: int, part: int) -> Any:
    """Half of whatever has an entry for each sample."""
    if isinstance(value, Tensor):
        return value.chunk(2)[part] if value.ndim and value.shape[0] == size else value
    if isinstance(value, Mapping):
        return {name: _half(item, size, part) for name, item in value.items()}
    if isinstance(value, list) and len(value) == size:
        return value[part * size // 2 : (part + 1) * size // 2]
    return value


def join_batch(outputs: Sequence[Any]) -> Any:
    """The output of both branches, as one call would have given it."""
    first, second = outputs
    if isinstance(first, tuple):
        return tuple(map(torch.cat, zip(first, second, strict=True)))
    return type(first)(sample=torch.cat((first.sample, second.sample)))
