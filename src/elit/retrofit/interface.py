"""Modules that a retrofit adds, all under the prefix `elit` of the transformer.

`LosslessRead` and `LosslessWrite` change nothing at full budget: ours, beyond the paper. At n
latents per group the group is cut into n cells. A latent starts as the mean of its cell's tokens,
and each token takes back what the core added to its cell's latent. With one token in each cell the
core works on the tokens themselves. What is learned on top, a grouped cross-attention and an MLP
as in the paper, counts below full budget only: whatever it has learned, the model at full budget
stays the original.
"""

from typing import Any

import torch
from torch import Tensor, nn

from elit.interface.grid import TokenGrid
from elit.interface.initial import open_gates, zero_
from elit.interface.read_write import Read, Write
from elit.layers import transformer as parts
from elit.layers.transformer import layer_norm, modulate
from elit.retrofit.places import LatentPlaces
from elit.retrofit.settings import Init


class LatentInterface(nn.Module):
    """Read and Write of a retrofitted transformer, and the noise level that both are told.

    Args:
        dim: D, width of the transformer's tokens.
        num_heads: attention heads.
        max_latents: J, tokens of a group.
        init: "identity" changes nothing at full budget; "learned" is the paper's.
        adapters: of the blocks, or none.
    """

    def __init__(
        self, dim: int, num_heads: int, max_latents: int, init: Init,
        adapters: nn.ModuleList | None = None,
    ):  # fmt: skip
        super().__init__()
        self.adapters = adapters
        self.dim, self.max_latents = dim, max_latents
        self.is_lossless = init == "identity"
        self.time_embed = parts.TimestepEmbedding(dim)
        read, write = (LosslessRead, LosslessWrite) if self.is_lossless else (Read, Write)
        self.read: nn.Module = read(dim, num_heads, max_latents)
        self.write: nn.Module = write(dim, num_heads, max_latents)

    def condition(self, noise_level: Tensor, batch_size: int) -> Tensor:
        """(B,) in [0, 1], or one for all, or one for each token (B, N) -> (B, D)."""
        if noise_level.ndim > 1:
            noise_level = noise_level.flatten(1).mean(1)
        return self.time_embed(noise_level.expand(batch_size))

    def into_latents(
        self, groups: Tensor, condition: Tensor | None, grid: TokenGrid, places: LatentPlaces
    ) -> Tensor:
        """Tokens (B, G, P, D) -> latents (B, G * n, D), group by group."""
        if self.is_lossless:
            return self.read(groups, condition, places)
        # A length, not a number: one compiled graph serves all.
        num_latents = places.index.shape[0] // grid.num_groups
        return self.read(groups.flatten(1, 2), condition, grid, num_latents)

    def into_tokens(
        self, groups: Tensor, latents_in: Tensor, latents_out: Tensor, condition: Tensor | None,
        grid: TokenGrid, places: LatentPlaces,
    ) -> Tensor:  # fmt: skip
        """Tokens that entered Read, latents before and after the core -> (B, G, P, D)."""
        if self.is_lossless:
            return self.write(groups, latents_in, latents_out, condition, places)
        return self.write(groups.flatten(1, 2), latents_out, condition, grid).view_as(groups)


