"""Correlation of two maps of the same images, beside its control on other images.

A map that is the same on every image, such as a pattern of position, may correlate with any other
map. So a correlation is told beside its control: map of image i against the other map of an image
j != i.
"""

from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor

NUM_SHUFFLES = 999
_NOISE = 1e-5  # float32 maps that vary less than this, over their largest value, are constant


@dataclass(frozen=True)
class Correlation:
    """A mean of correlations over images, and its control; None where there is none.

    A map without variation correlates with nothing: its image is left out.
    """

    value: float | None  # mean over images of the correlation of one map with the other
    shuffled: float | None  # the same of all pairs of different images
    shuffled_std: float | None  # spread of the mean over shuffles that leave no image in its place
    # share of such shuffles, the true order counted among them, that are at least as far from
    # `shuffled` as `value` is
    p: float | None
    images: int  # that the mean is of


def controlled(matrix: Tensor, seed: int = 0) -> Correlation:
    """The mean of the diagonal of correlations (N, N), with that of the rest as its control.

    Of each image's map with each image's other map; NaN where it is undefined.
    """
    defined = matrix.diagonal().isfinite()
    matrix = matrix[defined][:, defined]
    count = len(matrix)
    if count == 0:
        return Correlation(None, None, None, None, 0)
    own = matrix.diagonal().mean()
    if count == 1:
        return Correlation(float(own), None, None, None, 1)
    mean = (matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))
    orders = derangements(count, NUM_SHUFFLES, seed)
    shuffled = matrix[torch.arange(count), orders].mean(1)  # (shuffles,)
    # Sums in another order differ in their last digits: those count as equal.
    further = (shuffled - mean).abs() >= (own - mean).abs() - 1e-9
    p = (1 + int(further.sum())) / (1 + len(orders))
    spread = float(shuffled.std(correction=0))
    return Correlation(float(own), float(mean), spread, p, count)


def correlation_matrix(
    one: Tensor, other: Tensor, *, rank: bool = False, within_groups: bool = False
) -> Tensor:
    """Correlation of each of the maps `one` (N, G, P) with each of `other`: (N, N) float64.

    `rank` makes it Spearman's. `within_groups` values, or their ranks in their group, count from
    their group's mean on, so that differences between groups don't count. Rows and columns of maps
    without variation are NaN.
    """
    return _unit(one, rank, within_groups) @ _unit(other, rank, within_groups).T


def _unit(maps: Tensor, rank: bool, within_groups: bool) -> Tensor:
    """Centred rows (N, G * P) of length 1; NaN where nothing varies."""
    values = maps.detach().to("cpu", torch.float64)
    if not within_groups:
        values = values.flatten(1)[:, None]  # (N, 1, G * P)
    values = _centred(values)
    if rank:
        ranks = torch.from_numpy(rankdata(values.numpy(), axis=-1))  # ties share their mean rank
        values = ranks - ranks.mean(-1, keepdim=True)
    values = values.flatten(1)
    return values / values.norm(dim=1, keepdim=True)  # 0 / 0 is NaN


def _centred(values: Tensor) -> Tensor:
    """Values less their mean over the last axis; zero where that is rounding alone."""
    centred = values - values.mean(-1, keepdim=True)
    largest = values.abs().amax(-1, keepdim=True)
    return centred.where(centred.abs().amax(-1, keepdim=True) > _NOISE * largest, 0.0)


def derangements(count: int, number: int, seed: int) -> Tensor:
    """Random orders (number, count) that leave nothing in its place, for `count` of 2 or more."""
    draw = torch.Generator().manual_seed(seed)
    places, moved = torch.arange(count), torch.empty(0, count, dtype=torch.long)
    while len(moved) < number:
        orders = torch.rand(number, count, generator=draw).argsort(dim=1)
        moved = torch.cat((moved, orders[(orders != places).all(1)]))  # more than a third
    return moved[:number]


def position_share(maps: Tensor) -> float | None:
    """Share of the variance over tokens of maps (N, T) that position alone explains, in [0, 1].

    The variance of the mean map over that of all maps. What the mean map of few images has by
    chance is taken off, so that maps without a common pattern have about 0. None where nothing
    varies.
    """
    values = maps.detach().to("cpu", torch.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"maps of shape {tuple(maps.shape)}; give (images, tokens) of two or more")
    values = _centred(values)  # an image whose map is larger everywhere says nothing of places
    rest = values.var(0).mean() * values.shape[1] / max(1, values.shape[1] - 1)
    mean = values.mean(0).var()
    common = (mean - rest / len(values)).clamp_min(0)
    total = common + rest
    return float(common / total) if total > 0 else None  # of a single token both are NaN
