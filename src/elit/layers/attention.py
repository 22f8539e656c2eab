"""Multi-head attention with q/k normalisation, on itself and on a context."""

import torch.nn.functional as F
from torch import Tensor, nn

from elit._numbers import is_whole
from elit.layers.positions import Rotary, rotate


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention in the layout (B, S, H, d), heads merged on return: (B, S, H*d).

    Args:
        query: (B, S, H, d)
        key: (B, T, H, d)
        value: (B, T, H, d)
        mask: (B, T) bool, False for keys that nobody may see; None shows all.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, S, d)
    mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, T)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)  # (B, S, H*d)


def head_dim(dim: int, num_heads: int) -> int:
    """Width of one head."""
    if not is_whole(dim) or not is_whole(num_heads) or dim % num_heads:
        raise ValueError(
            f"width {dim} cannot be divided into {num_heads} heads; "
            f"choose a number of heads that divides {dim}"
        )
    return dim // num_heads


class HeadNorm(nn.RMSNorm):
    """RMS norm of heads, in the precision that they come in (autocast keeps weights in float32)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """Self-attention with rotary positions and RMS-normalised queries and keys."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.heads = (num_heads, head_dim(dim, num_heads))
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = HeadNorm(self.heads[1], eps=1e-6)
        self.k_norm = HeadNorm(self.heads[1], eps=1e-6)
        self.to_out = nn.Linear(dim, dim)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, N, D): (B, N, H, d) each."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, *self.heads)).unbind(2)  # 3 x (B, N, H, d)
        q = rotate(self.q_norm(q), rotary).to(v.dtype)
        k = rotate(self.k_norm(k), rotary).to(v.dtype)
        return q, k, v

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None = None) -> Tensor:
        """Attend to all of x (B, N, D), or to what the mask (B, N) shows."""
        return self.to_out(attend(*self.project(x, rotary), mask))  # (B, N, D)


class CrossAttention(nn.Module):
    """Attention of queries on a context, with RMS-normalised queries and keys."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.heads = (num_heads, head_dim(dim, num_heads))
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.q_norm = HeadNorm(self.heads[1], eps=1e-6)
        self.k_norm = HeadNorm(self.heads[1], eps=1e-6)
        self.to_out = nn.Linear(dim, dim)

    def project(self, queries: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, S, H, d), keys and values (B, T, H, d) of what `forward` takes."""
        q = self.q_norm(self.to_q(queries).unflatten(-1, self.heads))  # (..., S, H, d)
        k, v = self.to_kv(context).unflatten(-1, (2, *self.heads)).unbind(-3)  # 2 x (B, T, H, d)
        q = q.expand(context.shape[0], -1, -1, -1)  # (B, S, H, d)
        return q.to(v.dtype), self.k_norm(k).to(v.dtype), v

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Attend.

        Args:
            queries: (B, S, D), or (S, D) for queries that all of the batch share: those are
                projected once, not once per sample.
            context: (B, T, D).

        Returns:
            (B, S, D)
        """
        return self.to_out(attend(*self.project(queries, context)))
