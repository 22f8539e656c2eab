"""Branches of guidance, and their budgets, in pipelines that know nothing of budgets."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from elit.interface.budget import resolve_budget


@dataclass
class Branches:
    """Budgets of the branches.

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
        return self.name == "cond_uncond" or (self.name is None and self.guide_half is not None)

    @property
    def names(self) -> tuple[str, str]:
        """Names of the first and the second half of a batch with both branches."""
        return ("cond", "uncond") if self.guide_half == "second" else ("uncond", "cond")

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Name the calls within."""
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before


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

    def is_batch(value: Any) -> bool:
        length = len(value) if isinstance(value, list) else 0
        return size == (value.shape[0] if isinstance(value, Tensor) and value.ndim else length)

    def part(half: slice) -> dict[str, Any]:
        return tree_map(lambda x: x[half] if is_batch(x) else x, dict(arguments), is_leaf=is_batch)

    return [part(slice(size // 2)), part(slice(size // 2, None))]


def join_batch(outputs: Sequence[Any]) -> Any:
    """The output of both branches, as one call would have given it."""
    return tree_map(lambda *halves: torch.cat(halves), *outputs)
