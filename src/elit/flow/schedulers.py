"""Flow-matching schedulers by name, and the three that diffusers lacks.

A scheduler's `timesteps` are 1000 sigma, as diffusers has them; `sigmas` has one entry more, the
level that each step starts from and, last, 0. Ours step in the precision of the samples, over
levels that are not rounded to float32.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from elit._choices import check_choice
from elit._config import leave_out_defaults
from elit._devices import wide
from elit._numbers import is_whole
from elit.flow.sampling import Generators, levels_of
from elit.flow.sampling import sample as run_sampler
from elit.flow.shift import DIMENSION, Shift, check_shift, shift_at, shifted
from elit.flow.words import SAMPLERS


def _grid(
    num_inference_steps: int, sigmas: Sequence[float] | None, last: float = 0.0
) -> list[float]:
    """Noise levels from 1 to `last` in equal steps, or those given, and then 0."""
    if sigmas is not None:
        grid = np.asarray(sigmas, dtype=float).tolist()
    else:
        _check_steps(num_inference_steps)
        steps = num_inference_steps if last == 0 else num_inference_steps - 1
        grid = [1 + (last - 1) * i / max(steps, 1) for i in range(steps + 1)]
    return grid if grid[-1] == 0 else [*grid, 0.0]


class FlowMatchUniformEulerScheduler(SchedulerMixin, ConfigMixin):
    """Euler's method on a uniform grid, as diffusers' but for rounding: see `any_dtype`.

    Its steps are counted, not looked up by their timestep. Like diffusers' it shifts its levels by
    `shift`, or with `use_dynamic_shifting` by exp(mu).
    """

    order = 1
    any_dtype = True  # keeps the samples' precision; diffusers' Euler rounds them to float32
    last_sigma = 0.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
    ):
        self._begin(num_train_timesteps, shift, use_dynamic_shifting)

    def _begin(self, num_train_timesteps: int, shift: float, is_dynamic: bool) -> None:
        self.shift, self.is_dynamic = shift, is_dynamic
        leave_out_defaults(self, shift=1.0, use_dynamic_shifting=False)
        self.set_timesteps(num_train_timesteps, mu=0.0)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a run of `num_inference_steps` steps, or along the levels `sigmas`, shifted."""
        if self.is_dynamic and mu is None:
            raise ValueError("this scheduler shifts its levels by exp(mu): give mu")
        shift = math.exp(mu) if self.is_dynamic and mu is not None else self.shift
        grid = _grid(num_inference_steps, sigmas, self.last_sigma)
        self.levels = self._visited([shifted(level, shift) for level in grid])
        self.sigmas = torch.tensor(self.levels)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self._index = 0

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """A step to the next level; one that adds noise draws it from the generators."""
        del timestep  # steps are counted
        at, to = self.levels[self._index : self._index + 2]
        self._index += 1
        result = self._advanced(sample, model_output, at, to, generator)
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _visited(self, grid: list[float]) -> list[float]:
        """The level of each call of the model, and 0."""
        return grid

    def _advanced(
        self, sample: Tensor, velocity: Tensor, at: float, to: float, generator: Generators
    ) -> Tensor:
        """A sample at the level `to`, of one at the level `at`."""
        del generator
        return sample + (to - at) * velocity


class FlowMatchUniformHeunScheduler(FlowMatchUniformEulerScheduler):
    """Heun's second-order method on a uniform grid; the last step, to sigma 0, is an Euler step.

    N steps call the model 2N - 1 times. diffusers' Heun takes no grid and ends at sigma 0.001.
    """

    order = 2

    def _visited(self, grid: list[float]) -> list[float]:
        self._predictor: tuple[Tensor, Tensor, float] | None = None
        # Each level but the first and the last is visited twice: predicted, then corrected.
        twice = [level for level in grid[1:-1] for _ in range(2)]
        return [grid[0], *twice, grid[-1]]

    def _advanced(
        self, sample: Tensor, velocity: Tensor, at: float, to: float, generator: Generators
    ) -> Tensor:
        if self._predictor is not None:
            start, first, length = self._predictor
            self._predictor = None
            return start + length * (first + velocity) / 2
        if to > 0:
            self._predictor = (sample, velocity, to - at)
        return super()._advanced(sample, velocity, at, to, generator)


