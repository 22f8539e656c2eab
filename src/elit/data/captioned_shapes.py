"""Procedural images with captions: one object on a plain ground, said in many ways."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from elit.data.shapes import (
    OUTLINES,
    TEXTURES,
    Array,
    Procedural,
    evaluate,
    palette,
    pick,
    rotate,
    uniform,
)

# What a thing is: how it may be called.
NOUNS = {
    "disc": ("disc", "circle"),
    "ring": ("ring", "hoop"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus"),
}
_SIZES = {"small": ("small", "little"), "large": ("large", "big")}
_PATTERNS = ("plain", "striped", "chequered")
PAINTS = {
    "red": "c81e28",
    "yellow": "e6af00",
    "green": "1f8a3c",
    "blue": "2348c8",
    "black": "26262c",
}
GROUNDS = {"white": "f8f8f4", "pink": "f8ccd4", "grey": "b4b4b8"}

# All name colour and shape; what a caption leaves open is drawn all the same.
_TEMPLATES = (
    "a {size} {pattern} {paint} {noun} on {ground}",
    "a {pattern} {paint} {noun}",
    "{paint} {noun}",
    "{size} {paint} {noun}, {pattern}, on {ground}",
    "on {ground}: a {paint} {noun}",
    "the {noun} is {size} and {paint}",
)


class Scene(NamedTuple):
    """Content of an image, in the words that the sets above start with."""

    noun: str
    size: str
    pattern: str
    paint: str
    ground: str


class CaptionedShapes(Procedural):
    """Images (3, size, size) in [-1, 1] with captions; the class is the shape of the object.

    "a small striped red disc on white", "red circle", "on white: a red disc" may all be said of
    one image; index i has class i % 5. Image and caption are pure functions of (split, index).
    """

    has_captions = True

    def __init__(self, split: str = "train", count: int = 10_000, size: int = 16) -> None:
        super().__init__(split, count, size)
        self.class_names = tuple(NOUNS)

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        index, labels = self._counters(indices)
        images = torch.from_numpy(_draw(index, self.split, self.size))
        captions = _say(index, self.split)
        return {"images": images, "class_labels": labels, "captions": captions}

    def scenes(self, indices: Iterable[int]) -> list[Scene]:
        """Scenes in the images of these indices."""
        index, _ = self._counters(indices)
        return _scenes(index, uniform(index, self.split, 12))


def _scenes(index: Array, draws: Array) -> list[Scene]:
    """Scenes (B,) of draws (12, B)."""
    nouns, words = tuple(NOUNS), [tuple(w) for w in (_SIZES, _PATTERNS, PAINTS, GROUNDS)]
    return [
        Scene(nouns[int(i) % len(nouns)], *map(_choose, words, row))
        for i, row in zip(index, draws.T, strict=True)
    ]


def _say(index: Array, split: str) -> list[str]:
    """A caption of each image, its template and its words drawn by index too."""
    draws = uniform(index, split, 12)
    captions = []
    for scene, (template, size, noun) in zip(_scenes(index, draws), draws[9:].T, strict=True):
        words = scene._asdict()
        words["size"] = _choose(_SIZES[scene.size], size)
        words["noun"] = _choose(NOUNS[scene.noun], noun)
        captions.append(_choose(_TEMPLATES, template).format(**words))
    return captions


def _choose(words: tuple[str, ...], draw: float) -> str:
    return words[int(draw * len(words))]


def _draw(index: Array, split: str, size: int) -> Array:
    """Draw images by index: (B,) uint64 -> (B, 3, size, size) float32 in [-1, 1]."""
    draws = uniform(index, split, 12)[..., None, None]  # (12, B, 1, 1)
    is_large, pattern, paint, ground, across, down, vary, tilt, phase = draws[:9]
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size

    radius = np.where(is_large < 0.5, 0.22, 0.36) * (0.94 + 0.12 * vary)  # in sides of the image
    radius = radius.astype(np.float32)
    free = 0.92 - 2 * radius  # an object never leaves the image
    x = (pixel[None, None, :] - 0.04 - radius - free * across) / radius
    y = (pixel[None, :, None] - 0.04 - radius - free * down) / radius
    x, y = rotate(x, y, 0.16 * tilt - 0.08)  # (B, S, S)

    which = (index % np.uint64(len(NOUNS))).astype(np.int64)
    distance = evaluate(tuple(OUTLINES[name] for name in NOUNS), which, x, y)
    cover = np.clip(0.5 - distance * radius * size, 0, 1)[:, None]  # (B, 1, S, S)
    textures = tuple(TEXTURES[name] for name in _PATTERNS)
    number = (pattern * len(textures)).astype(np.int64).reshape(-1)
    tone = 0.45 * np.clip(evaluate(textures, number, x + phase, y), 0, 1)[:, None]
    ink = pick(palette(*PAINTS.values()), paint)  # (B, 3, 1, 1)
    ink = ink + (1 - ink) * tone  # stripes and chequers are lighter
    paper = pick(palette(*GROUNDS.values()), ground)
    return (paper + (ink - paper) * cover).astype(np.float32)
