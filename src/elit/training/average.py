"""The moving average of a run's weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class Average:
    """Exponential moving average of parameters, in shards where they are.

    Args:
        parameters: those that are trained.
        decay: of the average, ramped up from 0.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters = list(parameters)
        self.ema = EMAModel(self.parameters, decay=decay, foreach=True)

    @property
    def weights(self) -> list[Tensor]:
        """The averages, in the order of the parameters."""
        return self.ema.shadow_params

    @property
    def steps(self) -> int:
        """Steps that have gone into it; they set the decay."""
        return self.ema.optimization_step

    @steps.setter
    def steps(self, steps: int) -> None:
        self.ema.optimization_step = steps

    def step(self) -> None:
        """Move towards the parameters."""
        self.ema.step(self.parameters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold their averages, and the averages the parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange both, a tensor at a time: a whole copy may not fit."""
        for weight, average in zip(self.parameters, self.weights, strict=True):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)