MOST_STEPS = 10_000
PATHS = ("linear", "cosine")


class FlowMatchEulerMaruyamaScheduler(FlowMatchUniformEulerScheduler):
    """Euler-Maruyama on the reverse SDE with diffusion 2 sigma.

    The drift is v - sigma * score. On the straight path the score is -((1 - sigma) v + x) / sigma,
    so that the drift is (2 - sigma) v + x. The last step, from `last_sigma` to 0, adds no noise.

    Args:
        num_train_timesteps: of diffusers' convention.
        last_sigma: level of the last call of the model.
        path: the path that the model learned: "linear", x = (1 - sigma) data + sigma noise, or
            "cosine", x = cos(a) data + sin(a) noise with a = pi sigma / 2. On that the score is
            -(2 / pi) cot(a) v - x.
        shift, use_dynamic_shifting: of the levels, `last_sigma` included.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        last_sigma: float = 0.04,
        path: str = "linear",
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
    ):
        check_choice(path, PATHS, "path")
        self.last_sigma, self.path = last_sigma, path
        self._begin(num_train_timesteps, shift, use_dynamic_shifting)

    def _advanced(
        self, sample: Tensor, velocity: Tensor, at: float, to: float, generator: Generators
    ) -> Tensor:
        if self.path == "linear":
            drift = (2 - at) * velocity + sample
        else:
            angle = math.pi * at / 2
            drift = (1 + 2 * at / (math.pi * math.tan(angle))) * velocity + at * sample
        result = sample + (to - at) * drift
        if to > 0:
            result = result + math.sqrt(2 * at * (at - to)) * _noise_like(sample, generator)
        return result


def _noise_like(sample: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise, in float32 the rounded numbers of float64.

    torch draws other numbers for another type; so, one seed is one path in both.
    """
    given = generator if isinstance(generator, Sequence) else [generator]
    if any(one is not None and one.device.type == "mps" for one in given):  # it has no float64
        return randn_tensor(sample.shape, generator, sample.device, sample.dtype)
    noise = randn_tensor(sample.shape, generator, **wide(sample.device))
    return noise.to(sample.dtype).to(sample.device)


def make_scheduler(sampler: str, shift: Shift = 1.0) -> SchedulerMixin:
    """Scheduler of a sampler's name, one of SAMPLERS, that shifts its levels."""
    check_choice(sampler, SAMPLERS, "sampler")
    check_shift(shift)
    scheduler = _unshifted(sampler)
    return scheduler if shift == 1 else with_shift(scheduler, shift)


def _unshifted(sampler: str) -> SchedulerMixin:
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


SHIFTED_BY = "_shifted_by"  # in a scheduler's config: what its mu follows from, if no line does


def with_shift(scheduler: SchedulerMixin, shift: Shift) -> SchedulerMixin:
    """A scheduler of the same settings but for its shift."""
    check_shift(shift)
    known = inspect.signature(type(scheduler)).parameters
    number = "shift" if "shift" in known else "flow_shift"
    if not {number, "use_dynamic_shifting"} <= known.keys():
        raise ValueError(
            f"a {type(scheduler).__name__} takes no shift; use make_scheduler with one of "
            f"{', '.join(SAMPLERS)}"
        )
    other = number, "time_shift_type"
    kept = {k: x for k, x in scheduler.config.items() if k[0] != "_" and k not in other}
    kept["use_dynamic_shifting"] = shift == DIMENSION
    kept[SHIFTED_BY if shift == DIMENSION else number] = shift
    return type(scheduler).from_config(kept)


