"""Tokens of a group that a latent stands for, and the one whose position it takes.

At n latents per group the group is cut into n cells, one for each latent: halves, quarters, and
so on down to single tokens. A foreign model knows positions only of its tokens, so each latent
takes that of one token of its cell, the same at all n: any first few latents cover the group
evenly, from coarse to fine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class _Cell:
    """A box of tokens, from `start` to before `stop`, and the one of them that gives its place."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    place: tuple[int, ...]

    @property
    def size(self) -> list[int]:
        return [stop - start for start, stop in zip(self.start, self.stop, strict=True)]

    def halves(self) -> tuple["_Cell", "_Cell"]:
        """The half with the place, and the other one with a place shifted by half the cell."""
        size = self.size
        axis = size.index(max(size))
        start, stop, at, half = (
            self.start[axis], self.stop[axis], self.place[axis], (size[axis] + 1) // 2
        )  # fmt: skip
        low = replace(self, stop=_put(self.stop, axis, start + half))
        high = replace(self, start=_put(self.start, axis, start + half))
        if at < start + half:
            return low, replace(high, place=_put(self.place, axis, min(at + half, stop - 1)))
        return high, replace(low, place=_put(self.place, axis, max(at - half, start)))


def _put(values: Sequence[int], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


@lru_cache(maxsize=1024)
def _cells(group: tuple[int, ...], num_latents: int) -> tuple[_Cell, ...]:
    """The cells of a group, in the order of the latents."""
    cells = [_Cell((0,) * len(group), group, tuple((n - 1) // 2 for n in group))]
    while len(cells) < num_latents:
        sizes = [math.prod(cell.size) for cell in cells]
        largest = sizes.index(max(sizes))
        cells[largest], new = cells[largest].halves()
        cells.append(new)
    return tuple(cells)


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
        cell[tuple(map(slice, box.start, box.stop))] = latent
        places[latent] = numbers[box.place]
    if central:
        places = places[:1].expand(num_latents)
    tokens = torch.arange(grid.num_tokens)[None, :, None]
    raster = to_groups(grid, tokens)[0, :, :, 0]  # (G, P): each token's number in raster order
    reduced = torch.tensor(float(num_latents < grid.tokens_per_group))
    index = raster[:, places].flatten()
    return LatentPlaces(*(x.to(device) for x in (index, cell.flatten(), reduced)))
