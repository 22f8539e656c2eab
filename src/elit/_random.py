"""Generators of random numbers as a function of a seed and a place."""

import numpy as np
import torch

_STREAMS = ("order", "budget", "noise", "validation", "sheet", "weights", "bucket")


def seed_of(seed: int, stream: str, *place: int) -> int:
    """Seed of a stream at a place, such as (step, micro-batch), independent of all others."""
    sequence = np.random.SeedSequence([seed, _STREAMS.index(stream), *place])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def generator(
    seed: int, stream: str, *place: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Generator with that seed."""
    return torch.Generator(device).manual_seed(seed_of(seed, stream, *place))
