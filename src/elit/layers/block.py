"""The transformer block of DiT: adaLN-Zero, self-attention with rotary positions, MLP."""

from torch import Tensor, nn

from elit._numbers import is_real, is_whole
from elit.layers.attention import SelfAttention
from elit.layers.initialisation import zero_
from elit.layers.modulation import AdaLNZero, Modulation, gated_add, modulate
from elit.layers.neighborhood import Neighborhood, NeighborhoodAttention
from elit.layers.positions import Rotary


class MLP(nn.Sequential):
    """Two linear layers with a tanh-approximated GELU between."""

    def __init__(self, dim: int, ratio: float, bias: bool = True):
        hidden = ratio * dim if is_real(ratio) else 0
        if not is_real(hidden) or not is_whole(hidden := round(hidden)):
            raise ValueError(f"mlp_ratio={ratio!r} is not allowed; give a number above 0, as 4")
        super().__init__(
            nn.Linear(dim, hidden, bias), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim, bias)
        )


class TransformerBlock(nn.Module):
    """One block on a sequence of tokens, spatial ones or latents: it does not care which."""

    attention_class: type[SelfAttention] = SelfAttention

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, condition_dim: int | None = None
    ):
        super().__init__()
        self.modulation = AdaLNZero(dim, 2, condition_dim)
        self.attention = self.attention_class(dim, num_heads)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(
        self, hidden_states: Tensor, condition: Tensor, rotary: Rotary | Neighborhood
    ) -> Tensor:
        """(B, N, D), (B, D) and the tokens' rotation -> (B, N, D)."""
        x = hidden_states
        attention, mlp = self.modulation(condition)
        update = self.attention(modulate(x, attention.shift, attention.scale), rotary)
        return self.take_in(x, update, attention, mlp)

    def take_in(self, x: Tensor, update: Tensor, attention: Modulation, mlp: Modulation) -> Tensor:
        """Add what attention found, then what the MLP makes of it: (B, N, D)."""
        x = gated_add(x, attention.gate, update)
        return gated_add(x, mlp.gate, self.mlp(modulate(x, mlp.shift, mlp.scale)))


class NeighborhoodBlock(TransformerBlock):
    """A block whose tokens attend to those near them; its third argument is a Neighborhood."""

    attention_class = NeighborhoodAttention


class FinalLayer(nn.Module):
    """Modulated norm and a linear layer to patches: zero at initialisation."""

    def __init__(self, dim: int, patch_dim: int, condition_dim: int | None = None):
        super().__init__()
        self.modulation = nn.Linear(condition_dim or dim, 2 * dim)
        self.linear = nn.Linear(dim, patch_dim)

    def reset_parameters(self) -> None:
        """Predict zero."""
        zero_(self.modulation)
        zero_(self.linear)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D), (B, D) -> (B, N, patch_dim)."""
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)  # (B, 1, D)
        return self.linear(modulate(x, shift, scale))
