"""Procedural clips: one plain object crosses a plain background in one of four directions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from elit.data.shapes import (
    GROUNDS,
    OUTLINES,
    PAINTS,
    Array,
    Procedural,
    evaluate,
    pick,
    uniform,
    whole_number,
)

NAMES = ("red", "orange", "green", "blue", "purple", "black")  # of PAINTS, in order

# The direction of motion, x to the right and y down.
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
OBJECTS = ("disc", "square", "triangle")  # few and plain: a tiny model has motion to learn


class MovingShapes(Procedural):
    """Clips (3, frames, size, size) in [-1, 1]; the class is the direction of motion.

    Object, size, colours, place and speed vary freely. Index i has class i % 4. Every clip is a
    pure function of (split, index) in continuous coordinates: neither `count` nor the batch changes
    it, and another `size` or `frames` samples the same motion more finely. Its caption says which
    object moves where: "a red disc moves right".
    """

    has_captions = True

    def __init__(
        self, split: str = "train", count: int = 10_000, size: int = 16, frames: int = 8
    ) -> None:
        super().__init__(split, count, size, "clips")
        self.frames = whole_number("frames", frames, 2, "frames")
        self.image_shape = (3, self.frames, self.size, self.size)
        self.class_names = tuple(DIRECTIONS)

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        index, labels = self._counters(indices)
        draws = uniform(index, self.split, 7)
        clips = _draw(index, draws, self.size, self.frames)
        captions = [
            f"a {NAMES[int(row[5] * len(NAMES))]} {OBJECTS[int(row[4] * len(OBJECTS))]} "
            f"moves {self.class_names[label]}"
            for row, label in zip(draws.T, labels.tolist(), strict=True)
        ]
        return {
            "images": torch.from_numpy(clips), "class_labels": labels, "captions": captions
        }  # fmt: skip


def _draw(index: Array, uniforms: Array, size: int, frames: int) -> Array:
    """Draw clips: (B,) uint64, (7, B) -> (B, 3, frames, size, size) float32 in [-1, 1]."""
    draws = iter(uniforms[..., None, None])  # each (B, 1, 1)
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size
    time = np.linspace(-0.5, 0.5, frames, dtype=np.float32)[:, None]  # (T, 1)
    ways = np.array(list(DIRECTIONS.values()), np.float32)[index % np.uint64(len(DIRECTIONS))]

    # The middle of the way lies near the middle of the clip; its ends stay inside.
    radius = 0.2 + 0.05 * next(draws)
    length = 0.42 + 0.1 * next(draws)  # of the way, in sides
    middle_x, middle_y = 0.4 + 0.2 * next(draws), 0.4 + 0.2 * next(draws)
    centre_x = middle_x + ways[:, 0, None, None] * length * time  # (B, T, 1)
    centre_y = middle_y + ways[:, 1, None, None] * length * time
    x = (pixel - centre_x[..., None]) / radius[..., None]  # (B, T, 1, S)
    y = (pixel[:, None] - centre_y[..., None]) / radius[..., None]  # (B, T, S, 1)
    x, y = np.broadcast_arrays(x, y)  # (B, T, S, S)

    which = (next(draws) * len(OBJECTS)).astype(np.int64).reshape(-1)
    distance = evaluate(tuple(OUTLINES[name] for name in OBJECTS), which, x, y)
    cover = np.clip(0.5 - distance * radius[..., None] * size, 0, 1)[:, None]  # (B, 1, T, S, S)
    paint, ground = (pick(colours, next(draws))[..., None] for colours in (PAINTS, GROUNDS[:2]))
    return (ground + (paint - ground) * cover).astype(np.float32)
