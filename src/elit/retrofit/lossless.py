"""Read and Write that change nothing at full budget: ours, beyond the paper.

At n latents per group the group is cut into n cells. A latent starts as the mean of its cell's
tokens, and each token takes back what the core added to its cell's latent. With one token in each
cell the core works on the tokens themselves. What is learned on top, a grouped cross-attention
and an MLP as in the paper, counts below full budget only: whatever it has learned, the model at
full budget stays the original.
"""

import torch
from torch import Tensor, nn

from elit.layers.attention import CrossAttention
from elit.layers.block import MLP
from elit.layers.initialisation import zero_
from elit.layers.modulation import AdaLNZero, gated_add, layer_norm, modulate
from elit.retrofit.places import LatentPlaces


class _Exchange(nn.Module):
    """The parts that Read and Write have in common."""

    def __init__(self, dim: int, num_heads: int, max_latents: int):
        super().__init__()
        self.latent_index = nn.Parameter(torch.empty(max_latents, dim))  # tells latents apart
        self.token_place = nn.Parameter(torch.empty(max_latents, dim))  # place within the group
        self.modulation = AdaLNZero(dim, num_layers=1)
        self.attention = CrossAttention(dim, num_heads)
        self.mlp = MLP(dim, ratio=1)

    def reset_parameters(self) -> None:
        """Add nothing at first, but learn at once: gates open, last layers zero."""
        for embedding in (self.latent_index, self.token_place):
            nn.init.normal_(embedding, std=0.02)
        self.modulation.open_gates()
        for last in (self.attention.to_out, self.mlp[-1]):
            assert isinstance(last, nn.Linear)
            zero_(last)

    def modulations(self, condition: Tensor, places: LatentPlaces) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, scale and gate, (B, 1, D) each; the gate is zero at full budget."""
        ((shift, scale, gate),) = self.modulation(condition)
        return shift, scale, gate * places.reduced.to(gate.dtype)


class LosslessRead(_Exchange):
    """Means of the tokens of each cell, and what the latents learn to gather beside them.

    Paper: the queries are learned vectors; here: those are added to the means, which are there.
    """

    def forward(self, groups: Tensor, condition: Tensor | None, places: LatentPlaces) -> Tensor:
        """Tokens (B, G, P, D), condition (B, D) -> latents (B, G * n, D), group by group.

        A condition of None leaves out what is learned, at full budget, where it counts nothing.
        """
        batch_size, num_groups, _, dim = groups.shape
        num_latents = len(places.index) // num_groups
        if condition is None:  # each cell has one token
            return groups.index_select(2, places.cell.argsort()).flatten(1, 2)  # (B, G*n, D)

        means = cell_means(groups, places.cell, num_latents)  # (B, G, n, D)
        latents = means.flatten(1, 2)  # (B, G*n, D)
        shift, scale, gate = self.modulations(condition, places)
        index = self.latent_index[:num_latents]
        context = modulate(groups.flatten(1, 2), shift, scale).view_as(groups) + self.token_place
        queries = (layer_norm(means) + index).flatten(0, 1)  # (B*G, n, D)
        update = self.attention(queries, context.flatten(0, 1))  # (B*G, n, D)
        latents = gated_add(latents, gate, update.view(batch_size, -1, dim))
        known = modulate(latents, shift, scale).unflatten(1, (num_groups, -1)) + index
        return gated_add(latents, gate, self.mlp(known).flatten(1, 2))  # (B, G*n, D)


class LosslessWrite(_Exchange):
    """The core's update of each cell's latent, and what the tokens learn to take back beside it."""

    def forward(
        self,
        groups: Tensor,
        latents_in: Tensor,
        latents_out: Tensor,
        condition: Tensor | None,
        places: LatentPlaces,
    ) -> Tensor:
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
        update = self.attention(queries.flatten(0, 1), context.flatten(0, 1))  # (B*G, P, D)
        tokens = gated_add(tokens, gate, update.view_as(tokens))
        known = modulate(tokens, shift, scale).view_as(groups) + self.token_place
        return gated_add(tokens, gate, self.mlp(known).flatten(1, 2)).view_as(groups)


def cell_means(groups: Tensor, cell: Tensor, num_latents: int) -> Tensor:
    """(B, G, P, D), the cell of each of the P -> (B, G, n, D), means of the cells."""
    cells = torch.arange(num_latents, device=cell.device)[:, None] == cell  # (n, P)
    # Ones and zeros first: a cell of one token then gives exactly this token.
    sums = cells.to(groups.dtype) @ groups
    return sums / cells.sum(1, keepdim=True).to(groups.dtype)