def shift_of(scheduler: SchedulerMixin) -> Shift:
    """The shift that a scheduler was made with, or a ValueError if that is a line of tokens."""
    config = scheduler.config
    if config.get("use_dynamic_shifting") and not config.get(SHIFTED_BY):
        raise ValueError(
            f"this {type(scheduler).__name__} shifts its levels on a line through two numbers of "
            f"tokens, which no other sampler can; give a shift beside the sampler, or save the "
            f"pipeline with a scheduler of make_scheduler"
        )
    return config.get(SHIFTED_BY) or config.get("shift", config.get("flow_shift", 1.0))


def start_sampling(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    device: torch.device | str,
    sigmas: Sequence[float] | None = None,
    num_tokens: int | None = None,
    dimension: int | None = None,
) -> list[float]:
    """Set the steps of a run and give the noise level of each call of the model.

    Args:
        scheduler: one of ours, or one of diffusers that is right on a flow whose end is known.
        num_inference_steps: steps, of no effect beside `sigmas`.
        device: of the samples.
        sigmas: noise levels, before any shift of the scheduler's.
        num_tokens: of one sample, for a scheduler that shifts its levels by them.
        dimension: numbers of one sample, channels times places, likewise.
    """
    _check_steps(num_inference_steps)
    levels = None if sigmas is None else _check_sigmas(sigmas)
    mu = _mu(scheduler.config, num_tokens, dimension)
    if isinstance(scheduler, FlowMatchUniformEulerScheduler):
        steps = num_inference_steps if levels is None else len(levels)
        scheduler.set_timesteps(steps, device=device, sigmas=levels, mu=mu)
        return levels_of(scheduler)
    _check_scheduler(scheduler, num_inference_steps, mu)
    return _set_levels(scheduler, num_inference_steps, device, levels, mu)


def _set_levels(
    scheduler: SchedulerMixin,
    steps: int,
    device: torch.device | str,
    sigmas: np.ndarray | None,
    mu: float | None,
) -> list[float]:
    """Set the steps of a scheduler of diffusers, as its pipelines do, and give their levels."""
    config = scheduler.config
    settings: dict[str, Any] = {}
    if sigmas is not None:
        if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(
                f"{type(scheduler).__name__} takes no sigmas; use euler, heun, euler-maruyama or "
                f"unipc"
            )
        steps, settings = len(sigmas), {"sigmas": sigmas.astype(np.float32)}
    elif isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        # Its own grid would end at sigma 0.001.
        settings = {"sigmas": np.asarray(_grid(steps, None)[:-1], dtype=np.float32)}
    if mu is not None:
        settings["mu"] = mu
    terminal = config.get("shift_terminal")
    if terminal and steps == 1:  # there is nothing to stretch until the last level is there
        scheduler.register_to_config(shift_terminal=None)
    try:
        scheduler.set_timesteps(steps, device=device, **settings)
    finally:
        if terminal:
            scheduler.register_to_config(shift_terminal=terminal)
    return levels_of(scheduler)


def _mu(config: Mapping[str, Any], num_tokens: int | None, dimension: int | None) -> float | None:
    """Logarithm of a shift that depends on a sample's size, or None: by its numbers, or on a line
    through two points by its tokens, as Flux and LTX have it.
    """
    if not config.get("use_dynamic_shifting"):
        return None
    if rule := config.get(SHIFTED_BY):
        return math.log(shift_at(rule, dimension))
    if num_tokens is None:
        raise ValueError(
            "this scheduler shifts its levels by the number of tokens: give num_tokens"
        )
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (num_tokens - first) / (last - first)


_SOUND: set[tuple[Any, ...]] = set()  # schedulers that were tried, by class, settings and steps


