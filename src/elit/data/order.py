"""Which samples a step takes: a fresh shuffle every epoch, as a function of the step alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from elit._random import generator

Array = NDArray[Any]

_STEPS = 4096  # whose buckets are drawn at once


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


@dataclass(eq=False)
class StepBatches(Sampler[list[int]]):
    """Indices of each micro-batch from a step on: a fresh shuffle of the data every epoch.

    Batches run across the end of an epoch, so that all have one size. Where the data has buckets,
    a step takes all its samples from one of them, drawn with the bucket's share as its
    probability, and each bucket has epochs of its own.

    Attributes:
        num_samples: size of the data set.
        batch_size: samples of one step, over all processes and micro-batches.
        chunks: numbers of this process's micro-batches among all those of a step.
        num_chunks: micro-batches of a step, over all processes.
        steps: the steps to serve.
        seed: of the shuffle.
        buckets: of the data set; without any, all samples are shuffled.
    """

    num_samples: int
    batch_size: int
    chunks: range
    num_chunks: int
    steps: range
    seed: int
    buckets: Sequence[Bucket] = ()

    def __post_init__(self) -> None:
        if self.batch_size % self.num_chunks:
            raise ValueError(
                f"data.batch_size {self.batch_size} cannot be cut into {self.num_chunks} equal "
                f"micro-batches (processes x train.accumulation); use a multiple of "
                f"{self.num_chunks}"
            )
        if not self.buckets:
            size = self.num_samples
            self.buckets = [Bucket((), np.array([[0, size]]), window=size)]

    def __len__(self) -> int:
        return len(self.steps) * len(self.chunks)

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size // self.num_chunks
        orders = [BucketOrder(self.buckets, n, self.seed) for n in range(len(self.buckets))]
        for bucket, turn in self._turns():
            for chunk in self.chunks:
                first = turn * self.batch_size + chunk * size
                yield orders[bucket].take(first, size).tolist()

    def _turns(self) -> Iterator[tuple[int, int]]:
        """Each step's bucket, and how many steps before it took the same."""
        if len(self.buckets) == 1:
            yield from ((0, step) for step in self.steps)
            return
        counts = np.array([len(bucket) for bucket in self.buckets], dtype=float)
        bounds = counts.cumsum() / counts.sum()
        taken = np.zeros(len(counts), dtype=np.int64)
        for block in range(-(-self.steps.stop // _STEPS)):
            draw = torch.rand(_STEPS, generator=generator(self.seed, "bucket", block))
            drawn = np.searchsorted(bounds[:-1], draw.numpy(), side="right")
            first = block * _STEPS
            if first + _STEPS <= self.steps.start:
                taken += np.bincount(drawn, minlength=len(counts))
                continue
            for step, bucket in enumerate(drawn.tolist(), first):
                if step in self.steps:
                    yield bucket, int(taken[bucket])
                taken[bucket] += 1


class BucketOrder:
    """The endless order of a bucket's samples: each once an epoch, shuffled window by window.

    A window is as many whole runs, in an order of the epoch's own, as hold the bucket's `window`.
    Only the window in use is made, so that nothing is as long as the data set but a small one's.
    """

    def __init__(self, buckets: Sequence[Bucket], number: int, seed: int):
        self.bucket, self.seed = buckets[number], seed
        self.size = len(self.bucket)
        # A single bucket is shuffled as data without buckets is.
        self.place = () if len(buckets) == 1 else (1 + number,)
        self._epoch, self._window = -1, (0, np.empty(0, dtype=np.int64))  # where it begins, order

    def take(self, start: int, count: int) -> Array:
        """Indices (count,) at the places from `start` on."""
        parts: list[Array] = []
        while count:
            epoch, place = divmod(start, self.size)
            first, order = self._window
            if epoch != self._epoch or not first <= place < first + len(order):
                self._epoch, self._window = epoch, self._make_window(epoch, place)
                first, order = self._window
            part = order[place - first : place - first + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _make_window(self, epoch: int, place: int) -> tuple[int, Array]:
        """The window that holds a place of an epoch: its own first place, and its samples."""
        bucket, which, first = self.bucket, None, 0
        of_window: tuple[int, ...] = self.place
        if self.size > bucket.window:
            mine = 1 + sum(self.place)
            shuffle = generator(self.seed, "order", epoch, mine, 0, 1)
            runs = torch.randperm(len(bucket.runs), generator=shuffle).numpy()
            ends = bucket.runs[runs, 1].cumsum() * len(bucket.offsets)
            starts = np.concatenate([[0], ends[:-1]])
            numbers = starts // bucket.window
            number = int(numbers[np.searchsorted(ends, place, side="right")])
            which, first = runs[numbers == number], int(starts[numbers == number][0])
            of_window = (mine, 1 + number)
        indices = bucket.indices(which)
        shuffle = generator(self.seed, "order", epoch, *of_window)
        return first, indices[torch.randperm(len(indices), generator=shuffle).numpy()]
