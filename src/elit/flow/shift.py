"""Timestep shift, one for training and sampling: sigma' = s sigma / (1 + (s - 1) sigma)."""

import math
from typing import TYPE_CHECKING, Literal, TypeVar

from elit._numbers import is_real

if TYPE_CHECKING:  # a config holds a shift, and needs no torch
    from torch import Tensor

DIMENSION: Literal["dimension"] = "dimension"
Shift = float | Literal["dimension"]
"""s, 1 for none; or "dimension": sqrt(m / 4096) of a sample of m numbers."""
BASE_DIMENSION = 4096
LEAST, MOST = 1e-3, 1e3

_Levels = TypeVar("_Levels", float, "Tensor")


def is_shift(value: object) -> bool:
    """Whether a value is a shift."""
    return value == DIMENSION or (is_real(value) and LEAST <= value <= MOST)


def check_shift(shift: Shift) -> None:
    """Raise a ValueError for what is no shift."""
    if not is_shift(shift):
        raise ValueError(
            f"shift {shift!r:.60} is not allowed; give a number from {LEAST:g} to {MOST:g}, 1 for "
            f"none, or {DIMENSION!r} for sqrt(m / {BASE_DIMENSION}) of samples of m numbers"
        )


def shift_at(shift: Shift, dimension: int | None) -> float:
    """The number s for samples of so many numbers, channels times places.

    The more numbers tell of one picture, the more noise it takes to hide it: SD3 (Esser et al.,
    2024, section 5.3.2) shifts by the square root of the pixels over a base's, RAE (Zheng et al.,
    2025, section 4.2) by that of tokens times channels over 4096.
    """
    if shift != DIMENSION:
        return float(shift)
    if dimension is None:
        raise ValueError(
            f"a shift by {DIMENSION!r} needs the numbers of a sample: give dimension, channels "
            f"times places"
        )
    return math.sqrt(dimension / BASE_DIMENSION)


def shifted(sigma: _Levels, shift: float) -> _Levels:
    """Shifted noise levels; 0 and 1 stay, exactly."""
    return sigma if shift == 1 else sigma / (sigma + (1 - sigma) / shift)
