"""Token grids and their groups, in two and three dimensions.

Tokens are ordered group by group from the first layer to the last, so that grouping them is a
reshape of contiguous memory; only patchify and unpatchify know where a token lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from einops import rearrange

from elit.interface.fit import check_fit

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
        check_fit(self.size, self.group)

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
        space, tokens, patch, lengths = self.axes(patch_size)
        return rearrange(x, f"b c {space} -> b ({tokens}) (c {patch})", **lengths)

    def unpatchify(self, tokens: Tensor, patch_size: tuple[int, ...]) -> Tensor:
        """(B, N, C * patch), group by group -> (B, C, *space)."""
        space, names, patch, lengths = self.axes(patch_size)
        return rearrange(tokens, f"b ({names}) (c {patch}) -> b c {space}", **lengths)

    def token_places(self, device: torch.device | str | None = None) -> Tensor:
        """Place of every token on the grid, (N, axes) float32, group by group."""
        import torch

        axes = [torch.arange(n, device=device, dtype=torch.float32) for n in self.size]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # (axes, *size)
        return self.patchify(places[None], (1,) * len(self.size))[0]  # (N, axes)

    def latent_places(self, num_latents: int, device: torch.device | str | None = None) -> Tensor:
        """Place of every latent, (G * num_latents, axes): the centre of its group."""
        places = self.token_places(device).unflatten(0, (self.num_groups, -1))  # (G, P, axes)
        # What repeat_interleave would give, which ONNX cannot by a number that is not known yet.
        return places.mean(1, keepdim=True).expand(-1, num_latents, -1).flatten(0, 1)

    def axes(self, patch_size: tuple[int, ...]) -> tuple[str, str, str, dict[str, int]]:
        """Names of axes for einops, of an input, its tokens and a patch, and their lengths.

        g are groups along an axis, n tokens of a group along it, p elements of a patch along it.
        """
        axes = range(len(self.size))
        space = " ".join(f"(g{i} n{i} p{i})" for i in axes)
        groups, tokens, patch = (" ".join(f"{name}{i}" for i in axes) for name in "gnp")
        lengths = {f"g{i}": self.size[i] // self.group[i] for i in axes}
        lengths |= {f"n{i}": self.group[i] for i in axes}
        lengths |= {f"p{i}": patch_size[i] for i in axes}
        return space, f"{groups} {tokens}", patch, lengths
