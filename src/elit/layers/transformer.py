"""Parts of a diffusion transformer, from positions to blocks and embeddings."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.layers.sizes import head_dim, pairs_per_axis

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of tokens' rotations, (N, 1, d) each, the first half of the sines negated."""


def rotary_embedding(places: Tensor, head_dim: int, theta: float) -> Rotary:
    """Tables that rotate pairs of features by angles proportional to a token's place.

    The d/2 pairs are dealt out to the axes evenly, the last axes getting one more where it does
    not come out even. Feature i is paired with i + d/2. Places are (N, axes) in units of tokens,
    theta is the base of the geometric series of wavelengths.
    """
    angles = []
    for axis, count in enumerate(pairs_per_axis(head_dim, places.shape[-1])):
        exponents = torch.arange(count, device=places.device, dtype=torch.float32) / count
        angles.append(places[:, axis, None] * theta**-exponents)  # (N, count)
    angle = torch.cat(angles, dim=-1)[:, None]  # (N, 1, d/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate x (B, N, H, d) in the tables' float32."""
    (cos, sin), (first, second) = rotary, x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


class Modulation(NamedTuple):
    """Shift, scale and gate of one layer, (B, 1, D) each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class AdaLNZero(nn.Module):
    """Modulations of `num_layers` layers of width `dim` from one condition, zero at first.

    They shift and scale what enters a layer and gate what leaves it.
    """

    def __init__(self, dim: int, num_layers: int, condition_dim: int | None = None):
        super().__init__()
        self.shape = (num_layers, 3, dim)
        self.linear = nn.Linear(condition_dim or dim, 3 * num_layers * dim)

    def forward(self, condition: Tensor) -> list[Modulation]:
        chunks = self.linear(condition)[:, None].chunk(3 * self.shape[0], dim=-1)  # (B, 1, D) each
        return [Modulation(*chunks[i : i + 3]) for i in range(0, len(chunks), 3)]


def layer_norm(x: Tensor) -> Tensor:
    """Layer normalisation without parameters: the modulation has them."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise x (B, N, D), then scale and shift it."""
    return torch.addcmul(shift, layer_norm(x), 1 + scale)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of queries (B, S, H, d) on keys and values (B, T, H, d): (B, S, H*d).

    A mask (B, T) is False for keys that nobody may see.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, S, d)
    mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, T)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)  # (B, S, H*d)


class HeadNorm(nn.RMSNorm):
    """RMS norm of heads, in the precision that they come in (autocast keeps weights in float32)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """Self-attention with RMS-normalised queries and keys, rotated by their positions if given."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.heads = (num_heads, head_dim(dim, num_heads))
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = (HeadNorm(self.heads[1], eps=1e-6) for _ in range(2))
        self.to_out = nn.Linear(dim, dim)

    def project(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, N, D): (B, N, H, d) each."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, *self.heads)).unbind(2)  # 3 x (B, N, H, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q.to(v.dtype), k.to(v.dtype), v

    def forward(self, x: Tensor, rotary: Rotary | None, mask: Tensor | None = None) -> Tensor:
        """Attend to all of x (B, N, D), or to what the mask (B, N) shows."""
        return self.to_out(attend(*self.project(x, rotary), mask))  # (B, N, D)


class CrossAttention(nn.Module):
    """Attention of queries on a context, with RMS-normalised queries and keys."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.heads = (num_heads, head_dim(dim, num_heads))
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.q_norm, self.k_norm = (HeadNorm(self.heads[1], eps=1e-6) for _ in range(2))
        self.to_out = nn.Linear(dim, dim)

    def project(self, queries: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, S, H, d), keys and values (B, T, H, d) of what `forward` takes."""
        q = self.q_norm(self.to_q(queries).unflatten(-1, self.heads))  # (..., S, H, d)
        k, v = self.to_kv(context).unflatten(-1, (2, *self.heads)).unbind(-3)  # 2 x (B, T, H, d)
        q = q.expand(context.shape[0], -1, -1, -1)  # (B, S, H, d)
        return q.to(v.dtype), self.k_norm(k).to(v.dtype), v

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Attend with queries (B, S, D) to a context (B, T, D): (B, S, D).

        Queries (S, D), which all of the batch share, are projected once, not once per sample.
        """
        return self.to_out(attend(*self.project(queries, context)))


class MLP(nn.Sequential):
    """Two linear layers with a tanh-approximated GELU between."""

    def __init__(self, dim: int, ratio: float, bias: bool = True):
        hidden = round(ratio * dim)
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

    def forward(self, hidden_states: Tensor, condition: Tensor, rotary: Rotary | None) -> Tensor:
        """(B, N, D), (B, D) and the tokens' rotation -> (B, N, D)."""
        x = hidden_states
        attention, mlp = self.modulation(condition)
        update = self.attention(modulate(x, attention.shift, attention.scale), rotary)
        return self.take_in(x, update, attention, mlp)

    def take_in(self, x: Tensor, update: Tensor, attention: Modulation, mlp: Modulation) -> Tensor:
        """Add attention's update, then the MLP's: (B, N, D)."""
        x = torch.addcmul(x, attention.gate, update)
        return torch.addcmul(x, mlp.gate, self.mlp(modulate(x, mlp.shift, mlp.scale)))


class FinalLayer(nn.Module):
    """Modulated norm and a linear layer to patches: zero at initialisation."""

    def __init__(self, dim: int, patch_dim: int, condition_dim: int | None = None):
        super().__init__()
        self.modulation = nn.Linear(condition_dim or dim, 2 * dim)
        self.linear = nn.Linear(dim, patch_dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D), (B, D) -> (B, N, patch_dim)."""
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)  # (B, 1, D)
        return self.linear(modulate(x, shift, scale))


class TimestepEmbedding(nn.Module):
    """Noise level in [0, 1] -> (B, D): sinusoids of `scale` sigma, then two linear layers."""

    num_features = 256

    def __init__(self, dim: int, scale: int = 1000):
        super().__init__()
        self.scale = scale
        self.linear_in = nn.Linear(self.num_features, dim)
        self.linear_out = nn.Linear(dim, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.num_features // 2
        exponents = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
        # Scaled in float32, whatever the model's dtype: bf16 cannot tell 999 from 1000.
        angles = self.scale * timestep.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
        features = torch.cat((angles.cos(), angles.sin()), dim=-1)  # (B, 256)
        return self.linear_out(F.silu(self.linear_in(features.to(self.linear_in.weight.dtype))))


class LabelEmbedding(nn.Module):
    """Class label -> (B, D). The row after the last class is the null label: "no class"."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.null_label = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, class_labels: Tensor | None) -> Tensor:
        """Embed labels (B,), or give the null label's row (1, D) where there are none."""
        if class_labels is None:
            return self.table.weight[self.null_label :]  # (1, D)
        return self.table(class_labels)  # (B, D)
