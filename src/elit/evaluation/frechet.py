"""Mean and covariance of features as they come, and the Frechet distance of two such pairs.

Everything is counted in float64, on the CPU where a device has none (Apple's MPS).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_ROWS = 1024  # of features that are widened at a time: 16 MiB at 2048
_ASYMMETRY = 1e-6  # of a covariance, of its largest entry: float32 rounds ten times finer
_NEGATIVE = 1e-5  # eigenvalue of a covariance, of its largest: what float32 leaves of a zero
_EPSILON = torch.finfo(torch.float64).eps


class Moments:
    """Count, mean and covariance of features, which needn't be there all at once.

    The order of updates changes the result by rounding alone.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Number of samples."""
        return self._count

    @property
    def width(self) -> int | None:
        """Numbers in a feature; None before the first."""
        return len(self._mean) or None

    @property
    def mean(self) -> Tensor:
        """Mean (d,) in float64; needs one sample."""
        if self._count == 0:
            raise ValueError("the mean of no samples: update these moments with features first")
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (d, d) in float64, over count - 1; needs two samples."""
        if self._count < 2:
            raise ValueError(
                f"a covariance needs at least 2 samples and there are {self._count}: "
                "update these moments with more features"
            )
        return (self._scatter + self._scatter.T) / (2 * (self._count - 1))

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Take in features (n, d) of any floating type and device; n may be 0."""
        check_features(features, "features", self.width)
        if self.width is None:
            device = wide_device(features)
            self._mean = torch.zeros(features.shape[1], dtype=torch.float64, device=device)
            self._scatter = torch.zeros_like(self._mean).diag()
        for part in features.split(_ROWS):
            if len(part):
                wide = part.to(self._mean.device).double()  # the device first: MPS has no float64
                mean = wide.mean(dim=0)
                self._add(len(part), mean, wide - mean)

    def _add(self, count: int, mean: Tensor, deviations: Tensor) -> None:
        """Chan, Golub and LeVeque (1979): the means' difference is one more row of deviations."""
        total = self._count + count
        shift = mean - self._mean
        row = shift * (self._count * count / total) ** 0.5
        rows = torch.cat([deviations, row[None]])  # (n + 1, d)
        self._scatter.addmm_(rows.T, rows)
        self._mean += shift * (count / total)
        self._count = total


@torch.no_grad()
def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Frechet distance of two normal distributions: what FID, sFID, FDD and FVD are.

    |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2), Heusel et al. (2017), equation 6, of means
    (d,) and symmetric covariances (d, d), which may be singular. With A = K K^T and B = L L^T the
    last trace is the sum of the singular values of K^T L: the error stays near 1e-15 (tr A + tr B),
    where scipy.linalg.sqrtm loses half of the digits. It takes seconds at 2048.
    """
    shift, traces, left, right = _compared(mean_a, cov_a, mean_b, cov_b)
    overlap = torch.linalg.svdvals(left.T @ right).sum()
    return max(0.0, (shift.square().sum() - 2 * overlap + traces).item())


@torch.no_grad()
def frechet_error(
    features: Iterable[Tensor], mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor
) -> float:
    """Standard error of the distance by the choice of a's samples, whose features (n, d) these are.

    The deviation over samples of what more weight of one, d beside the mean, would change:
    2 (mean_a - mean_b)^T d + d^T (1 - T) d (the infinitesimal jackknife). T = L V U^T K^-1 is the
    optimal transport from a to b, where K^T L = U S V^T. The bias of few samples is not in it. Of
    fewer samples than features it comes out up to 1.6 times too large.
    """
    shift, _, left, right = _compared(mean_a, cov_a, mean_b, cov_b)
    u, _, vh = torch.linalg.svd(left.T @ right, full_matrices=False)
    inverse = torch.linalg.solve(left.T @ left, left.T)
    slope = torch.eye(len(shift), dtype=shift.dtype, device=shift.device)
    slope -= right @ vh.T @ u.T @ inverse
    changes = []
    for part in features:
        for rows in part.split(_ROWS):
            beside = rows.to(shift.device).double() - mean_a.to(shift)
            changes.append(2 * beside @ shift + (beside @ slope * beside).sum(1))
    change = torch.cat(changes)
    return (change.std() / len(change) ** 0.5).item()


def _compared(
    mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean_a - mean_b, tr A + tr B, and K, L with A = K K^T, B = L L^T."""
    device = wide_device(mean_a)
    means, covs = zip(
        _checked(mean_a, cov_a, "a", device), _checked(mean_b, cov_b, "b", device), strict=True
    )
    if len(means[0]) != len(means[1]):
        raise ValueError(
            f"means of {len(means[0])} and {len(means[1])} numbers: compare statistics of one "
            "network and one of its outputs"
        )
    left, right = (_factor(cov, of) for cov, of in zip(covs, "ab", strict=True))
    return means[0] - means[1], covs[0].trace() + covs[1].trace(), left, right


