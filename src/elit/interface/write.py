"""Write: every spatial token takes back what the latents of its group have worked out."""

import torch
from torch import Tensor, nn

from elit.interface.grid import TokenGrid
from elit.layers.transformer import (
    MLP,
    AdaLNZero,
    CrossAttention,
    gated_add,
    layer_norm,
    modulate,
)


class Write(nn.Module):
    """Grouped cross-attention from latents into spatial tokens, then an MLP: Read's mirror.

    The result is added to the tokens that entered Read: they skip around the core.

    Paper: attention and MLP modulated apart; here: one adaLN-Zero triple for both, as in Read.
    """

    def __init__(self, dim: int, num_heads: int, tokens_per_group: int):
        super().__init__()
        self.token_place = nn.Parameter(torch.empty(tokens_per_group, dim))  # within the group
        self.modulation = AdaLNZero(dim, num_layers=1)
        self.attention = CrossAttention(dim, num_heads)
        self.mlp = MLP(dim, ratio=1)

    def reset_parameters(self) -> None:
        """Start the places as far apart as normalised tokens are, and the gate a little open.

        A closed gate gives the core no gradient until it has moved: docs/paper.md has the trials.
        """
        nn.init.normal_(self.token_place)
        self.modulation.open_gates(0.1)

    def forward(
        self, tokens: Tensor, latents: Tensor, condition: Tensor, grid: TokenGrid
    ) -> Tensor:
        """Write the latents back into the tokens.

        Args:
            tokens: (B, N, D), group by group, as they entered Read.
            latents: (B, G * n, D), group by group, for any n.
            condition: (B, D).
            grid: the tokens' grid.

        Returns:
            (B, N, D)
        """
        ((shift, scale, gate),) = self.modulation(condition)
        groups = (grid.num_groups, -1)
        queries = modulate(tokens, shift, scale).unflatten(1, groups) + self.token_place
        update = self.attention(
            queries.flatten(0, 1),  # (B*G, P, D)
            layer_norm(latents).unflatten(1, groups).flatten(0, 1),  # (B*G, n, D)
        )
        tokens = gated_add(tokens, gate, update.view_as(tokens))
        # The MLP sees the place too: a single latent tells all tokens of its group the same.
        queries = modulate(tokens, shift, scale).unflatten(1, groups) + self.token_place
        return gated_add(tokens, gate, self.mlp(queries).view_as(tokens))  # (B, N, D)
