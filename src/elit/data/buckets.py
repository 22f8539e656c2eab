"""The order of a data set's samples on disk, so that batches read it well."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Bucket:
    """Samples of one shape, which can stand in one batch."""

    shape: tuple[int, ...]  # of one of them, as the model sees it
    runs: Array  # (R, 2) int64: first index and length of each run of samples that lie together
    # to add to the indices of a run for each copy of it that there is, such as mirrored ones
    offsets: tuple[int, ...] = (0,)
    # samples, copies included, that are shuffled among each other: less mixing means that
    # fewer places are read at a time. An epoch of at most so many is shuffled whole
    window: int = 2**22
    name: str = ""  # size of its pictures in pixels

    def __len__(self) -> int:
        return int(self.runs[:, 1].sum()) * len(self.offsets)

    def indices(self, which: Array | None = None) -> Array:
        """Indices (n,) of the samples of some runs, by default of all, run after run."""
        starts, counts = (self.runs if which is None else self.runs[which]).T
        ends = counts.cumsum()
        steps = np.arange(ends[-1] if len(ends) else 0)
        once = np.repeat(starts - (ends - counts), counts) + steps
        return np.concatenate([once + offset for offset in self.offsets])
