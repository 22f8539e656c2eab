"""Tokens in raster order, as foreign models and pictures have them, and group by group."""

from einops import rearrange
from torch import Tensor

from elit.interface.grid import TokenGrid


def to_groups(grid: TokenGrid, tokens: Tensor) -> Tensor:
    """(B, N, D) in raster order -> (B, G, P, D)."""
    raster, grouped, lengths = _orders(grid)
    groups = rearrange(tokens, f"b ({raster}) d -> b ({grouped}) d", **lengths)
    return groups.unflatten(1, (grid.num_groups, -1))


def from_groups(grid: TokenGrid, groups: Tensor) -> Tensor:
    """(B, G, P, D) -> (B, N, D) in raster order."""
    raster, grouped, lengths = _orders(grid)
    return rearrange(groups.flatten(1, 2), f"b ({grouped}) d -> b ({raster}) d", **lengths)


def _orders(grid: TokenGrid) -> tuple[str, str, dict[str, int]]:
    """The axes of a grid for einops, in both orders, and their lengths."""
    space, tokens, patch, lengths = grid.axes((1,) * len(grid.size))
    return space.replace("(", "").replace(")", ""), f"{tokens} {patch}", lengths
