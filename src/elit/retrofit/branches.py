"""Budgets of the branches of guidance, for pipelines that know nothing of budgets."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elit.interface.budget import resolve_budget

BOTH = "cond_uncond"


@dataclass
class Branches:
    """How many latents the calls of a pipeline keep.

    diffusers' pipelines name their calls, by `cache_context`: "cond" is the guided branch,
    "uncond" the guide, "cond_uncond" both in one batch. Some batch both and name nothing.

    Attributes:
        max_latents: J.
        guide_half: of a batch with both branches, which half is the guide: "first" or "second";
            None where pipelines call the model once for each branch.
        budget: of the guided branch, and of calls without a name.
        guide: of the guide; None is as `budget`.
        name: of the call that runs.
    """

    max_latents: int
    guide_half: str | None = None
    budget: float = 1.0
    guide: float | None = None
    name: str | None = None

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
        """Calls under a name."""
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before


def split_batch(arguments: Mapping[str, Any], samples: str) -> list[dict[str, Any]]:
    """The arguments of the two branches that a pipeline gives in one batch.

    Args:
        arguments: of the forward.
        samples: which of them are the samples.
    """
    batch = arguments[samples]
    size = len(batch)
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
        return value.chunk(2)[part] if value.ndim and len(value) == size else value
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
