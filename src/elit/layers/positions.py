"""Rotary position embedding over any number of axes: (h, w) of an image, (t, h, w) of a clip."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Rotation of every token: (N, 1, d) each, the first half of the sines negated."""

    cos: Tensor
    sin: Tensor


def rotary_embedding(places: Tensor, head_dim: int, theta: float) -> Rotary:
    """Tables that rotate pairs of features by angles proportional to a token's place.

    The d/2 pairs are dealt out to the axes evenly, the last axes getting one more where it does
    not come out even. Feature i is paired with i + d/2.

    Args:
        places: (N, axes) float32, in units of tokens.
        head_dim: d, even.
        theta: base of the geometric series of wavelengths.
    """
    angles = []
    for axis, count in enumerate(pairs_per_axis(head_dim, places.shape[-1])):
        exponents = torch.arange(count, device=places.device, dtype=torch.float32) / count
        angles.append(places[:, axis, None] * theta**-exponents)  # (N, count)
    angle = torch.cat(angles, dim=-1)[:, None]  # (N, 1, d/2)
    cos, sin = angle.cos(), angle.sin()
    return Rotary(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def pairs_per_axis(head_dim: int, num_axes: int) -> list[int]:
    """How many pairs of features each axis turns, of heads of width `head_dim`."""
    pairs = head_dim // 2
    if head_dim % 2 or pairs < num_axes:
        raise ValueError(
            f"heads of width {head_dim} cannot carry rotary positions of {num_axes} axes; "
            f"use an even width of at least {2 * num_axes} (hidden_size / num_heads)"
        )
    return [pairs // num_axes + (axis >= num_axes - pairs % num_axes) for axis in range(num_axes)]


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate x (B, N, H, d) in the tables' float32."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * rotary.cos, torch.cat((second, first), dim=-1), rotary.sin)
