"""Read and Write: the latents of a group gather what its tokens know, and the tokens take back."""

import torch
from torch import Tensor, nn

from elit.interface.budget import check_num_latents
from elit.interface.grid import TokenGrid
from elit.layers.transformer import MLP, AdaLNZero, CrossAttention, layer_norm, modulate


class Read(nn.Module):
    """Grouped cross-attention from spatial tokens into learned latents, then an MLP.

    The learned latents are shared by all groups and samples: they are normalised and projected
    to queries once. Dropped latents are never made.

    Paper: attention and MLP modulated apart; here: one adaLN-Zero triple for the two, because
    that is what the paper's count of parameters leaves room for (698 M for XL).
    """

    def __init__(self, dim: int, num_heads: int, max_latents: int):
        super().__init__()
        self.max_latents = max_latents
        self.latents = nn.Parameter(torch.empty(max_latents, dim))
        self.latent_index = nn.Parameter(torch.empty(max_latents, dim))  # tells them in the core
        self.token_place = nn.Parameter(torch.empty(max_latents, dim))  # place within the group
        self.modulation = AdaLNZero(dim, num_layers=1)
        self.attention = CrossAttention(dim, num_heads)
        self.mlp = MLP(dim, ratio=1)

    def forward(
        self,
        tokens: Tensor,
        condition: Tensor,
        grid: TokenGrid,
        num_latents: int,
        latent_indices: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, N, D) and a condition (B, D) -> latents (B, G * n, D), group by group.

        n = `num_latents` are kept of each group: the first n, or those in `latent_indices` (n,).
        """
        check_num_latents(num_latents, self.max_latents)
        latents, index = self.latents[:num_latents], self.latent_index[:num_latents]
        if latent_indices is not None:
            latents, index = self.latents[latent_indices], self.latent_index[latent_indices]

        ((shift, scale, gate),) = self.modulation(condition)
        context = modulate(tokens, shift, scale).unflatten(1, (grid.num_groups, -1))
        context = (context + self.token_place).flatten(0, 1)  # (B*G, P, D)
        update = self.attention(layer_norm(latents), context)  # (B*G, n, D)
        update = update.view(tokens.shape[0], -1, tokens.shape[-1])  # (B, G*n, D)
        latents = torch.addcmul((latents + index).repeat(grid.num_groups, 1), gate, update)
        return torch.addcmul(latents, gate, self.mlp(modulate(latents, shift, scale)))


class Write(nn.Module):
    """Grouped cross-attention from latents into spatial tokens, then an MLP: Read's mirror.

    The result is added to the tokens that entered Read: they skip around the core. As there, one
    adaLN-Zero triple modulates both.
    """

    def __init__(self, dim: int, num_heads: int, tokens_per_group: int):
        super().__init__()
        self.token_place = nn.Parameter(torch.empty(tokens_per_group, dim))  # within the group
        self.modulation = AdaLNZero(dim, num_layers=1)
        self.attention = CrossAttention(dim, num_heads)
        self.mlp = MLP(dim, ratio=1)

    def forward(
        self, tokens: Tensor, latents: Tensor, condition: Tensor, grid: TokenGrid
    ) -> Tensor:
        """Tokens (B, N, D) as they entered Read, latents (B, G * n, D), for any n -> (B, N, D)."""
        ((shift, scale, gate),) = self.modulation(condition)
        groups = (grid.num_groups, -1)
        queries = modulate(tokens, shift, scale).unflatten(1, groups) + self.token_place
        update = self.attention(
            queries.flatten(0, 1),  # (B*G, P, D)
            layer_norm(latents).unflatten(1, groups).flatten(0, 1),  # (B*G, n, D)
        )
        tokens = torch.addcmul(tokens, gate, update.view_as(tokens))
        # The MLP sees the place too: a single latent tells all tokens of its group the same.
        queries = modulate(tokens, shift, scale).unflatten(1, groups) + self.token_place
        return torch.addcmul(tokens, gate, self.mlp(queries).view_as(tokens))  # (B, N, D)
