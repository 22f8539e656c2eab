"""The training objective of rectified flow."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from elit.flow.shift import Shift, check_shift, shift_at, shifted

_MOST = 100  # of a sample's values: beyond it they are bytes, or were never scaled


@dataclass(frozen=True)
class SigmaDensity:
    """Density of the noise levels that training draws.

    Attributes:
        name: "logit_normal", sigmoid of a normal variable (paper), or "uniform".
        mean: mean of the logit; above 0 leans towards noise.
        std: standard deviation of the logit.
        shift: of the levels drawn, 1 for none.
        steps: of a sampler whose levels alone are drawn; None draws any.
    """

    name: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: Shift = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.name not in ("logit_normal", "uniform"):
            raise ValueError(f"density {self.name!r} is unknown; use 'logit_normal' or 'uniform'")
        if self.name == "uniform" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError(
                f"mean {self.mean} and std {self.std} have no effect on a uniform density; "
                f"leave them out, or use 'logit_normal'"
            )
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(
                f"logit of mean {self.mean} and std {self.std} is not allowed; "
                f"the mean is finite and the std is positive, 0 and 1 are usual"
            )
        check_shift(self.shift)

    def sample(
        self, count: int, generator: torch.Generator, shape: Sequence[int] | None = None
    ) -> Tensor:
        """Draw noise levels (count,) in [0, 1] on the generator's device.

        Args:
            count: of the levels.
            generator: to draw with.
            shape: of one of the samples that they are for; a shift by "dimension" needs it.
        """
        from diffusers.training_utils import compute_density_for_timestep_sampling

        drawn = compute_density_for_timestep_sampling(
            self.name, count, self.mean, self.std, device=generator.device, generator=generator
        )
        if self.steps is not None:
            drawn = ((drawn * self.steps).floor() + 1).clamp(max=self.steps) / self.steps
        return self.shifted(drawn, shape)

    def shifted(self, sigma: Tensor, shape: Sequence[int] | None) -> Tensor:
        """Noise levels that were drawn without a shift, shifted for samples of a shape."""
        return shifted(sigma, shift_at(self.shift, None if shape is None else math.prod(shape)))


def interpolate(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Point at noise level sigma (B,) on the straight line from data to noise (B, ...)."""
    return torch.lerp(data, noise, sigma.view(-1, *(1,) * (data.ndim - 1)))


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """What the model learns: the line's derivative by sigma."""
    return noise - data


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor],
    data: Tensor,
    noise: Tensor,
    sigma: Tensor,
    target: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Squared error of the velocity, per sample.

    Args:
        velocity: maps noisy samples (B, ...) and sigma (B,) to velocities (B, ...).
        data: (B, ...)
        noise: (B, ...), standard normal.
        sigma: (B,) in [0, 1].
        target: maps likewise to what is right; by default that is noise - data.

    Returns:
        (B,) float32, means over everything but the batch.
    """
    _check_values(data)
    x = interpolate(data, noise, sigma)
    right = velocity_target(data, noise) if target is None else target(x, sigma)
    error = velocity(x, sigma).float() - right.float()
    return error.square().flatten(1).mean(1)


def _check_values(data: Tensor) -> None:
    """Raise a ValueError for bytes as floats and the like, where looking makes no device wait."""
    if data.device.type != "cpu" or torch.compiler.is_compiling() or not data.numel():
        return
    most = data.detach().abs().max().item()
    if most > _MOST:
        raise ValueError(
            f"data of up to {most:g}; it is meant to be of about -1 to 1: x / 127.5 - 1 of images "
            f"of 0..255, and VAE latents by the autoencoder's scaling_factor"
        )
