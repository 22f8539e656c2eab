"""Flow-matching schedulers by name, and the three that diffusers lacks.

A scheduler's `timesteps` are 1000 sigma, as diffusers has them; `sigmas` has one entry more, the
level that each step starts from and, last, 0. Ours step in the precision of the samples, over
levels that are not rounded to float32.
"""

import inspect
import math
from typing import TYPE_CHECKING

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from elit._choices import check_choice
from elit._numbers import is_whole
from elit._wide import wide

if TYPE_CHECKING:
    from collections.abc import Sequence


def _grid(
    num_inference_steps: int, sigmas: "Sequence[float] | None", last: float = 0.0
) -> list[float]:
    """Noise levels from 1 to `last` in equal steps, or those given, and then 0."""
    if sigmas is not None:
        grid = np.asarray(sigmas, dtype=float).tolist()
    else:
        _check_steps(num_inference_steps)
        steps = num_inference_steps if last == 0 else num_inference_steps - 1
        grid = [1 + (last - 1) * i / max(steps, 1) for i in range(steps + 1)]
    return grid if grid[-1] == 0 else [*grid, 0.0]


class _CountedSteps(SchedulerMixin, ConfigMixin):
    """A run over a list of levels, whose steps are counted, not looked up by their timestep."""

    any_dtype = True  # keeps the samples' precision; diffusers' Euler rounds them to float32

    def _begin(self, levels: list[float], device: torch.device | str | None) -> None:
        self.sigmas = torch.tensor(levels)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self.levels = levels
        self._index = 0

    def _next(self) -> tuple[float, float]:
        """The level that a step starts from and the one that it leads to."""
        self._index += 1
        return self.levels[self._index - 1], self.levels[self._index]


class FlowMatchUniformEulerScheduler(_CountedSteps):
    """Euler's method on a uniform grid, as diffusers' but for rounding: see `any_dtype`."""

    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000):
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        sigmas: "Sequence[float] | None" = None,
    ) -> None:
        """Begin a run of `num_inference_steps` steps, or along the levels `sigmas`."""
        self._begin(_grid(num_inference_steps, sigmas), device)

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """A step to the next level."""
        del timestep  # steps are counted
        sigma, sigma_next = self._next()
        result = sample + (sigma_next - sigma) * model_output
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)


class FlowMatchUniformHeunScheduler(_CountedSteps):
    """Heun's second-order method on a uniform grid; the last step, to sigma 0, is an Euler step.

    N steps call the model 2N - 1 times. diffusers' Heun takes no grid and ends at sigma 0.001.
    """

    order = 2

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000):
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        sigmas: "Sequence[float] | None" = None,
    ) -> None:
        """Begin a run of `num_inference_steps` steps, or along the levels `sigmas`."""
        grid = _grid(num_inference_steps, sigmas)
        # Each level but the first and the last is visited twice: predicted, then corrected.
        twice = [level for level in grid[1:-1] for _ in range(2)]
        self._begin([grid[0], *twice, grid[-1]], device)
        self._predictor: tuple[Tensor, Tensor, float] | None = None

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """An Euler step to the next level, or the correction of the one before."""
        del timestep  # steps are counted
        sigma, sigma_next = self._next()
        if self._predictor is None:
            result = sample + (sigma_next - sigma) * model_output
            if sigma_next > 0:
                self._predictor = (sample, model_output, sigma_next - sigma)
        else:
            start, velocity, length = self._predictor
            result = start + length * (velocity + model_output) / 2
            self._predictor = None
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)


PATHS = ("linear", "cosine")


def _noise_like(
    sample: Tensor, generator: torch.Generator | list[torch.Generator] | None
) -> Tensor:
    """Standard normal noise, in float32 the rounded numbers of float64.

    torch draws other numbers for another type; so, one seed is one path in both.
    """
    given = generator if isinstance(generator, list) else [generator]
    if any(one is not None and one.device.type == "mps" for one in given):  # it has no float64
        return randn_tensor(sample.shape, generator, sample.device, sample.dtype)
    noise = randn_tensor(sample.shape, generator, **wide(sample.device))
    return noise.to(sample.dtype).to(sample.device)


