"""Procedural colour images: one large textured object on a plain background, in ten shapes.

Every image is a pure function of (split, index) in continuous coordinates: neither `count` nor
the batch changes it, and another `size` gives the same picture at another resolution.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elit._choices import check_choice
from elit._numbers import is_whole
from elit.data import SPLITS, ImageDataset

Array = NDArray[Any]
Field = Callable[[Array, Array], Array]

MIN_SIZE = 8  # below, a star is a disc
_MOST_SIDE = 2**14  # pixels or frames
_CHUNK = 64  # images made at a time: their fields stay in the processor's cache


class Procedural(ImageDataset):
    """Square pictures made by index, whose classes take turns."""

    def __init__(self, split: str, count: int, size: int, unit: str = "images") -> None:
        check_choice(split, SPLITS, "split")
        self.split = split
        self.count = whole_number("count", count, 1, unit, sys.maxsize)
        self.size = whole_number("size", size, MIN_SIZE, "pixels a side")
        self.image_shape = (3, self.size, self.size)

    def __len__(self) -> int:
        return self.count

    @cached_property
    def labels(self) -> torch.Tensor:  # type: ignore[override]
        return torch.arange(self.count) % self.num_classes

    def _counters(self, indices: Iterable[int]) -> tuple[Array, torch.Tensor]:
        """Indices (B,) uint64, counted from the beginning, and their labels (B,)."""
        index = np.array(self._positions(indices), dtype=np.uint64)
        return index, torch.from_numpy((index % np.uint64(self.num_classes)).astype(np.int64))


class Shapes(Procedural):
    """Images (3, size, size) in [-1, 1] of ten shapes; the class is the shape of the object.

    Place, size, tilt, colour and texture vary freely, and the border may cut off the edge of an
    object. Index i has class i % 10, so any ten images in a row show every class once.
    """

    def __init__(self, split: str = "train", count: int = 10_000, size: int = 32) -> None:
        super().__init__(split, count, size)
        self.class_names = tuple(OUTLINES)

    def batch(self, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        index, labels = self._counters(indices)
        images = np.empty((len(index), *self.image_shape), dtype=np.float32)
        for start in range(0, len(index), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            images[chunk] = _draw(index[chunk], self.split, self.size)
        return {"images": torch.from_numpy(images), "class_labels": labels}


# Outlines: signed distance to the edge (negative inside) at object coordinates, x to the right and
# y DOWN, within about [-1, 1]. The slope at the edge is 1, for an even anti-aliased rim.


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.3)


def _star(x: Array, y: Array) -> Array:
    sector = 2 * np.pi / 5
    turn = np.arctan2(x, -y)  # 0 at the upper tip
    turn = np.abs(turn - sector * np.round(turn / sector))  # fold all five points onto half of one
    radius = np.hypot(x, y)
    # Its edge runs from the tip at radius 1.05 to the notch at radius 0.45.
    return 0.36 * (radius * np.cos(turn) - 1.05) + 0.933 * radius * np.sin(turn)


def _heart(x: Array, y: Array) -> Array:
    x, y = np.abs(x), y - 0.12
    square = 0.707 * (x + np.abs(y)) - 0.57  # on its corner, with a disc on each upper side
    return np.minimum(square, np.hypot(x - 0.403, y + 0.403) - 0.57)


def _moon(x: Array, y: Array) -> Array:
    x = x - 0.15  # the middle of a crescent lies beside the middle of its disc
    return np.maximum(np.hypot(x, y) - 0.98, 0.78 - np.hypot(x - 0.52, y))


def _hourglass(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(y - 0.88, 0.707 * (x - y) - 0.06)


OUTLINES: dict[str, Field] = {
    "disc": lambda x, y: np.hypot(x, y) - 0.92,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.24,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.8,
    "diamond": lambda x, y: 0.84 * np.abs(x) + 0.543 * np.abs(y) - 0.57,  # 0.68 by 1.05
    "triangle": lambda x, y: np.maximum(y - 0.72, 0.866 * np.abs(x) - 0.5 * y - 0.48),
    "cross": _cross,
    "star": _star,
    "heart": _heart,
    "moon": _moon,
    "hourglass": _hourglass,
}

# Textures: how much lighter (to 1) or darker (to -1) the paint is at texture coordinates.
TEXTURES: dict[str, Field] = {
    "plain": lambda u, _: np.zeros_like(u),
    "shaded": lambda u, _: np.clip(0.7 * u, -1, 1),
    "striped": lambda u, _: np.sin(6.28 * u),
    "chequered": lambda u, v: np.sin(4.7 * u) * np.sin(4.7 * v),
    "circles": lambda u, v: np.sin(6.28 * np.hypot(u, v)),
}


def palette(*colours: str) -> Array:
    """Turn hexadecimal colours into (N, 3) float32 in [-1, 1]."""
    return np.array([list(bytes.fromhex(colour)) for colour in colours], np.float32) / 127.5 - 1


# Pale grounds and strong paints: any two of them differ clearly.
GROUNDS = palette("f7ecd2", "dfecf8", "eae2f6", "e0f2dc", "f8e0dc")
PAINTS = palette("b8201f", "c95a00", "1f7f38", "1f4bb5", "6d2b9e", "2b3045")


def _draw(index: Array, split: str, size: int) -> Array:
    """Draw images by index: (B,) uint64 -> (B, 3, size, size) float32 in [-1, 1]."""
    draws = iter(uniform(index, split, 16)[..., None, None])  # each (B, 1, 1)
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size
    across, down = pixel[None, None, :], pixel[None, :, None]  # (1, 1, S), (1, S, 1)

    # The object's own coordinates, in radii from its middle. Wherever it is, a ninth of its radius
    # or less lies beyond a border: most objects are whole, and all can be recognised.
    radius = 0.3 + 0.06 * next(draws)  # an object spans 60 to 72 % of the side
    x = (across - 0.32 - 0.36 * next(draws)) / radius
    y = (down - 0.32 - 0.36 * next(draws)) / radius
    x, y = rotate(x, y, 0.2 * next(draws) - 0.1)  # (B, S, S); up to 6 degrees either way

    distance = evaluate(tuple(OUTLINES.values()), class_of(index), x, y)
    cover = np.clip(0.5 - distance * radius * size, 0, 1)[:, None]  # (B, 1, S, S)

    paint = pick(PAINTS, next(draws))  # (B, 3, 1, 1)
    texture = (next(draws) * len(TEXTURES)).astype(np.int64).reshape(-1)
    waves = 0.6 + 0.5 * next(draws)  # per radius: low, or a small model cannot draw them
    u, v = rotate(waves * x, waves * y, 6.28 * next(draws))
    tone = evaluate(tuple(TEXTURES.values()), texture, u + next(draws), v + next(draws))
    tone = ((0.1 + 0.2 * next(draws)) * tone)[:, None]  # (B, 1, S, S)
    ink = paint * (1 - np.abs(tone)) + tone  # tone blends towards white (1) or black (-1)

    near, far = pick(GROUNDS, next(draws)), pick(GROUNDS, next(draws))
    graded = next(draws) < 0.5  # the others are flat
    slope_x, slope_y = 2 * next(draws) - 1, 2 * next(draws) - 1
    ramp = 0.5 + slope_x * (across - 0.5) + slope_y * (down - 0.5)  # (B, S, S) in [-0.5, 1.5]
    ground = near + (far - near) * (np.clip(ramp, 0, 1) * graded)[:, None]  # (B, 3, S, S)
    return ground + (ink - ground) * cover


def class_of(index: Array) -> Array:
    """Class of each index."""
    return (index % np.uint64(len(OUTLINES))).astype(np.int64)


def uniform(index: Array, split: str, draws: int) -> Array:
    """Draw uniform numbers in [0, 1) by counter: (B,) -> (draws, B) float32.

    Even counters are the training split and odd ones the validation split. The hash maps
    different counters to different keys, so no image is in both.
    """
    key = _hash(index * np.uint64(2) + np.uint64(SPLITS.index(split)))  # (B,)
    step = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = _hash(key[None] + step[:, None])  # (draws, B)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _hash(counter: Array) -> Array:
    """Scramble 64-bit integers one to one (the output function of splitmix64)."""
    mixed = (counter ^ (counter >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def evaluate(fields: tuple[Field, ...], which: Array, x: Array, y: Array) -> Array:
    """Evaluate field `which[b]` at the points of image b: (B,), 2 x (B, S, S) -> (B, S, S)."""
    values = np.empty_like(x)
    for number in np.unique(which):
        rows = which == number
        values[rows] = fields[number](x[rows], y[rows])
    return values


def rotate(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    """Turn points by angles."""
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def pick(palette: Array, draw: Array) -> Array:
    """Choose a colour by a draw in [0, 1): (N, 3), (B, 1, 1) -> (B, 3, 1, 1)."""
    return palette[(draw.reshape(-1) * len(palette)).astype(np.int64)][..., None, None]


def whole_number(name: str, value: Any, least: int, unit: str, most: int = _MOST_SIDE) -> int:
    """Value of an option that counts something, or the error that says what is allowed."""
    if not is_whole(value, least, most):
        bounds = f"at least {least}"
        bounds += f" and at most {most}" if isinstance(value, int) and value > most else ""
        raise ValueError(f"{name}={value!r}: use a whole number of {unit}, {bounds}")
    return int(value)
