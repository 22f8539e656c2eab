"""Sizes as words, and what to do about a grid that groups do not divide."""

import math
from collections.abc import Sequence


def format_size(size: Sequence[int]) -> str:
    """(4, 16, 16) -> '4x16x16'."""
    return "x".join(map(str, size))


def check_fit(size: Sequence[int], group: Sequence[int]) -> None:
    """Raise a ValueError unless a grid of tokens can be cut into groups."""
    if len(group) != len(size):
        raise ValueError(
            f"a grid of {len(size)} axes ({format_size(size)}) cannot be cut into "
            f"groups of {len(group)} ({format_size(group)}); give a group of {len(size)} numbers"
        )
    pairs = list(zip(size, group, strict=True))
    grid = f"a grid of {format_size(size)} tokens cannot be cut into groups of {format_size(group)}"
    if min(*size, *group) < 1:
        raise ValueError(f"{grid}; every number must be at least 1")
    for tokens, per_group in pairs:
        if tokens % per_group:
            padded = [math.ceil(n / g) * g for n, g in pairs]
            fitting = [max(d for d in range(1, min(g, n) + 1) if n % d == 0) for n, g in pairs]
            raise ValueError(
                f"{grid}: {tokens} is not a multiple of {per_group}; "
                f"resize or pad the input to {format_size(padded)} tokens, "
                f"or use a model with group=({', '.join(map(str, fitting))})"
            )