def _check_scheduler(scheduler: SchedulerMixin, steps: int, mu: float | None) -> None:
    """Raise a ValueError unless a scheduler of diffusers turns noise into data along a flow."""
    name, config = type(scheduler).__name__, scheduler.config
    tried = type(scheduler), repr(sorted(config.items())), steps, mu
    if tried in _SOUND:  # a trial takes as long as some calls of a small model
        return
    advice = f"use make_scheduler with one of {', '.join(SAMPLERS)}"
    if not (name.startswith("FlowMatch") or config.get("use_flow_sigmas")):
        raise ValueError(f"{name} is not a flow-matching scheduler; {advice}")
    for count in {steps, 20}:
        try:
            with torch.device("cpu"):
                error, allowed = _trial(scheduler, count, mu)
        except Exception as reason:
            raise ValueError(f"{name} fails at {count} steps ({reason}); {advice}") from reason
        if not error <= allowed:  # nor NaN
            defaults = inspect.signature(type(scheduler)).parameters
            own = [
                f"{key}={value!r}"
                for key, value in config.items()
                if key in defaults and value != defaults[key].default
            ]
            raise ValueError(
                f"{name}({', '.join(own)}) is off by {error:.2g} at {count} steps of a flow whose "
                f"end is known, where {allowed:.2g} is allowed; {advice}"
            )
    _SOUND.add(tried)


def _trial(scheduler: SchedulerMixin, steps: int, mu: float | None) -> tuple[float, float]:
    """Error of a scheduler on Gaussian data of known velocity, and the most that it may be.

    Data in one point, which any method reaches, and data of mean 1.5 and deviation 0.5, whose
    moments may be off as much as after Euler's method on the same levels.
    """
    scheduler = type(scheduler).from_config(scheduler.config)
    levels = _set_levels(scheduler, steps, "cpu", None, mu)
    std = torch.tensor([0.0, 0.5]).view(2, 1, 1, 1)
    even = torch.special.ndtri((torch.arange(2048) + 0.5) / 2048)
    noise = even.view(1, 1, -1, 1).expand(2, -1, -1, -1)

    def velocity(x: Tensor, sigma: float, *_: Any) -> Tensor:
        gain = (sigma - (1 - sigma) * std**2) / ((1 - sigma) ** 2 * std**2 + sigma**2)
        return gain * (x - (1 - sigma) * 1.5) - 1.5

    def error(x: Tensor) -> float:
        off = x[0] - 1.5, x[1].mean() - 1.5, x[1].std() - 0.5
        return max(one.abs().max().item() for one in off)

    def run(scheduler: SchedulerMixin) -> Tensor:
        return run_sampler(velocity, noise, scheduler, generator=torch.Generator().manual_seed(0))

    by_euler = FlowMatchUniformEulerScheduler()
    by_euler.set_timesteps(len(levels), sigmas=levels)
    result = run(scheduler)
    if not result[0].sub(1.5).abs().max() <= 1e-3:
        return error(result), 1e-3
    return error(result), 1.2 * error(run(by_euler)) + 0.03


def _check_steps(num_inference_steps: int) -> None:
    if not is_whole(num_inference_steps, 1, MOST_STEPS):
        raise ValueError(
            f"num_inference_steps {num_inference_steps!r} is not allowed; "
            f"give a whole number from 1 to {MOST_STEPS}; 40 is usual"
        )


def _check_sigmas(sigmas: Sequence[float]) -> np.ndarray:
    try:
        levels = np.asarray(sigmas, dtype=float)
    except (TypeError, ValueError, RuntimeError):
        levels = np.empty(0)
    falling = levels.ndim == 1 and len(levels) > 0 and bool((np.diff(levels) < 0).all())
    if not (falling and levels[0] <= 1 and levels[-1] > 0 and len(levels) <= MOST_STEPS):
        raise ValueError(
            f"sigmas {sigmas!s:.60} are not allowed; they must fall from at most 1 to above 0, "
            f"such as [1, 0.75, 0.5, 0.25]"
        )
    return levels
