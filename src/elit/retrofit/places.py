"""Tokens of a group that a latent stands for, and the one whose position it takes.

At n latents per group the group is cut into n cells, one for each latent: halves, quarters, and
so on down to single tokens. A foreign model knows positions only of its tokens, so each latent
takes that of one token of its cell, the same at all n: any first few latents cover the group
evenly, from coarse to fine.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from elit.interface.grid import TokenGrid
from elit.interface.raster import to_groups


@dataclass(frozen=True)
class LatentPlaces:
    """Tokens that the latents of a grid stand for, at a number of latents per group."""

    index: Tensor  # (G * n,) token, in raster order, whose position each latent takes
    cell: Tensor  # (P,) latent of the group in whose cell each of its tokens lies
    # () 1 below full budget, 0 at it: the factor of all that is learned. A tensor, because a
    # number would be compiled into a graph.
    reduced: Tensor


Cell = tuple[tuple[int, int, int], ...]
"""A box of tokens along each axis, from a start to before a stop, and the one that is its place."""


def _halve(cell: Cell) -> list[Cell]:
    """The half with the place, and the other one with a place shifted by half the cell."""
    sizes = [stop - start for start, stop, _ in cell]
    axis = sizes.index(max(sizes))
    start, stop, at = cell[axis]
    half = (sizes[axis] + 1) // 2
    low, high = (start, start + half), (start + half, stop)
    if at < start + half:
        cuts = (*low, at), (*high, min(at + half, stop - 1))
    else:
        cuts = (*high, at), (*low, max(at - half, start))
    return [(*cell[:axis], cut, *cell[axis + 1 :]) for cut in cuts]


@lru_cache(maxsize=1024)
def _cells(group: tuple[int, ...], num_latents: int) -> list[Cell]:
    """The cells of a group, in the order of the latents."""
    cells: list[Cell] = [tuple((0, n, (n - 1) // 2) for n in group)]
    while len(cells) < num_latents:
        sizes = [math.prod(stop - start for start, stop, _ in cell) for cell in cells]
        largest = sizes.index(max(sizes))
        cells[largest], new = _halve(cells[largest])
        cells.append(new)
    return cells


def latent_places(
    grid: TokenGrid, num_latents: int, device: torch.device, central: bool = False
) -> LatentPlaces:
    """Places and cells at `num_latents` per group. At full budget each token has its latent.

    With `central` all latents take the position of the token nearest to their group's centre.
    Paper: the centre itself; here: a token, because those alone have positions.
    """
    with unset_fake_temporarily():  # what torch.export traces would be remembered for real calls
        return _latent_places(grid, num_latents, str(device), central)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # training may meet them after sampling made them
def _latent_places(grid: TokenGrid, num_latents: int, device: str, central: bool) -> LatentPlaces:
    cell = torch.empty(grid.group, dtype=torch.long)
    places = torch.empty(num_latents, dtype=torch.long)
    numbers = torch.arange(grid.tokens_per_group).view(grid.group)
    for latent, box in enumerate(_cells(grid.group, num_latents)):
        cell[tuple(slice(start, stop) for start, stop, _ in box)] = latent
        places[latent] = numbers[tuple(at for _, _, at in box)]
    if central:
        places = places[:1].expand(num_latents)
    tokens = torch.arange(grid.num_tokens)[None, :, None]
    raster = to_groups(grid, tokens)[0, :, :, 0]  # (G, P): each token's number in raster order
    reduced = torch.tensor(float(num_latents < grid.tokens_per_group))
    index = raster[:, places].flatten()
    return LatentPlaces(*(x.to(device) for x in (index, cell.flatten(), reduced)))
