"""Samples of a prepared folder by split and resolution, and their places in shards."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from elit.data.buckets import Array
from elit.data.manifest import Manifest, Shard, size_name

_HOLD_OUT, _MOST_HELD_OUT = 20, 2048  # one sample in twenty, and about so many at most


class Table:
    """Places of samples in shards, held-out ones left out, or all others.

    Sample u of those not held out, counted over the whole split, stands at u + u // (k - 1).
    """

    def __init__(
        self,
        shards: list[Shard],
        whole: list[bool],
        hold_out: int | None,
        split: str,
    ):
        self.hold_out, self.is_held = hold_out, split == "validation"
        counts = np.array([shard.count for shard in shards], dtype=np.int64)
        first = counts.cumsum() - counts  # damaged ones count: what is held out stays the same
        order = np.flatnonzero(whole)
        counts, phase = counts[order], first[order]
        if hold_out is not None:
            phase = phase % hold_out
            held = (phase + counts) // hold_out
            counts = held if self.is_held else counts - held
        some = np.flatnonzero(counts)
        self.shards = [shards[order[n]] for n in some]
        self.counts, self.phase = counts[some], phase[some]
        self.ends = self.counts.cumsum()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, index: Array) -> tuple[Array, Array]:
        """Shard and row of each sample."""
        numbers = np.searchsorted(self.ends, index, side="right")
        place = index - (self.ends - self.counts)[numbers]
        return numbers, self._rows(place, self.phase[numbers])

    def all_rows(self, number: int) -> Array:
        """Rows of a shard that are of this split."""
        return self._rows(np.arange(self.counts[number]), self.phase[number])

    def _rows(self, place: Array, phase: Array) -> Array:
        if self.hold_out is None:
            return place
        if self.is_held:
            return place * self.hold_out + self.hold_out - 1 - phase
        nth = phase + place
        return nth + nth // (self.hold_out - 1) - phase


def shards_of(
    manifest: Manifest, split: str, sizes: list[str], folder: Path
) -> tuple[list[Shard], int | None]:
    """Shards that a split is taken from, size by size, and k where every k-th is held out."""
    of_split = {
        name: sorted(
            (shard for shard in of_name.shards if size_name(shard.size) in sizes),
            key=lambda shard: sizes.index(size_name(shard.size)),
        )
        for name, of_name in manifest.splits.items()
    }
    if any(shard.count for shard in of_split.get("validation", ())):
        return of_split.get(split, []), None
    shards = of_split.get("train", [])
    count = sum(shard.count for shard in shards)
    if count < 2:
        raise ValueError(
            f"{folder} has {count} training samples of {', '.join(sizes)}; training takes two or "
            f"more, as one is held out"
        )
    return shards, min(count, max(_HOLD_OUT, math.ceil(count / _MOST_HELD_OUT)))


def sizes_of(manifest: Manifest, resolution: int | None, folder: Path) -> list[str]:
    """Names of the sizes of one resolution."""
    belongs = dict(manifest.resolutions)
    for name in manifest.shapes.keys() - belongs.keys():  # the side of a square of as many pixels
        belongs[name] = round(math.sqrt(math.prod(map(int, name.split("x")[-2:]))))
    there = sorted(set(belongs.values()))
    if resolution is None and len(there) == 1:
        resolution = there[0]
    if resolution not in there:
        raise ValueError(
            f"data.options.resolution={resolution} is none that {folder} has alone; it has sizes "
            f"{', '.join(manifest.shapes)}: give one of {', '.join(map(str, there))}"
        )
    return [name for name in manifest.shapes if belongs[name] == resolution]


def main_size(sizes: list[str], shards: Iterable[Shard]) -> str:
    """The size that the model is made for: the square one, else that of the most samples."""
    counts = dict.fromkeys(sizes, 0)
    for shard in shards:
        if (name := size_name(shard.size)) in counts:
            counts[name] += shard.count
    is_square = {name: len(set(name.split("x")[-2:])) == 1 for name in sizes}
    return max(sizes, key=lambda name: (is_square[name], counts[name]))
