"""What a run learns that is to draw in few steps: a trained model's mean velocity over each."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from elit.flow.guidance import at_least_float32
from elit.flow.shift import Shift, shift_at, shifted
from elit.models.base import FEW_STEPS, LEARNED_GUIDANCE
from elit.pipelines.load import load_pipeline
from elit.training.config import FewStepsConfig, TrainConfig
from elit.training.config_files import config_of_run

SUBSTEPS = 2  # of Heun's method, within each of the few


class FewSteps:
    """A teacher at full budget, guided, over the sampler's steps (progressive distillation,
    Salimans & Ho, 2022, in one stage and with the guidance of Meng et al., 2023).

    Args:
        teacher: velocities of it are averaged.
        steps: Euler steps of the student.
        guidance_scale: of classifier-free guidance; 1 is none.
        shift: of the sampler's levels.
    """

    def __init__(self, teacher: Any, steps: int, guidance_scale: float, shift: Shift):
        self.teacher, self.steps, self.scale, self.shift = teacher, steps, guidance_scale, shift

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        """Mean velocities (B, ...) from noise levels (B,) of the sampler to the next ones."""
        shift = shift_at(self.shift, math.prod(x.shape[1:]))
        even, length = shifted(sigma, 1 / shift), 1 / (self.steps * SUBSTEPS)
        levels = [shifted((even - i * length).clamp(min=0), shift) for i in range(SUBSTEPS + 1)]
        levels[-1] = levels[-1].where(even > 1.5 / self.steps, 0)  # the last step's end, exactly
        end = x
        for at, to in pairwise(levels):
            step = (to - at).view(-1, *(1,) * (x.ndim - 1))
            first = self._guided(end, at, class_labels)
            predicted = end + step * first
            corrected = end + step * (first + self._guided(predicted, to, class_labels)) / 2
            end = corrected.where(to.view_as(step) > 0, predicted)
        return (end - x) / (levels[-1] - sigma).view(-1, *(1,) * (x.ndim - 1))

    def _guided(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        if self.scale == 1:
            return at_least_float32(self.teacher(x, sigma, labels, return_dict=False)[0])
        null = torch.full_like(labels, self.teacher.config.num_classes)
        both = torch.cat((x, x)), torch.cat((sigma, sigma)), torch.cat((labels, null))
        velocities = at_least_float32(self.teacher(*both, return_dict=False)[0])
        predicted, guide = velocities.chunk(2)
        return torch.lerp(guide, predicted, self.scale)


def forwards(options: FewStepsConfig) -> int:
    """Forwards of the teacher for each sample."""
    return SUBSTEPS * 2 * (1 if options.guidance_scale == 1 else 2)


def start_from_base(model: Any, config: TrainConfig) -> Any:
    """Give a model the weights of `few_steps.base`, and return that one, the teacher."""
    options, base = config.few_steps, str(config.few_steps.base)
    if model.takes_text:
        raise ValueError(
            f"few_steps.base={base} asked of a model that draws texts; it is for those that draw "
            f"classes"
        )
    teacher = load_pipeline(base).transformer
    if teacher.config.get(FEW_STEPS):
        raise ValueError(f"few_steps.base={base} draws in few steps already; give what it is of")
    trained = config_of_run(base)
    if options.guidance_scale != 1 and trained and not trained.objective.label_dropout:
        raise ValueError(
            f"few_steps.guidance_scale={options.guidance_scale} is against a label for none, which "
            f"{base} has not learned, of objective.label_dropout=0; give 1"
        )
    there, here = (
        {key: x for key, x in one.config.items() if key[0] != "_"} for one in (teacher, model)
    )
    different = [
        f"{key} {there.get(key)} there, {here.get(key)} here"
        for key in there | here
        if there.get(key) != here.get(key)
    ]
    if type(teacher) is not type(model) or different:
        raise ValueError(
            f"few_steps.base={base} is of another model: a {type(teacher).__name__}"
            f"{''.join(f', {one}' for one in different[:3])}; train by its own config.yaml"
        )
    if model.device.type != "meta":  # as of a check, which needs no numbers
        model.load_state_dict(teacher.state_dict())
    model.register_to_config(**{FEW_STEPS: options.steps})
    if options.guidance_scale != 1:
        model.register_to_config(**{LEARNED_GUIDANCE: options.guidance_scale})
    return teacher.eval().requires_grad_(False)
