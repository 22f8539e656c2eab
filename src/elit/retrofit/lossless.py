"""Read and Write that change nothing at full budget: ours, beyond the paper.

At n latents per group the group is cut into n cells. A latent starts as the mean of its cell's
tokens, and each token takes back what the core added to its cell's latent. With one token in each
cell the core works on the tokens themselves. What is learned on top, a grouped cross-attention
and an MLP as in the paper, is multiplied by the share of latents that are missing, 1 - n / J: it
is nothing at full budget, whatever it has learned.
"""

import torch
from torch import Tensor, nn

from elit.layers.attention import CrossAttention
from elit.layers.block import MLP
from elit.layers.modulation import AdaLNZero, gated_add, layer_norm, modulate
from elit.retrofit.places import LatentPlaces


class LosslessRead(nn.Module):
    """Means of the tokens of each cell, and what the latents learn to gather beside them."""

    def __init__(self, dim: int, num_heads: int, max_latents: int):
        super().__init__()
        self.max_latents = max_latents
        self.latent_index = nn.Parameter(torch.empty(max_latents, dim))  # tells them in the core
        self.token_place = nn.Parameter(torch.empty(max_latents, dim))  # place within the group
        self.modulation = AdaLNZero(dim, num_layers=1)
        self.attention = CrossAttention(dim, num_heads)
        self.mlp = MLP(dim, ratio=1)

    def reset_parameters(self) -> None:
        """Start the learned vectors small."""
        for embedding in (self.latent_index, self.token_place):
            nn.init.normal_(embedding, std=0.02)

    def forward(self, groups: Tensor, condition: Tensor, places: LatentPlaces) -> Tensor:
        """Tokens (B, G, P, D), condition (B, D) -> latents (B, G * n, D), group by group."""
        batch_size, num_groups, _, dim = groups.shape
        num_latents = len(places.index) // num_groups
        missing = places.missing.to(groups.dtype)

        latents = cell_means(groups, places.cell, num_latents)  # (B, G, n, D)
        ((shift, scale, gate),) = self.modulation(condition)
        index = self.latent_index[:num_latents]
        context = modulate(groups.flatten(1, 2), shift, scale).view_as(groups) + self.token_place
        queries = layer_norm(latents) + index
        update = self.attention(queries.flatten(0, 1), context.flatten(0, 1))  # (B*G, n, D)
        latents = (latents + missing * index).view(batch_size, -1, dim)  # (B, G*n, D)
        gate = missing * gate
        latents = gated_add(latents, gate, update.view_as(latents))
        return gated_add(latents, gate, self.mlp(modulate(latents, shift, scale)))


class LosslessWrite(nn.Module):
    """The core's update of each cell's latent, and what the tokens learn to take back beside it."""

    def __init__(self, dim: int, num_heads: int, max_latents: int):
        super().__init__()
        self.max_latents = max_latents
        self.token_place = nn.Parameter(torch.empty(max_latents, dim))  # within the group
        self.modulation = AdaLNZero(dim, num_layers=1)
        self.attention = CrossAttention(dim, num_heads)
        self.mlp = MLP(dim, ratio=1)

    def reset_parameters(self) -> None:
        """Start the learned vectors small."""
        nn.init.normal_(self.token_place, std=0.02)

    def forward(
        self,
        groups: Tensor,
        latents_in: Tensor,
        latents_out: Tensor,
        condition: Tensor,
        places: LatentPlaces,
    ) -> Tensor:
        """Tokens as they entered Read, latents before and after the core -> (B, G, P, D)."""
        by_group = (groups.shape[1], -1)
        before, after = latents_in.unflatten(1, by_group), latents_out.unflatten(1, by_group)
        missing = places.missing.to(groups.dtype)
        # The difference is zero at full budget, so that nothing is rounded there.
        rest = groups - before.index_select(2, places.cell)
        tokens = (after.index_select(2, places.cell) + rest).flatten(1, 2)  # (B, G*P, D)

        ((shift, scale, gate),) = self.modulation(condition)
        gate = missing * gate
        queries = modulate(tokens, shift, scale).view_as(groups) + self.token_place
        context = layer_norm(after).flatten(0, 1)  # (B*G, n, D)
        update = self.attention(queries.flatten(0, 1), context)  # (B*G, P, D)
        tokens = gated_add(tokens, gate, update.view_as(tokens))
        queries = modulate(tokens, shift, scale).view_as(groups) + self.token_place
        update = self.mlp(queries).view_as(tokens)
        return gated_add(tokens, gate, update).view_as(groups)


def cell_means(groups: Tensor, cell: Tensor, num_latents: int) -> Tensor:
    """(B, G, P, D), the cell of each of the P -> (B, G, n, D), means of the cells."""
    cells = torch.arange(num_latents, device=cell.device)[:, None] == cell  # (n, P)
    # Ones and zeros first: a cell of one token then gives exactly this token.
    sums = cells.to(groups.dtype) @ groups
    return sums / cells.sum(1, keepdim=True).to(groups.dtype)