def _checked(mean: Tensor, cov: Tensor, of: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and covariance in float64, the latter symmetric to the last digit."""
    if mean.ndim != 1 or len(mean) == 0:
        raise ValueError(f"mean_{of} of shape {tuple(mean.shape)}: a mean is (d,)")
    if tuple(cov.shape) != (len(mean), len(mean)):
        raise ValueError(
            f"cov_{of} of shape {tuple(cov.shape)} beside a mean of {len(mean)}: "
            f"a covariance is (d, d), here ({len(mean)}, {len(mean)})"
        )
    for what, value in (("mean", mean), ("cov", cov)):
        if not value.isfinite().all():
            raise ValueError(f"{what}_{of} holds NaN or infinity: make these statistics again")
    cov = cov.to(device).double()
    if (cov - cov.T).abs().max() > _ASYMMETRY * cov.abs().max():
        raise ValueError(f"cov_{of} is not symmetric: it is no covariance; was it read right?")
    return mean.to(device).double(), (cov + cov.T) / 2


def _factor(cov: Tensor, of: str) -> Tensor:
    """K (d, r) with K K^T = cov, where r is the rank."""
    rounding = len(cov) * _EPSILON
    factor, failed = torch.linalg.cholesky_ex(cov)  # a tenth of the time, for full rank alone
    pivots = factor.diagonal().square()
    if not failed and pivots.min() > 1000 * rounding * pivots.max():  # else rounding may be in it
        return factor
    values, vectors = torch.linalg.eigh(cov)
    largest = values.abs().max()
    if values[0] < -_NEGATIVE * largest:
        raise ValueError(
            f"cov_{of} has the eigenvalue {values[0].item():.3g} beside {largest.item():.3g}: "
            "a covariance has none below 0; make these statistics again, in float64"
        )
    # The root of a zero that was rounded is not small: in the trace it would be 1e-8, not 1e-16.
    positive = values > rounding * largest
    return vectors[:, positive] * values[positive].sqrt()


def bias_warning(count: int, width: int, what: str = "samples") -> str | None:
    """A warning of a Frechet distance of too few samples; None if they are enough.

    `what` the samples are, such as "generated images".
    """
    if count > width:  # a covariance of full rank needs one sample more
        return None
    return (
        f"{count} {what} for features of {width} numbers: the covariance is singular and the "
        f"Frechet distance comes out too high; use at least {width + 1} "
        "(published scores use 50000)"
    )


# ---- shared with `scores` ----


def check_features(features: Tensor, what: str, width: int | None = None) -> None:
    """Raise a ValueError unless they are finite, (n, d) and, if a width is given, so wide."""
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(
            f"{what} of shape {tuple(features.shape)}: (n, d) is needed, a row for each sample; "
            "flatten the rest or average over it"
        )
    if not features.is_floating_point():
        raise ValueError(f"{what} of {features.dtype}: use floating point values")
    if width is not None and features.shape[1] != width:
        raise ValueError(
            f"{what} are {features.shape[1]} wide and those beside them {width}: "
            "use one network and one of its outputs for both"
        )
    for start, part in zip(range(0, len(features), _ROWS), features.split(_ROWS), strict=False):
        bad = ~part.isfinite().all(dim=1)
        if bad.any():
            row = start + int(bad.nonzero()[0])
            raise ValueError(
                f"{what} hold NaN or infinity, first in row {row}: the model that made the sample "
                "diverged, or the network that looked at it overflowed; use float32 for it"
            )


def wide_device(features: Tensor) -> torch.device:
    """The device for float64 arithmetic: that of the features, or the CPU for MPS."""
    return torch.device("cpu") if features.device.type == "mps" else features.device
