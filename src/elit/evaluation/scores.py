"""Scores of generated samples from what a network says of them, besides the Frechet distance.

Products run in float64, in tiles of a fixed size: memory doesn't grow with the number of pairs,
and ties, duplicates and near duplicates come out as in a loop over all pairs. scikit-learn's
neighbours and kernels do neither, nor run on a GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from elit._numbers import is_whole
from elit.evaluation.frechet import check_features, wide_device

_TILE = 1024  # rows and columns: 8 MiB of distances; larger ones run no faster
# Squared distances carry an error of up to 1e-14 of both squared norms, and features that come in
# float32 one of 1e-7. What lies this much beyond a ball is on its edge, and so inside.
_EDGE = 1e-13


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits; of a single split the latter is 0."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """Shares in which two sets of samples cover each other; density may exceed 1."""

    precision: float  # share of generated samples within the ball of a real one
    recall: float  # share of real samples within the ball of a generated one
    density: float  # balls of real samples around a generated one, on average, over k
    coverage: float  # share of real samples with a generated one in their ball


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy, unbiased, so that it may be negative."""

    value: float  # over all pairs, or the mean over the subsets
    std: float | None  # over the subsets; None for all pairs


@torch.no_grad()
def inception_score(logits: Tensor, split_size: int = 5000) -> InceptionScore:
    """exp of the mean Kullback-Leibler divergence of p(y|x) from p(y), Salimans et al. (2016).

    Logits (N, K) come before the softmax, in an order that matters: p(y) is averaged over each of
    N // split_size splits of nearly equal size, at least one. 50000 samples give ten, as is usual.
    """
    check_features(logits, "logits")
    _check_count(logits, "logits", 1)
    if (logits.amin() >= 0) and ((logits.sum(dim=1) - 1).abs() < 1e-3).all():
        raise ValueError("logits that are probabilities already: give what came before the softmax")
    if not is_whole(split_size):
        raise ValueError(f"split_size={split_size!r}: use a whole number from 1 up, such as 5000")
    scores = []
    for split in logits.tensor_split(max(1, len(logits) // split_size)):
        log_given = split.to(wide_device(split)).double().log_softmax(dim=1)  # (n, K)
        given = log_given.exp()
        marginal = given.mean(dim=0)
        # The mean divergence is the entropy of p(y) less the mean entropy of p(y|x).
        divergence = (given * log_given).sum(dim=1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(divergence.exp())
    means = torch.stack(scores)
    return InceptionScore(means.mean().item(), means.std(correction=0).item())


@torch.no_grad()
def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> PrecisionRecall:
    """Precision, recall (Kynkaanniemi et al., 2019), density and coverage (Naeem et al., 2020).

    Each sample has a ball that reaches to the k-th nearest other sample of its set, edge included.
    A sample counts as covered if any of the balls holds it, not only the nearest sample's.

    Of features (M, d) and (N, d), both of more than k rows. A k of 3 is usual for precision and
    recall, 5 for the other two.
    """
    _check_pair(real, generated)
    if not is_whole(k):
        raise ValueError(f"k={k!r}: use a whole number from 1 up, such as 3")
    for features, what in ((real, "real"), (generated, "generated")):
        _check_count(features, f"{what} samples", k + 1, f" for k={k}")
    device = wide_device(generated)
    real_radii, generated_radii = (_radii(x, k, device) for x in (real, generated))
    is_precise = torch.zeros(len(generated), dtype=torch.bool, device=device)
    is_recalled, is_covered = (
        torch.zeros(len(real), dtype=torch.bool, device=device) for _ in range(2)
    )
    hits = 0
    centre = _mean(real, device)
    for rows, these in _tiles(generated, centre):
        for columns, those in _tiles(real, centre):
            distances = _squared_distances(these, those, 1 - _EDGE)  # (n, m)
            is_in_real = distances <= real_radii[columns]
            is_precise[rows] |= is_in_real.any(dim=1)
            is_covered[columns] |= is_in_real.any(dim=0)
            hits += int(is_in_real.sum())
            is_recalled[columns] |= (distances <= generated_radii[rows, None]).any(dim=0)
    precision, recall, coverage = (
        flags.double().mean().item() for flags in (is_precise, is_recalled, is_covered)
    )
    return PrecisionRecall(precision, recall, hits / (k * len(generated)), coverage)


@torch.no_grad()
def kernel_distance(
    real: Tensor,
    generated: Tensor,
    subsets: int | None = None,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """Kernel distance (KID) of Binkowski et al. (2018), with the kernel (x y / d + 1)^3.

    Args:
        real: features (M, d); M > 1.
        generated: features (N, d); N > 1.
        subsets: how many pairs of subsets are compared; 0 compares all of both sets at once. If
            left out, 100 as is usual, or 0 if a set is below `subset_size`.
        subset_size: samples in a subset, drawn from each set without repetition.
        seed: of the draws.
    """
    _check_pair(real, generated)
    for features, what in ((real, "real"), (generated, "generated")):
        _check_count(features, f"{what} samples", 2)
    if not is_whole(subset_size, 2):
        raise ValueError(f"subset_size={subset_size!r}: use a whole number from 2 up, such as 1000")
    fewest = min(len(real), len(generated))
    if subsets is None:
        subsets = 100 if fewest >= subset_size else 0
    if not is_whole(subsets, 0):
        raise ValueError(f"subsets={subsets!r}: use a whole number from 1 up, or 0 for all pairs")
    if subsets == 0:
        return KernelDistance(_squared_discrepancy(real, generated), None)
    if fewest < subset_size:
        raise ValueError(
            f"subsets of {subset_size} from {fewest} samples: use a smaller subset_size, more "
            "samples, or subsets=0 for all pairs"
        )
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        pair = []
        for features in (real, generated):
            rows = torch.randperm(len(features), generator=generator)[:subset_size]
            pair.append(features[rows.to(features.device)])
        values.append(_squared_discrepancy(*pair))
    return KernelDistance(statistics.fmean(values), statistics.pstdev(values))


@torch.no_grad()
def clip_score(image_embeddings: Tensor, text_embeddings: Tensor) -> float:
    """Mean of 100 max(cosine, 0) of images (N, d) and their texts (N, d), Hessel et al. (2021)."""
    check_features(image_embeddings, "image_embeddings")
    check_features(text_embeddings, "text_embeddings", image_embeddings.shape[1])
    _check_count(image_embeddings, "image_embeddings", 1)
    if len(image_embeddings) != len(text_embeddings):
        raise ValueError(
            f"{len(image_embeddings)} images and {len(text_embeddings)} texts: "
            "give each image the text that it was made for"
        )
    device = wide_device(image_embeddings)
    images, texts = (x.to(device).double() for x in (image_embeddings, text_embeddings))
    norms = images.norm(dim=1) * texts.norm(dim=1)
    if (norms == 0).any():
        row = int((norms == 0).nonzero()[0])
        raise ValueError(f"row {row} has an embedding of zeros: it points nowhere; leave it out")
    cosines = (images * texts).sum(dim=1) / norms
    return 100 * cosines.clamp_min(0).mean().item()


def _check_pair(real: Tensor, generated: Tensor) -> None:
    check_features(real, "real features")
    check_features(generated, "generated features", real.shape[1])


def _check_count(features: Tensor, what: str, least: int, why: str = "") -> None:
    if len(features) < least:
        raise ValueError(f"{len(features)} {what}: at least {least} are needed{why}; make more")


def _mean(features: Tensor, device: torch.device) -> Tensor:
    """Mean (d,) in float64. Less it, norms are small, and so is the rounding of distances."""
    parts = features.split(_TILE)
    return torch.stack([x.to(device).double().sum(dim=0) for x in parts]).sum(dim=0) / len(features)


def _tiles(features: Tensor, centre: Tensor, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Rows and what stands there, in float64 and less the centre, from the row `start` on."""
    for first in range(start, len(features), _TILE):
        rows = slice(first, min(first + _TILE, len(features)))
        yield rows, features[rows].to(centre.device).double() - centre


def _squared_distances(these: Tensor, those: Tensor, share: float = 1.0) -> Tensor:
    """`share` (|a|^2 + |b|^2) - 2 a b of all pairs (n, m); rounding may leave it below 0."""
    norms = these.square().sum(dim=1)[:, None] + those.square().sum(dim=1)
    return norms.mul_(share).addmm_(these, those.T, alpha=-2)


def _radii(features: Tensor, k: int, device: torch.device) -> Tensor:
    """Squared distance (N,) of each sample to the k-th nearest other one."""
    centre = _mean(features, device)
    nearest = centre.new_full((len(features), k), math.inf)
    for rows, these in _tiles(features, centre):
        for columns, those in _tiles(features, centre, rows.start):  # each pair once
            distances = _squared_distances(these, those)
            if rows == columns:
                distances.fill_diagonal_(math.inf)  # itself, not its duplicates
            else:
                nearest[columns] = _smallest(nearest[columns], distances.T)
            nearest[rows] = _smallest(nearest[rows], distances)
    return nearest[:, -1].clamp_min(0)


def _smallest(known: Tensor, more: Tensor) -> Tensor:
    """The k smallest of each row of known (n, k) and more (n, m), in order."""
    k = known.shape[1]
    more = more.topk(min(k, more.shape[1]), largest=False).values
    return torch.cat([known, more], dim=1).topk(k, largest=False).values


def _squared_discrepancy(real: Tensor, generated: Tensor) -> float:
    """Unbiased estimate over all pairs, of which none is a sample with itself."""
    origin = torch.zeros(real.shape[1], dtype=torch.float64, device=wide_device(generated))
    m, n = len(real), len(generated)
    between = _kernel_sum(generated, origin, real)
    within_real, within_generated = (_kernel_sum(x, origin) for x in (real, generated))
    return within_real / (m * (m - 1)) + within_generated / (n * (n - 1)) - 2 * between / (m * n)


def _kernel_sum(some: Tensor, origin: Tensor, others: Tensor | None = None) -> float:
    """Sum of the kernel over all pairs of two sets, or of two samples of one set."""
    total = 0.0
    for rows, these in _tiles(some, origin):
        for columns, those in _tiles(some if others is None else others, origin):
            values = (these @ those.T).div_(these.shape[1]).add_(1).pow_(3)
            same = others is None and rows == columns
            total += (values.sum() - values.trace() if same else values.sum()).item()
    return total
