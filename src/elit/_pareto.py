"""What is best for its cost. Costs and values may be None: those points take no part."""

import math
from collections.abc import Sequence

from elit._numbers import is_real as is_number

__all__ = ["best_within", "is_number", "pareto_front"]
Numbers = Sequence[float | None]


def pareto_front(costs: Numbers, values: Numbers, lower_is_better: bool) -> list[int]:
    """Places of the points that no other beats, cheapest first.

    One point beats another where neither its cost nor its value is worse and one of them is better;
    of equal points none beats the other.
    """
    sign = 1 if lower_is_better else -1
    points = sorted(
        (cost, sign * value, i)
        for i, (cost, value) in enumerate(zip(costs, values, strict=True))
        if is_number(cost) and is_number(value)
    )
    front: list[int] = []
    best, last = math.inf, None
    for cost, value, i in points:
        if value < best or (cost, value) == last:
            front.append(i)
            best, last = value, (cost, value)
    return front


def best_within(
    costs: Numbers, values: Numbers, lower_is_better: bool, caps: Sequence[float]
) -> list[int | None]:
    """Place of the best point at or below each cap, of equal values the cheapest, or None."""
    front = pareto_front(costs, values, lower_is_better)
    found: list[int | None] = []
    for cap in caps:
        within = [i for i in front if (costs[i] or 0.0) <= cap]
        found.append(within[-1] if within else None)
    return found