class _Exchange(nn.Module):
    """Parts of a lossless Read or Write."""

    def __init__(self, dim: int, num_heads: int, max_latents: int):
        super().__init__()
        self.latent_index = nn.Parameter(torch.empty(max_latents, dim))  # tells latents apart
        self.token_place = nn.Parameter(torch.empty(max_latents, dim))  # place within the group
        self.modulation = parts.AdaLNZero(dim, num_layers=1)
        self.attention = parts.CrossAttention(dim, num_heads)
        self.mlp = parts.MLP(dim, ratio=1)

    def reset_parameters(self) -> None:
        """Add nothing at first, but learn at once: gates open, last layers zero."""
        for embedding in (self.latent_index, self.token_place):
            nn.init.normal_(embedding, std=0.02)
        open_gates(self.modulation)
        last: Any = self.mlp[-1]
        zero_(self.attention.to_out)
        zero_(last)

    def modulations(self, condition: Tensor, places: LatentPlaces) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, scale and gate, (B, 1, D) each; the gate is zero at full budget."""
        ((shift, scale, gate),) = self.modulation(condition)
        return shift, scale, gate * places.reduced.to(gate.dtype)

    def gather(
        self, x: Tensor, queries: Tensor, context: Tensor, mark: Tensor,
        modulation: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:  # fmt: skip
        """Let x (B, G*m, D) take from a context (B, G, k, D), then from an MLP: what is learned."""
        shift, scale, gate = modulation
        update = self.attention(queries.flatten(0, 1), context.flatten(0, 1))  # (B*G, m, D)
        x = torch.addcmul(x, gate, update.view_as(x))
        marked = modulate(x, shift, scale).view_as(queries) + mark
        return torch.addcmul(x, gate, self.mlp(marked).flatten(1, 2))


class LosslessRead(_Exchange):
    """Means of the tokens of each cell, and what the latents learn to gather beside them.

    Paper: the queries are learned vectors; here: those are added to the means, which are there.
    """

    def forward(self, groups: Tensor, condition: Tensor | None, places: LatentPlaces) -> Tensor:
        """Tokens (B, G, P, D), condition (B, D) -> latents (B, G * n, D), group by group.

        A condition of None leaves out what is learned, at full budget, where it counts nothing.
        """
        num_latents = places.index.shape[0] // groups.shape[1]
        if condition is None:  # each cell has one token
            return groups.index_select(2, places.cell.argsort()).flatten(1, 2)  # (B, G*n, D)

        means = cell_means(groups, places.cell, num_latents)  # (B, G, n, D)
        shift, scale, gate = self.modulations(condition, places)
        index = self.latent_index[:num_latents]
        context = modulate(groups.flatten(1, 2), shift, scale).view_as(groups) + self.token_place
        queries = layer_norm(means) + index  # (B, G, n, D)
        return self.gather(means.flatten(1, 2), queries, context, index, (shift, scale, gate))


class LosslessWrite(_Exchange):
    """The core's update of each cell's latent, and what the tokens learn to take back beside it."""

    def forward(
        self, groups: Tensor, latents_in: Tensor, latents_out: Tensor, condition: Tensor | None,
        places: LatentPlaces,
    ) -> Tensor:  # fmt: skip
        """Tokens as they entered Read, latents before and after the core -> (B, G, P, D).

        A condition of None leaves out what is learned, at full budget, where it counts nothing.
        """
        by_group = (groups.shape[1], -1)
        before, after = latents_in.unflatten(1, by_group), latents_out.unflatten(1, by_group)
        # The difference is zero at full budget, so that nothing is rounded there.
        rest = groups - before.index_select(2, places.cell)
        tokens = (after.index_select(2, places.cell) + rest).flatten(1, 2)  # (B, G*P, D)
        if condition is None:
            return tokens.view_as(groups)

        shift, scale, gate = self.modulations(condition, places)
        queries = modulate(tokens, shift, scale).view_as(groups) + self.token_place
        context = layer_norm(after) + self.latent_index[: after.shape[2]]  # (B, G, n, D)
        modulation = (shift, scale, gate)
        return self.gather(tokens, queries, context, self.token_place, modulation).view_as(groups)


def cell_means(groups: Tensor, cell: Tensor, num_latents: int) -> Tensor:
    """(B, G, P, D), the cell of each of the P -> (B, G, n, D), means of the cells."""
    cells = torch.arange(num_latents, device=cell.device)[:, None] == cell  # (n, P)
    # Ones and zeros first: a cell of one token then gives exactly this token.
    sums = cells.to(groups.dtype) @ groups
    return sums / cells.sum(1, keepdim=True).to(groups.dtype)
