"""Budgets: what a person types, what a module takes, what training draws."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from elit._numbers import as_number

if TYPE_CHECKING:
    import torch


def read_budget(budget: float | str, max_latents: int | None = None) -> float:
    """A budget in (0, 1] as a number, of one that may be typed: 0.25, "1/4" or "25%".

    Args:
        budget: fraction of the latents to keep.
        max_latents: J, latents per group at full budget, for the message where it is known.
    """
    value = as_number(budget) if isinstance(budget, str) else budget
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"budget {budget!r:.60} is not a number; give a fraction in (0, 1]")
    if not 0 < value <= 1:  # also refuses NaN
        fewest = f"; the cheapest is {1 / max_latents:g}" if max_latents else ""
        shown = repr(budget) if isinstance(budget, str) else str(budget)
        raise ValueError(
            f"budget {shown:.20} is outside (0, 1]: it is the fraction of the "
            f"{f'{max_latents} ' if max_latents else ''}latents per group to keep; give one such "
            f"as 0.25, 1/4 or 25%, or 1 for all{fewest}"
        )
    return float(value)


def resolve_budget(budget: float | str, max_latents: int) -> int:
    """Latents per group that a budget in (0, 1] keeps: the only rounding there is.

    Args:
        budget: fraction of the latents to keep: 0.25, "1/4" or "25%".
        max_latents: J, latents per group at full budget.
    """
    return max(1, round(read_budget(budget, max_latents) * max_latents))


def format_budget(budget: float) -> str:
    """0.25 -> '1/4'; what is no simple fraction stays a number: 0.3 -> '0.3'."""
    if budget == 1 or budget < 1e-9:
        return f"{budget:g}"
    inverse = round(1 / budget)
    return f"1/{inverse}" if abs(budget * inverse - 1) < 1e-9 else f"{budget:.3g}"


def check_num_latents(num_latents: int, max_latents: int, name: str = "num_latents") -> int:
    """`num_latents`, or the error that says what is allowed."""
    if isinstance(num_latents, numbers.Integral) and not isinstance(num_latents, int):
        num_latents = int(num_latents)  # NumPy's
    whole = isinstance(num_latents, int) or _is_symbolic(num_latents)
    if not whole or isinstance(num_latents, bool):
        raise ValueError(
            f"{name} {num_latents!r:.60} is not an integer; give one in 1..{max_latents}, "
            f"or turn a budget into it with resolve_budget"
        )
    if not 1 <= num_latents <= max_latents:
        raise ValueError(
            f"{name} {num_latents!s:.60} is outside 1..{max_latents}, the latents per group; "
            f"a fraction is turned into it by resolve_budget"
        )
    return num_latents


def _is_symbolic(number: Any) -> bool:
    """Say whether it is the number that torch.export passes in place of an integer."""
    import torch

    return isinstance(number, torch.SymInt)


def default_budgets(min_latents: int, max_latents: int) -> list[float]:
    """1, 1/2, 1/4, ... down to `min_latents` of `max_latents`."""
    budgets = [1.0]
    while budgets[-1] / 2 * max_latents >= min_latents:
        budgets.append(budgets[-1] / 2)
    return budgets


class Budgeted:
    """A model whose latents per group can be chosen: one of ours, or one that was elasticized.

    Attributes:
        max_latents: J, latents per group at full budget, 0 in a plain model.
        min_latents: fewest latents per group that training keeps, 0 in a plain model.
    """

    max_latents: int = 0
    min_latents: int = 0

    @property
    def is_elastic(self) -> bool:
        """Whether there is a latent interface, the model's own or one that it was given."""
        return self.max_latents > 0

    def resolve_budget(self, budget: float | str) -> int | None:
        """`num_latents` of a budget in (0, 1]; None, "all there is", for a plain model at 1."""
        if self.is_elastic:
            return resolve_budget(budget, self.max_latents)
        if read_budget(budget) == 1:
            return None
        raise ValueError(
            f"budget {budget!s:.60} asked of a model that is not elastic; "
            f"leave the budget at 1, or use a model with groups (elit-...)"
        )

    def budget_of(self, num_latents: int | None) -> float:
        """Budget that `num_latents` really are; 1 for a plain model."""
        if not self.is_elastic or num_latents is None:
            return 1.0
        return check_num_latents(num_latents, self.max_latents) / self.max_latents


@dataclass(frozen=True)
class TailDropping:
    """Number of latents per group that a training step keeps, and which.

    Paper: j ~ Uniform{min_latents..max_latents} per step, the first j of every group. Equal
    bounds train a single budget. `order="random"` keeps j random latents instead, the paper's
    ablation (FID 27.0 against 26.6 at full budget).

    Attributes:
        min_latents: fewest latents kept.
        max_latents: most latents kept; at most `total`.
        total: J, latents per group of the model.
        order: which latents are kept.
    """

    min_latents: int
    max_latents: int
    total: int
    order: Literal["first", "random"] = "first"

    def __post_init__(self) -> None:
        if self.order not in ("first", "random"):
            raise ValueError(f"order {self.order!r} is unknown; use 'first' or 'random'")
        for name in ("min_latents", "max_latents", "total"):
            if not isinstance(value := getattr(self, name), numbers.Integral):
                raise ValueError(
                    f"{name} {value!r:.60} is no whole number of latents; resolve_budget turns a "
                    f"budget into one"
                )
        if not 1 <= self.min_latents <= self.max_latents <= self.total:
            raise ValueError(
                f"cannot keep {self.min_latents}..{self.max_latents} latents per group: "
                f"the model has {self.total}; need 1 <= min_latents <= max_latents <= {self.total}"
            )

    def draw(self, generator: torch.Generator) -> int:
        """Draw the number of latents per group."""
        import torch

        return int(
            torch.randint(self.min_latents, self.max_latents + 1, (), generator=generator).item()
        )

    def draw_strata(self, count: int, generator: torch.Generator) -> list[int]:
        """Draw `count` numbers, each from a part of the range of its own, on a log scale.

        Low and high budgets then come in every step: the first part holds the fewest latents.
        """
        if count == 1:
            return [self.draw(generator)]
        import torch

        ratio = (self.max_latents + 1) / self.min_latents
        drawn = torch.rand(count, generator=generator).tolist()
        numbers = [self.min_latents * ratio ** ((i + u) / count) for i, u in enumerate(drawn)]
        return [min(int(n), self.max_latents) for n in numbers]

    def choose(self, num_latents: int, generator: torch.Generator) -> torch.Tensor | None:
        """Indices (num_latents,) of the latents to keep, or None for the first ones."""
        if self.order == "first":
            return None
        import torch

        return torch.randperm(self.total, generator=generator)[:num_latents].sort().values
