"""adaLN-Zero: a condition shifts and scales what enters a layer and gates what leaves it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.layers.initialisation import zero_


class Modulation(NamedTuple):
    """Shift, scale and gate of one layer, (B, 1, D) each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class AdaLNZero(nn.Module):
    """Modulations of `num_layers` layers from one condition, all zero at initialisation.

    Args:
        dim: width of the layers.
        num_layers: layers to modulate.
        condition_dim: width of the condition; by default that of the layers.
    """

    def __init__(self, dim: int, num_layers: int, condition_dim: int | None = None):
        super().__init__()
        self.shape = (num_layers, 3, dim)
        self.linear = nn.Linear(condition_dim or dim, 3 * num_layers * dim)

    def reset_parameters(self) -> None:
        """Gate everything off."""
        zero_(self.linear)

    def open_gates(self, gate: float = 1.0) -> None:
        """Start with gates of this value instead, whatever the condition."""
        nn.init.constant_(self.linear.bias.view(self.shape)[:, 2], gate)

    def forward(self, condition: Tensor) -> list[Modulation]:
        chunks = self.linear(condition)[:, None].unflatten(-1, self.shape)
        return [Modulation(*layer.unbind(2)) for layer in chunks.unbind(2)]  # (B, 1, D) each


def layer_norm(x: Tensor) -> Tensor:
    """Layer normalisation without parameters: the modulation has them."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise x (B, N, D), then scale and shift it."""
    return torch.addcmul(shift, layer_norm(x), 1 + scale)


def gated_add(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update, in one pass over memory."""
    return torch.addcmul(x, gate, update)
