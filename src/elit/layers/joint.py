"""The block of MM-DiT: two streams with their own weights, one attention over both."""

import torch
from torch import Tensor, nn

from elit.layers.attention import HeadNorm, attend, head_dim
from elit.layers.block import TransformerBlock
from elit.layers.initialisation import zero_
from elit.layers.modulation import modulate
from elit.layers.positions import Rotary, rotate


class JointBlock(nn.Module):
    """A transformer block for the image stream and one for the text, which attend as one sequence.

    Behind the last block nobody asks for the text: there it only offers keys and values.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, is_last: bool = False):
        super().__init__()
        self.image = TransformerBlock(dim, num_heads, mlp_ratio)
        self.text: TransformerBlock | TextContext = (
            TextContext(dim, num_heads) if is_last else TransformerBlock(dim, num_heads, mlp_ratio)
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        condition: Tensor,
        rotary: Rotary,
        text_rotary: Rotary,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run both streams.

        Args:
            hidden_states: (B, N, D), spatial tokens or latents.
            encoder_hidden_states: (B, S, D), text.
            condition: (B, D).
            rotary: rotations of the N.
            text_rotary: rotations of the S.
            mask: (B, S + N) bool, False for padding; the text comes first. None shows all.

        Returns:
            (B, N, D) and (B, S, D); the last block leaves the text as it was.
        """
        image, text = hidden_states, encoder_hidden_states
        image_mod = attention, _ = self.image.modulation(condition)
        x = modulate(image, attention.shift, attention.scale)
        q, k, v = self.image.attention.project(x, rotary)  # (B, N, H, d) each
        if isinstance(self.text, TextContext):
            text_k, text_v = self.text(text, condition, text_rotary)  # (B, S, H, d) each
            update = attend(q, torch.cat((text_k, k), 1), torch.cat((text_v, v), 1), mask)
            return self.image.take_in(image, self.image.attention.to_out(update), *image_mod), text

        text_mod = attention, _ = self.text.modulation(condition)
        x = modulate(text, attention.shift, attention.scale)
        text_q, text_k, text_v = self.text.attention.project(x, text_rotary)  # (B, S, H, d) each
        q, k, v = (torch.cat(p, 1) for p in ((text_q, q), (text_k, k), (text_v, v)))
        update = attend(q, k, v, mask)  # (B, S + N, D)
        text_update, update = update.split((text.shape[1], image.shape[1]), dim=1)
        image = self.image.take_in(image, self.image.attention.to_out(update), *image_mod)
        text = self.text.take_in(text, self.text.attention.to_out(text_update), *text_mod)
        return image, text


class TextContext(nn.Module):
    """Keys and values of a text that is read for the last time."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.heads = (num_heads, head_dim(dim, num_heads))
        self.modulation = nn.Linear(dim, 2 * dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.k_norm = HeadNorm(self.heads[1], eps=1e-6)

    def reset_parameters(self) -> None:
        """Start without modulation."""
        zero_(self.modulation)

    def forward(self, text: Tensor, condition: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """(B, S, D), (B, D) and the text's rotation -> 2 x (B, S, H, d)."""
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)  # (B, 1, D)
        k, v = self.to_kv(modulate(text, shift, scale)).unflatten(-1, (2, *self.heads)).unbind(2)
        return rotate(self.k_norm(k), rotary).to(v.dtype), v
