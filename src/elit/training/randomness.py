"""Randomness as a function of (seed, step): a resumed run draws what it would have drawn."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

_STREAMS = {"order": 0, "budget": 1, "noise": 2, "validation": 3, "sheet": 4, "weights": 5}


def generator(
    seed: int, stream: str, *place: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Generator of a stream at a place, such as (step, micro-batch), independent of all others."""
    state = np.random.SeedSequence([seed, _STREAMS[stream], *place]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)


class StepBatches(Sampler[list[int]]):
    """Indices of each micro-batch from a step on: a fresh shuffle of the data every epoch.

    Batches run across the end of an epoch, so that all have one size.

    Args:
        num_samples: size of the data set.
        batch_size: samples of one step, over all processes and micro-batches.
        chunks: numbers of this process's micro-batches among all those of a step.
        num_chunks: micro-batches of a step, over all processes.
        steps: the steps to serve.
        seed: of the shuffle.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        chunks: range,
        num_chunks: int,
        steps: range,
        seed: int,
    ):
        if batch_size % num_chunks:
            raise ValueError(
                f"data.batch_size {batch_size} cannot be cut into {num_chunks} equal micro-batches "
                f"(processes x train.accumulation); use a multiple of {num_chunks}"
            )
        self.num_samples, self.batch_size = num_samples, batch_size
        self.chunks, self.num_chunks = chunks, num_chunks
        self.steps, self.seed = steps, seed

    def __len__(self) -> int:
        return len(self.steps) * len(self.chunks)

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size // self.num_chunks
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in self.steps:
            for chunk in self.chunks:
                indices = []
                first = step * self.batch_size + chunk * size
                for position in range(first, first + size):
                    if position // self.num_samples != epoch:
                        epoch = position // self.num_samples
                        shuffle = generator(self.seed, "order", epoch)
                        order = torch.randperm(self.num_samples, generator=shuffle)
                    indices.append(int(order[position % self.num_samples]))
                yield indices
