"""What a user may have given for a number."""

import math
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, TypeGuard

MOST = 2**31 - 1  # of what counts or measures: beyond it, arithmetic of sizes overflows


def is_whole(value: Any, least: int = 1, most: int = MOST) -> TypeGuard[int]:
    """Whether it is a whole number, from `least` to `most`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and least <= int(value) <= most


def check_whole(
    value: Any, name: str, least: int = 1, most: int = MOST, advice: str = "a positive integer"
) -> None:
    """Raise a ValueError unless it is a whole number, from `least` to `most`."""
    if not is_whole(value, least, most):
        raise ValueError(f"{name}={value!r} is not allowed; give {advice}")


def is_real(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def as_number(text: str) -> float:
    """A number as it is typed, a fraction or a percentage: 0.25, 1/4, 25%; nan where it is none."""
    text = text.strip()
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        return math.nan


def latent_frames(frames: int, scale: int, name: str = "num_frames") -> int:
    """Length in time of the VAE latents of a clip, or a ValueError if no length is its own."""
    if (frames - 1) % scale:
        nearest = (frames - 1) // scale * scale + 1
        raise ValueError(
            f"{name}={frames} is not a multiple of {scale}, the VAE's scale in time, and "
            f"one more; use {nearest} or {nearest + scale}"
        )
    return (frames - 1) // scale + 1


def check_threshold(threshold: Any) -> None:
    """Raise a ValueError for what is no threshold of a step cache; infinity skips all it may."""
    is_one = isinstance(threshold, Real) and not isinstance(threshold, bool)
    if not (is_one and threshold >= 0):
        raise ValueError(
            f"threshold {threshold!r:.60} is not allowed; give 0 to skip nothing, or a small "
            f"number, as 0.1"
        )
