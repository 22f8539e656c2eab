"""Guidance: classifier-free, autoguidance and cheap CFG are one formula.

v = v_guide + scale * (v - v_guide), where the guide is a second prediction that differs in its
label, its budget, or both:

    CFG           no label     the same budget
    AutoGuidance  same label   a low budget
    CheapCFG      no label     a low budget
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elit._choices import check_choice
from elit._numbers import as_number, is_real
from elit.flow.words import GUIDANCES

Condition = Mapping[str, Tensor]
"""What tells a model what to draw: its arguments by name, (B, ...) each: labels, or a text."""
Budget = float | str
"""A fraction in (0, 1], 0.25, "1/4" or "25%"; or "lowest", that the model was trained with."""
Interval = tuple[float, float]
"""Noise levels [low, high], both ends included."""
WHOLE = (0.0, 1.0)
Latents = int | tuple[int, ...] | None
"""Latents per group of a batch, or of each sample; None is all there is. A guide of 0 is none."""
Velocity = Callable[[Tensor, float, Condition, Latents], Tensor]
"""(samples (B, ...), sigma, condition, num_latents) -> velocities (B, ...)"""
Forwards = tuple[tuple[int | None, int], ...]
"""Forwards that make one velocity: latents per group, and how many batches in one, of each."""


@dataclass(frozen=True)
class Guidance:
    """Which second prediction guides the first, how strongly and when.

    Attributes:
        scale: strength; 1 is no guidance, and then no guide is computed.
        drop_label: whether the guide sees the null label.
        budget: the guide's budget; None is that of the guided prediction.
        interval: noise levels in which guidance acts.
    """

    scale: float
    drop_label: bool
    budget: Budget | None
    interval: Interval = WHOLE

    def __post_init__(self) -> None:
        if not (is_real(self.scale) and self.scale >= 0):
            raise ValueError(
                f"guidance scale {self.scale!r:.60} is not allowed; use 1 for none, 1.5 to 5 are "
                f"usual"
            )
        if not isinstance(self.drop_label, bool):
            raise ValueError(f"drop_label={self.drop_label!r} is not allowed; give True or False")
        budget = self.budget
        is_lowest = isinstance(budget, str) and budget == "lowest"
        if isinstance(budget, str) and not is_lowest:
            object.__setattr__(self, "budget", as_number(budget))
        if not (budget is None or is_lowest or (is_real(self.budget) and 0 < self.budget <= 1)):
            raise ValueError(
                f"guide budget {budget!r:.60} is unknown; give a fraction in (0, 1] or 'lowest'"
            )
        if self.budget is None and not self.drop_label:
            raise ValueError(
                "a guide with the same label and the same budget guides nothing; "
                "set drop_label=True (CFG), or a lower budget (AutoGuidance)"
            )
        ends = self.interval if isinstance(self.interval, Sequence) else ()
        if not (len(ends) == 2 and all(map(is_real, ends)) and 0 <= ends[0] <= ends[1] <= 1):
            raise ValueError(
                f"guidance interval {self.interval!r} is not allowed; "
                f"give noise levels 0 <= low <= high <= 1"
            )

    def is_active(self, sigma: float) -> bool:
        """Whether a guide is needed at this noise level."""
        low, high = self.interval
        # Levels come in float32: 0.1 there is 0.10000000149, and still an end of (0, 0.1).
        return self.scale != 1 and low - 1e-6 <= sigma <= high + 1e-6

    def forwards(
        self, sigma: float, num_latents: Latents, guide_latents: Latents
    ) -> tuple[tuple[Latents, int], ...]:
        """Forwards of the model that `velocity` makes at a noise level."""
        same_budget = guide_latents == num_latents
        unguided = guide_latents == 0 or not self.is_active(sigma)
        if unguided or (same_budget and not self.drop_label):
            return ((num_latents, 1),)
        if same_budget:  # one doubled batch keeps a device busier than two calls
            return ((num_latents, 2),)
        return (num_latents, 1), (guide_latents, 1)

    def velocity(
        self,
        predict: Velocity,
        sample: Tensor,
        sigma: float,
        condition: Condition,
        null_condition: Condition,
        num_latents: Latents,
        guide_latents: Latents,
        mixes: bool = False,
    ) -> Tensor:
        """Guided velocity (B, ...), in float32 or in what is wider.

        Args:
            predict: the model.
            sample: (B, ...), noisy samples.
            sigma: their noise level.
            condition: the samples' labels or texts.
            null_condition: the same of "no class" or of empty texts, of the same shapes.
            num_latents: latents per group of the guided prediction.
            guide_latents: latents per group of the guide; 0 is no guide.
            mixes: whether the model takes samples of different budgets in one batch: the guided
                prediction and its guide then share head and tail.
        """
        forwards = self.forwards(sigma, num_latents, guide_latents)
        if forwards == ((num_latents, 1),):
            return at_least_float32(predict(sample, sigma, condition, num_latents))
        guide_condition = null_condition if self.drop_label else condition
        if len(forwards) == 1 or mixes:
            both_conditions = {
                name: torch.cat((value, guide_condition[name])) for name, value in condition.items()
            }
            kept = num_latents
            if num_latents is not None and (len(forwards) == 2 or isinstance(num_latents, tuple)):
                kept = per_sample(num_latents, sample) + per_sample(guide_latents, sample)
            both = predict(torch.cat((sample, sample)), sigma, both_conditions, kept)
            predicted, guide = at_least_float32(both).chunk(2)
        else:
            predicted = at_least_float32(predict(sample, sigma, condition, num_latents))
            guide = at_least_float32(predict(sample, sigma, guide_condition, guide_latents))
        return torch.lerp(guide, predicted, float(self.scale))


def per_sample(num_latents: Latents, sample: Tensor) -> tuple[int, ...]:
    """Latents per group of each of the samples (B, ...)."""
    assert num_latents is not None
    return num_latents if isinstance(num_latents, tuple) else (num_latents,) * sample.shape[0]


def at_least_float32(velocity: Tensor) -> Tensor:
    """A velocity as it is if it is float64, else in float32."""
    return velocity.to(torch.promote_types(velocity.dtype, torch.float32))


def CFG(scale: float, interval: Interval = WHOLE) -> Guidance:
    """Classifier-free guidance: the guide has no label and the same budget."""
    return Guidance(scale, drop_label=True, budget=None, interval=interval)


UNGUIDED = CFG(1.0)
"""No guide is ever computed."""


def AutoGuidance(scale: float, budget: Budget = "lowest", interval: Interval = WHOLE) -> Guidance:
    """Autoguidance: the guide has the same label and a lower budget."""
    return Guidance(scale, drop_label=False, budget=budget, interval=interval)


def CheapCFG(scale: float, budget: Budget = "lowest", interval: Interval = WHOLE) -> Guidance:
    """Cheap classifier-free guidance: the guide has no label and a lower budget."""
    return Guidance(scale, drop_label=True, budget=budget, interval=interval)


def make_guidance(
    name: str, scale: float = 2.0, budget: Budget = "lowest", interval: Interval = WHOLE
) -> Guidance | None:
    """Guidance by its short name, one of GUIDANCES; None for "none". "cfg" needs no budget."""
    check_choice(name, GUIDANCES, "guidance")
    if name == "none":
        return None
    if name == "cfg":
        return CFG(scale, interval)
    low_budget = AutoGuidance if name == "ag" else CheapCFG
    return low_budget(scale, budget, interval)