class FlowMatchEulerMaruyamaScheduler(_CountedSteps):
    """Euler-Maruyama on the reverse SDE with diffusion 2 sigma.

    The drift is v - sigma * score. On the straight path the score is -((1 - sigma) v + x) / sigma,
    so that the drift is (2 - sigma) v + x. The last step, from `last_sigma` to 0, adds no noise.

    Args:
        num_train_timesteps: of diffusers' convention.
        last_sigma: level of the last call of the model.
        path: the path that the model learned: "linear", x = (1 - sigma) data + sigma noise, or
            "cosine", x = cos(a) data + sin(a) noise with a = pi sigma / 2. On that the score is
            -(2 / pi) cot(a) v - x.
    """

    order = 1

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, last_sigma: float = 0.04, path: str = "linear"
    ):
        check_choice(path, PATHS, "path")
        self.last_sigma, self.path = last_sigma, path
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        sigmas: "Sequence[float] | None" = None,
    ) -> None:
        """Begin a run of `num_inference_steps` steps, or along the levels `sigmas`."""
        self._begin(_grid(num_inference_steps, sigmas, last=self.last_sigma), device)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step, with noise from the generators: one for each sample, or one for all."""
        del timestep  # steps are counted
        sigma, sigma_next = self._next()
        result = sample + (sigma_next - sigma) * self._drift(model_output, sample, sigma)
        if sigma_next > 0:
            noise = _noise_like(sample, generator)
            result = result + math.sqrt(2 * sigma * (sigma - sigma_next)) * noise
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _drift(self, velocity: Tensor, sample: Tensor, sigma: float) -> Tensor:
        if self.path == "linear":
            return (2 - sigma) * velocity + sample
        angle = math.pi * sigma / 2
        return (1 + 2 * sigma / (math.pi * math.tan(angle))) * velocity + sigma * sample


SAMPLERS = ("euler", "heun", "euler-maruyama", "unipc", "dpm-solver")


def make_scheduler(sampler: str) -> SchedulerMixin:
    """Scheduler of a sampler's name, one of SAMPLERS, on a flow without time shift."""
    check_choice(sampler, SAMPLERS, "sampler")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    match sampler:
        case "euler":
            return diffusers.FlowMatchEulerDiscreteScheduler()
        case "heun":
            return FlowMatchUniformHeunScheduler()
        case "euler-maruyama":
            return FlowMatchEulerMaruyamaScheduler()
        case "unipc":
            return diffusers.UniPCMultistepScheduler(**flow)
    return diffusers.DPMSolverMultistepScheduler(**flow)


def start_sampling(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    device: torch.device | str,
    sigmas: "Sequence[float] | None" = None,
) -> list[float]:
    """Set the steps of a run and give the noise level of each call of the model.

    diffusers' Euler scheduler would end at sigma 0.001; here it gets the uniform grid, 1 to 0.
    The levels are read from `sigmas`, not from `timesteps`, which some schedulers round; ours give
    them as they are, not rounded to float32.
    """
    name = type(scheduler).__name__
    if not (name.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas")):
        raise ValueError(
            f"{name} is not a flow-matching scheduler; "
            f"use make_scheduler with one of {', '.join(SAMPLERS)}"
        )
    if sigmas is not None:
        levels = _check_sigmas(sigmas)
        if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{name} takes no sigmas; use euler, heun, euler-maruyama or unipc")
        given = levels if isinstance(scheduler, _CountedSteps) else levels.astype(np.float32)
        scheduler.set_timesteps(len(levels), device=device, sigmas=given)
    elif isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        grid = np.asarray(_grid(num_inference_steps, None)[:-1], dtype=np.float32)
        scheduler.set_timesteps(num_inference_steps, device=device, sigmas=grid)
    else:
        _check_steps(num_inference_steps)
        scheduler.set_timesteps(num_inference_steps, device=device)
    if isinstance(scheduler, _CountedSteps):
        return scheduler.levels[:-1]
    return scheduler.sigmas.tolist()[: len(scheduler.timesteps)]


def _check_steps(num_inference_steps: int) -> None:
    if not is_whole(num_inference_steps):
        raise ValueError(
            f"num_inference_steps {num_inference_steps!r} is not allowed; "
            f"give a whole number, at least 1; 40 is usual"
        )


def _check_sigmas(sigmas: "Sequence[float]") -> np.ndarray:
    levels = np.asarray(sigmas, dtype=float)
    falling = levels.ndim == 1 and len(levels) > 0 and bool((np.diff(levels) < 0).all())
    if not (falling and levels[0] <= 1 and levels[-1] > 0):
        raise ValueError(
            f"sigmas {sigmas} are not allowed; they must fall from at most 1 to above 0, "
            f"such as [1, 0.75, 0.5, 0.25]"
        )
    return levels
