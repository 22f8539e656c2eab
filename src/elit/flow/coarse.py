"""A run that begins on a coarser grid: its levels, its noise, and the change to the fine grid.

Mean-pooling x = (1 - sigma) data + sigma noise by a factor f leaves pooled data, and noise of
deviation 1 / f. Divided by (1 - sigma) + sigma / f that is a sample of pooled data at the level
`coarse_sigma(sigma, f)`, which a model of the coarse grid takes.
"""

import torch.nn.functional as F
from torch import Tensor

from elit._numbers import is_whole


def coarse_sigma(sigma: float, factor: int = 2) -> float:
    """Level on a grid that is coarser by a factor along each axis, of a level on the fine one."""
    return sigma / (sigma + factor * (1 - sigma))


def coarse_noise(noise: Tensor, factor: int = 2) -> Tensor:
    """White noise (..., h / factor, w / factor) that fine noise (..., h, w) has in it."""
    if not is_whole(factor) or any(n % factor for n in noise.shape[-2:]):
        raise ValueError(
            f"noise of {tuple(noise.shape[-2:])} has no grid coarser by {factor!r:.20}; give a "
            f"whole number that divides both sizes"
        )
    return factor * _pooled(noise, factor)


def refine(samples: Tensor, clean: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """Samples on the fine grid, at the level sigma there, of ones at `coarse_sigma(sigma)`.

    The mean of each cell of the fine grid stays what the coarse sample says. What a cell has beside
    its mean is that of the predicted data, bilinearly upsampled, and of noise: exact where the data
    are as smooth as that.

    Args:
        samples: (..., h / f, w / f), at the coarse level.
        clean: the data predicted of them.
        sigma: of the fine grid.
        noise: (..., h, w); of cells' means nothing is used.
    """
    factor = noise.shape[-1] // samples.shape[-1]
    if tuple(n * factor for n in samples.shape[-2:]) != tuple(noise.shape[-2:]):
        raise ValueError(
            f"samples of {tuple(samples.shape[-2:])} cannot be refined to noise of "
            f"{tuple(noise.shape[-2:])}; give noise of a whole multiple of their size"
        )
    fine = (1 - sigma) * _upsampled(clean, factor, "bilinear") + sigma * noise
    means = ((1 - sigma) + sigma / factor) * samples - _pooled(fine, factor)
    return fine + _upsampled(means, factor, "nearest")


def _pooled(x: Tensor, factor: int) -> Tensor:
    planes = F.avg_pool2d(x.flatten(0, -3)[:, None], factor)  # (N, 1, h / f, w / f)
    return planes.view(*x.shape[:-2], *planes.shape[-2:])


def _upsampled(x: Tensor, factor: int, mode: str) -> Tensor:
    planes = F.interpolate(x.flatten(0, -3)[:, None], scale_factor=factor, mode=mode)
    return planes.view(*x.shape[:-2], *planes.shape[-2:])  # (..., f h, f w)
