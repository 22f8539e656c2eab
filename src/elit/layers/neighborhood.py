"""Neighbourhood attention: every token attends to the k nearest along each axis.

Near a border the neighbourhood is shifted inwards, not cut: every token has k neighbours along each
axis, or all where the grid is smaller. Tokens are ordered tile by tile, so that the queries of a
tile are contiguous; a tile's queries share one slab of keys, from which a mask picks those of each.
"""

import importlib.util
import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from elit.layers.sizes import slab_size, tile_size
from elit.layers.transformer import Rotary, SelfAttention, TransformerBlock


class Neighborhood(NamedTuple):
    """Neighbours and rotations of tokens: what `NeighborhoodAttention` needs of the grid."""

    rotary: Rotary  # of the tokens, tile by tile
    size: tuple[int, ...]  # tokens along each axis
    tile: tuple[int, ...]  # tokens of a tile along each axis
    kernel: tuple[int, ...]  # neighbours along each axis
    keys: Tensor  # (T, S) numbers of the tokens in each tile's slab
    mask: Tensor  # (T, Q, S), whether a query of the tile sees a key of the slab


def neighborhood(
    places: Tensor, size: tuple[int, ...], kernel: int, rotary: Rotary
) -> Neighborhood:
    """Neighbourhoods on a grid; places (N, axes) and rotations are ordered tile by tile."""
    tile = tile_size(size)
    kernels = tuple(min(kernel, n) for n in size)
    queries = places.long()  # (N, axes)
    order = torch.zeros(size, dtype=torch.long, device=places.device)
    order[tuple(queries.unbind(1))] = torch.arange(queries.shape[0], device=places.device)
    per_tile = queries.view(-1, math.prod(tile), len(size))  # (T, Q, axes)

    tiles, count = per_tile.shape[:2]
    keys = torch.zeros(tiles, 1, dtype=torch.long, device=places.device)
    mask = torch.ones(tiles, count, 1, dtype=torch.bool, device=places.device)
    slabs_of = zip(size, slab_size(size, kernel), kernels, strict=True)
    for axis, (n, slab, k) in enumerate(slabs_of):
        half, along = k // 2, per_tile[:, :, axis]  # (T, Q)
        offsets = torch.arange(slab, device=places.device)
        seen = (along[:, 0] - half).clamp(0, n - slab)[:, None] + offsets  # (T, s)
        first = (along - half).clamp(0, n - k)[:, :, None]  # (T, Q, 1)
        visible = (seen[:, None] >= first) & (seen[:, None] < first + k)  # (T, Q, s)
        keys = (keys[:, :, None] * n + seen[:, None]).flatten(1)
        mask = (mask[..., None] & visible[:, :, None]).flatten(2)
    return Neighborhood(rotary, size, tile, kernels, order.flatten()[keys], mask)


class NeighborhoodAttention(SelfAttention):
    """Self-attention within neighbourhoods; the tokens come tile by tile.

    Runs on any device; where NATTEN is installed, CUDA images go through its kernel, unless the
    grid is narrower than the neighbourhood.
    """

    def forward(self, x: Tensor, near: Neighborhood) -> Tensor:  # type: ignore[override]
        """(B, N, D) and the neighbourhoods -> (B, N, D)."""
        q, k, v = self.project(x, near.rotary)  # (B, N, H, d) each
        usual = len(near.size) == 2 and all(k > 1 and k % 2 for k in near.kernel)
        use_natten = x.is_cuda and usual and _has_natten()
        attend = attend_natten if use_natten else attend_neighborhood
        return self.to_out(attend(q, k, v, near))  # (B, N, D)


@cache
def _has_natten() -> bool:
    return importlib.util.find_spec("natten") is not None


def attend_neighborhood(query: Tensor, key: Tensor, value: Tensor, near: Neighborhood) -> Tensor:
    """Softmax attention within neighbourhoods: (B, N, H, d) each -> (B, N, H*d)."""
    batch, (tiles, count, _) = query.shape[0], near.mask.shape
    query = query.unflatten(1, (tiles, count)).flatten(0, 1).transpose(1, 2)  # (B*T, H, Q, d)
    key, value = slabs(key, near), slabs(value, near)  # (B*T, H, S, d)
    mask = near.mask.repeat(batch, 1, 1)[:, None]  # (B*T, 1, Q, S)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).reshape(batch, tiles * count, -1)  # (B, N, H*d)


def slabs(x: Tensor, near: Neighborhood) -> Tensor:
    """The tokens that each tile's queries look at: (B, N, H, d) -> (B*T, H, S, d)."""
    first = torch.arange(x.shape[0], device=x.device) * x.shape[1]  # (B,), of each sample
    rows = (first[:, None] + near.keys.flatten()).flatten()  # (B*T*S,)
    # Of whole rows and one axis: several times as fast as x[:, near.keys].
    x = x.reshape(-1, x.shape[2] * x.shape[3]).index_select(0, rows).unflatten(-1, x.shape[2:])
    return x.unflatten(0, (-1, near.keys.shape[1])).transpose(1, 2)


def attend_natten(query: Tensor, key: Tensor, value: Tensor, near: Neighborhood) -> Tensor:
    """The same by NATTEN, for images."""
    import natten

    grids = [to_rows(x, near) for x in (query, key, value)]  # (B, h, w, H, d) each
    return from_rows(natten.na2d(*grids, kernel_size=near.kernel), near).flatten(2)


def to_rows(x: Tensor, near: Neighborhood) -> Tensor:
    """Tile by tile (B, N, H, d) -> row by row (B, h, w, H, d), as NATTEN has it."""
    lengths = {"n0": near.tile[0], "n1": near.tile[1], "g0": near.size[0] // near.tile[0]}
    return rearrange(x, "b (g0 g1 n0 n1) h d -> b (g0 n0) (g1 n1) h d", **lengths)


def from_rows(x: Tensor, near: Neighborhood) -> Tensor:
    """Back again."""
    lengths = {"n0": near.tile[0], "n1": near.tile[1]}
    return rearrange(x, "b (g0 n0) (g1 n1) h d -> b (g0 g1 n0 n1) h d", **lengths)


class NeighborhoodBlock(TransformerBlock):
    """A block whose tokens attend to those near them; its third argument is a Neighborhood."""

    attention_class = NeighborhoodAttention
