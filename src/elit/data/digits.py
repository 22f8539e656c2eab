"""Real handwritten digits from scikit-learn's wheel: 1797 images, no download."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as F

from elit._choices import check_choice
from elit.data import SPLITS, ImageDataset

_SIZE = 16
_MARGIN = 1  # the 8x8 originals touch the upper and lower edge
_HOLD_OUT = 5  # one image in five is held out


class Digits(ImageDataset):
    """The 8x8 digits of scikit-learn drawn at 16x16, white on black: (1, 16, 16) in [-1, 1].

    Of each class every fifth image, in the order of the file, is held out for validation
    (364 images; 1433 to train on).
    """

    image_shape = (1, _SIZE, _SIZE)
    class_names = tuple("0123456789")
    aligned = True

    def __init__(self, split: str = "train") -> None:
        check_choice(split, SPLITS, "split")
        images, labels = _load()
        chosen = _held_out(labels) == (split == "validation")
        self.split = split
        self.images = images[chosen]  # (N, 1, 16, 16)
        self.labels = labels[chosen]  # (N,)

    def batch(self, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        positions = torch.tensor(self._positions(indices), dtype=torch.int64)
        return {"images": self.images[positions], "class_labels": self.labels[positions]}


@cache
def _load() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images (1797, 1, 16, 16) and labels (1797,)."""
    from sklearn.datasets import load_digits  # a second of import, needed by this set alone

    data = load_digits()
    coverage = torch.from_numpy(data.images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8)
    return _enlarge(coverage), torch.from_numpy(data.target).long()


def _enlarge(coverage: torch.Tensor) -> torch.Tensor:
    """Redraw ink coverage in [0, 1], (N, 1, 8, 8), as (N, 1, 16, 16) in [-1, 1].

    Plain bicubic enlargement leaves grey smears. So: enlarge far beyond the target, steepen
    the slope between paper and ink there, then average down, which keeps smooth edges.
    """
    inner, over = _SIZE - 2 * _MARGIN, 4
    padded = F.pad(coverage, (1, 1, 1, 1))  # paper around the page, so that strokes end on it
    pixel = inner * over // 8  # fine pixels along one original pixel
    fine = F.interpolate(padded, size=10 * pixel, mode="bicubic", align_corners=False)
    fine = fine[..., pixel:-pixel, pixel:-pixel]  # (N, 1, inner * over, inner * over)
    slope = ((fine - 0.15) / 0.8).clamp(0, 1)
    ink = F.avg_pool2d(slope * slope * (3 - 2 * slope), over)  # (N, 1, inner, inner)
    return F.pad(ink, (_MARGIN,) * 4) * 2 - 1  # (N, 1, 16, 16)


def _held_out(labels: torch.Tensor) -> torch.Tensor:
    """Return a mask (N,) of the images held out: the first, sixth, ... of each class."""
    held = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        held[(labels == label).nonzero().flatten()[::_HOLD_OUT]] = True
    return held
