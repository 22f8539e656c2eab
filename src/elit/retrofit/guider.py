"""Guidance of diffusers' modular pipelines, with a budget for each branch."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance  # diffusers looks it up here on loading
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from elit.flow.guidance import Guidance
from elit.interface.budget import read_budget
from elit.retrofit.elastic import ElasticTransformer

TRAINING_STEPS = 1000  # a scheduler's timestep at pure noise


class ElasticGuidance(BaseGuidance):
    """CFG, autoguidance and cheap CFG by budget: v = v_guide + scale * (v - v_guide).

    A component of a modular pipeline: `pipe.update_components(guider=ElasticGuidance(4.0,
    guide_budget=0.25))`. Both branches get a cache context of their own, so that step caches
    work. Without any budget it guides models that are not elastic too.

    Args:
        scale: strength; 1 is no guidance, and then no guide is computed.
        drop_condition: whether the guide gets the negative prompt: with True and a guide budget
            it is cheap CFG, with True alone CFG, with False autoguidance.
        budget: of the guided branch, in (0, 1]; None leaves what `set_budget` of the model says.
        guide_budget: of the guide; None stands for `budget`, "lowest" for the fewest of training.
        start: fraction of the steps after which guidance begins.
        stop: fraction of the steps after which it ends.
        interval: noise levels [low, high] in which it acts, ends included; 1 is pure noise. Both
            conditions hold: the steps and the levels.
        enabled: whether it guides at all.

    Raises:
        ValueError: if an argument is out of its range, or nothing would tell the guide from what
            it guides.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        scale: float = 4.0,
        drop_condition: bool = True,
        budget: float | None = None,
        guide_budget: float | Literal["lowest"] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        interval: Sequence[float] = (0.0, 1.0),
        enabled: bool = True,
    ):
        if len(interval) != 2:
            raise ValueError(f"interval {interval!r} is not allowed; give two noise levels")
        if budget is not None:
            read_budget(budget)
        if not drop_condition and guide_budget == budget and budget is not None:
            raise ValueError(
                f"a guide with the same condition and the same budget {budget} guides nothing; "
                f"give a lower guide_budget, or drop_condition=True"
            )
        low, high = interval
        self.guidance = Guidance(scale, drop_condition, guide_budget, (low, high))
        super().__init__(start, stop, enabled)
        # diffusers forgets arguments given by position when it copies: it takes them for defaults.
        self.register_to_config(_use_default_values=[])
        self.scale, self.drop_condition = scale, drop_condition
        self.budget, self.guide_budget = budget, guide_budget
        self._branch = ExitStack()

    @property
    def is_active(self) -> bool:
        """Whether this step needs a guide."""
        if not self._enabled:
            return False
        if self._num_inference_steps is not None:
            first, end = (int(at * self._num_inference_steps) for at in (self._start, self._stop))
            if not first <= self._step < end:
                return False
        return self.guidance.is_active(self._noise_level())

    def _noise_level(self) -> float:
        if self._timestep is None or self.guidance.interval == (0, 1):
            return self.guidance.interval[0]  # in it: it spares waiting for the device
        return float(torch.as_tensor(self._timestep).flatten()[0]) / TRAINING_STEPS

    @property
    def num_conditions(self) -> int:
        """Calls of the model in this step."""
        return 2 if self.is_active else 1

    @property
    def is_conditional(self) -> bool:
        """Whether the call that runs has the condition."""
        return self._count_prepared == 1 or not self.drop_condition

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin a step."""
        self._branch.close()  # of a call that failed
        super().set_state(step, num_inference_steps, timestep)

    def prepare_models(self, denoiser: Any) -> None:
        """Give the model the budget of the branch that comes now."""
        self._branch.close()
        super().prepare_models(denoiser)
        is_guide = self._count_prepared == 2
        budget: Any = self.budget
        if is_guide and isinstance(self.guide_budget, str):
            model = _elastic(denoiser)
            budget = model.budget_of(model.min_latents)
        elif is_guide and self.guide_budget is not None:
            budget = self.guide_budget
        # Without the lock: a call that fails would leave it to a thread that may be gone.
        if budget is not None:
            self._branch.enter_context(_elastic(denoiser)._at_budget(budget))
        if hasattr(denoiser, "cache_context"):
            named = getattr(denoiser, "_named", denoiser.cache_context)
            self._branch.enter_context(named("uncond" if is_guide else "cond"))

    def cleanup_models(self, denoiser: Any) -> None:
        """Give the model its own budget back."""
        super().cleanup_models(denoiser)
        self._branch.close()

    def prepare_inputs(self, data: Mapping[str, Any]) -> list[Any]:
        """The inputs of each branch, of (positive, negative) pairs by name."""
        return [self._prepare_batch(data, *branch) for branch in self._branches()]

    def prepare_inputs_from_block_state(
        self, data: Any, input_fields: Mapping[str, str | tuple[str, str]]
    ) -> list[Any]:
        """The same of names of the state's fields."""
        make = partial(self._prepare_batch_from_block_state, input_fields, data)
        return [make(*branch) for branch in self._branches()]

    def _branches(self) -> list[tuple[int, str]]:
        """Index in a pair that each branch gets, and the name of its prediction."""
        guide = 1 if self.drop_condition else 0
        return [(0, "pred_cond"), (guide, "pred_uncond")][: self.num_conditions]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided prediction of what the branches predicted, (B, ...) each."""
        pred = pred_cond
        if pred_uncond is not None:
            pred = torch.lerp(pred_uncond.float(), pred_cond.float(), self.scale).to(pred.dtype)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


def _elastic(denoiser: Any) -> Any:
    """The model, or an error if it has no budget."""
    model = getattr(denoiser, "_orig_mod", denoiser)  # torch.compile wraps it
    if not isinstance(model, ElasticTransformer):
        raise ValueError(
            f"ElasticGuidance got a budget on a model that isn't elastic: "
            f"{type(model).__name__}; elasticize it, or leave out budget and guide_budget"
        )
    return model
