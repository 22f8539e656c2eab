"""The rule by which a claim holds, does not hold, or stays undecided."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

RULE = (
    "Each seed gives one difference between the two sides, both trained from that seed on the same "
    "batches and measured on the same pictures and noise. Where the mean difference is beyond two "
    "standard errors (over seeds) in the claim's direction, the claim holds; beyond two in the "
    "other direction, it does not hold; else, and with a single seed, it is undecided. Over "
    "budgets, the difference is that of the lowest and the full one; a budget that is better than "
    "the next larger one beyond two standard errors makes it not hold. The rule is lenient: a "
    "claim without any truth in it holds once in eleven times with three seeds, once in seven with "
    "two (Student's t)."
)
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Verdict:
    """What differences say of a claim.

    Attributes:
        word: HOLDS, FAILS or UNDECIDED.
        difference: mean over seeds, above 0 in the claim's direction; None without any.
        error: its standard error over seeds; None of fewer than two.
        seeds: how many.
    """

    word: str
    difference: float | None
    error: float | None
    seeds: int


def mean(values: Sequence[float]) -> float:
    """The mean of one value or more."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None of fewer than two values."""
    if len(values) < 2:
        return None
    middle = mean(values)
    variance = sum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def judge(differences: Sequence[float]) -> Verdict:
    """Apply the rule to one difference for each seed, above 0 where the claim holds."""
    if not differences:
        return Verdict(UNDECIDED, None, None, 0)
    difference, error = mean(differences), standard_error(differences)
    word = UNDECIDED
    if error is not None and difference > 2 * error:
        word = HOLDS
    elif error is not None and difference < -2 * error:
        word = FAILS
    return Verdict(word, difference, error, len(differences))


def judge_order(rows: Sequence[Sequence[float]]) -> Verdict:
    """Whether the last row is above the first one, and no row is below the one before it.

    Steps may be too small to be told from none; one beyond two standard errors against the order
    is enough to fail.

    Args:
        rows: one for each budget, of values for each seed.
    """
    whole = judge([b - a for a, b in zip(rows[0], rows[-1], strict=True)])
    steps = [
        judge([b - a for a, b in zip(one, two, strict=True)])
        for one, two in itertools.pairwise(rows)
    ]
    if any(step.word == FAILS for step in steps):
        return Verdict(FAILS, whole.difference, whole.error, whole.seeds)
    return whole
