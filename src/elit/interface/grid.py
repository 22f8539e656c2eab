"""Token grids and their groups, in two and three dimensions.

Tokens are ordered group by group from the first layer to the last, so that grouping them is a
reshape of contiguous memory; only patchify and unpatchify know where a token lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from einops import rearrange

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def format_size(size: Sequence[int]) -> str:
    """(4, 16, 16) -> '4x16x16'."""
    return "x".join(map(str, size))


@dataclass(frozen=True)
class TokenGrid:
    """A (t,) h, w grid of tokens, cut into equal rectangular groups.

    Attributes:
        size: tokens along each axis.
        group: tokens of one group along each axis; the whole size means one group.
    """

    size: tuple[int, ...]
    group: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.group) != len(self.size):
            raise ValueError(
                f"a grid of {len(self.size)} axes ({format_size(self.size)}) cannot be cut into "
                f"groups of {len(self.group)} ({format_size(self.group)}); "
                f"give a group of {len(self.size)} numbers"
            )
        for tokens, per_group in zip(self.size, self.group, strict=True):
            if tokens < 1 or per_group < 1 or tokens % per_group:
                raise ValueError(self._misfit(tokens, per_group))

    @classmethod
    def of_input(
        cls, space: Sequence[int], patch_size: Sequence[int], group: Sequence[int] | None
    ) -> TokenGrid:
        """Grid of an input of size (t,) h, w; without groups its tokens are one group."""
        sizes = list(zip(space, patch_size, group or (1,) * len(space), strict=True))
        if any(n % p for n, p, _ in sizes):
            nearest = [math.ceil(n / (p * g)) * p * g for n, p, g in sizes]
            raise ValueError(
                f"input of size {format_size(space)} cannot be cut into patches of "
                f"{format_size(patch_size)}; resize or pad it to {format_size(nearest)}"
            )
        size = tuple(n // p for n, p, _ in sizes)
        return cls(size, tuple(group or size))

    def _misfit(self, tokens: int, per_group: int) -> str:
        grid = f"a grid of {format_size(self.size)} tokens cannot be cut into groups of "
        if tokens < 1 or per_group < 1:
            return f"{grid}{format_size(self.group)}; every number must be at least 1"
        padded = [math.ceil(n / g) * g for n, g in zip(self.size, self.group, strict=True)]
        fitting = [
            max(d for d in range(1, g + 1) if n % d == 0)
            for n, g in zip(self.size, self.group, strict=True)
        ]
        return (
            f"{grid}{format_size(self.group)}: {tokens} is not a multiple of {per_group}; "
            f"resize or pad the input to {format_size(padded)} tokens, "
            f"or use a model with group=({', '.join(map(str, fitting))})"
        )

    @property
    def num_tokens(self) -> int:
        """N."""
        return math.prod(self.size)

    @property
    def tokens_per_group(self) -> int:
        """P, which is also J, the latents per group at full budget."""
        return math.prod(self.group)

    @property
    def num_groups(self) -> int:
        """G."""
        return self.num_tokens // self.tokens_per_group

    def patchify(self, x: Tensor, patch_size: tuple[int, ...]) -> Tensor:
        """(B, C, *space) -> (B, N, C * patch), group by group."""
        names, lengths = self._lengths(patch_size)
        return rearrange(x, f"b c {names.space} -> b {names.tokens} (c {names.patch})", **lengths)

    def unpatchify(self, tokens: Tensor, patch_size: tuple[int, ...]) -> Tensor:
        """(B, N, C * patch), group by group -> (B, C, *space)."""
        names, lengths = self._lengths(patch_size)
        pattern = f"b {names.tokens} (c {names.patch}) -> b c {names.space}"
        return rearrange(tokens, pattern, **lengths)

    def to_groups(self, tokens: Tensor) -> Tensor:
        """(B, N, D) in raster order -> (B, G, P, D), as a foreign model's tokens are grouped."""
        names, lengths = self._lengths()
        grouped = rearrange(tokens, f"b ({names.raster}) d -> b {names.tokens} d", **lengths)
        return grouped.unflatten(1, (self.num_groups, -1))

    def from_groups(self, groups: Tensor) -> Tensor:
        """(B, G, P, D) -> (B, N, D) in raster order."""
        names, lengths = self._lengths()
        pattern = f"b {names.tokens} d -> b ({names.raster}) d"
        return rearrange(groups.flatten(1, 2), pattern, **lengths)

    def token_places(self, device: torch.device | str | None = None) -> Tensor:
        """Place of every token on the grid, (N, axes) float32, group by group."""
        import torch

        axes = [torch.arange(n, device=device, dtype=torch.float32) for n in self.size]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # (axes, *size)
        return self.patchify(places[None], (1,) * len(self.size))[0]  # (N, axes)

    def latent_places(self, num_latents: int, device: torch.device | str | None = None) -> Tensor:
        """Place of every latent, (G * num_latents, axes): the centre of its group."""
        places = self.token_places(device).unflatten(0, (self.num_groups, -1))  # (G, P, axes)
        return places.mean(1).repeat_interleave(num_latents, dim=0)

    def _lengths(self, patch_size: tuple[int, ...] = ()) -> tuple[_Names, dict[str, int]]:
        """The einops names of all axes, and the lengths that einops cannot infer."""
        names = _NAMES[len(self.size)]
        lengths = {}
        for axis, (tokens, per_group) in enumerate(zip(self.size, self.group, strict=True)):
            lengths[f"g{axis}"] = tokens // per_group
            lengths[f"n{axis}"] = per_group
        return names, lengths | {f"p{axis}": patch for axis, patch in enumerate(patch_size)}


@dataclass(frozen=True)
class _Names:
    """g: groups along an axis, n: tokens of a group along it, p: elements of a patch along it."""

    space: str
    tokens: str
    patch: str
    raster: str


_NAMES = {
    2: _Names("(g0 n0 p0) (g1 n1 p1)", "(g0 g1 n0 n1)", "p0 p1", "g0 n0 g1 n1"),
    3: _Names(
        "(g0 n0 p0) (g1 n1 p1) (g2 n2 p2)",
        "(g0 g1 g2 n0 n1 n2)",
        "p0 p1 p2",
        "g0 n0 g1 n1 g2 n2",
    ),
}
