"""Samples of different budgets in one batch: those of one number of latents pass the core at once.

Head and tail run once for all. Read, core and Write run on the samples of each number of latents as
a batch of their own, so that each costs what it costs alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def by_budget(
    through_core: Callable[..., Any], num_latents: int | Sequence[int], *batched: Tensor | None
) -> Any:
    """What `through_core(n, *batched)` gives, (B, ...), with another n for each sample if so given.

    Args:
        through_core: Read, core and Write of samples that keep n latents per group: one tensor or
            a tuple of them.
        num_latents: n of all samples, or of each.
        batched: (B, ...) each, or None.
    """
    if isinstance(num_latents, int | torch.SymInt):
        return through_core(num_latents, *batched)
    rows_of: dict[int, list[int]] = {}
    for row, n in enumerate(num_latents):
        rows_of.setdefault(n, []).append(row)
    parts = [
        through_core(n, *(x if x is None else x[_index(rows, x)] for x in batched))
        for n, rows in rows_of.items()
    ]
    rows = [row for own in rows_of.values() for row in own]
    back = sorted(range(len(rows)), key=rows.__getitem__)
    if isinstance(parts[0], Tensor):
        return _join(parts, back)
    return tuple(_join(each, back) for each in zip(*parts, strict=True))


def _index(rows: list[int], x: Tensor) -> Any:
    """Neighbours, as guidance has them, as a slice: it copies nothing."""
    if rows == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=x.device)


def _join(parts: Sequence[Tensor], back: list[int]) -> Tensor:
    """The samples in their order again."""
    joined = torch.cat(list(parts))
    return joined[_index(back, joined)]
