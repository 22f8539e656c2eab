"""Attention weights of Read, seen while the model runs as ever."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from elit.layers.transformer import CrossAttention


@torch.no_grad()
def attention_weights(attention: CrossAttention, queries: Tensor, context: Tensor) -> Tensor:
    """Weights of a cross-attention, float32: how much each query takes from each token.

    Args:
        attention: of a Read or a Write.
        queries: (B, S, D), or (S, D) where all of the batch share them.
        context: (B, T, D)

    Returns:
        (B, H, S, T), sums of 1 over T.
    """
    q, k, _ = attention.project(queries, context)  # (B, S, H, d), (B, T, H, d)
    scores = torch.einsum("bshd,bthd->bhst", q.float(), k.float())
    return (scores / q.shape[-1] ** 0.5).softmax(-1)


@contextmanager
def watch_attention(attention: CrossAttention, see: Callable[[Tensor], Any]) -> Iterator[None]:
    """Show the weights of every call to `see`: of Read's attention (B * G, H, n, P).

    `with watch_attention(model.read.attention, maps.append): model(...)` collects the maps. The
    model computes what it would have computed.
    """

    # Before the call: sharded parameters are gathered then, and no longer after it.
    def before(module: CrossAttention, given: tuple[Tensor, Tensor]) -> None:
        see(attention_weights(module, *given))

    handle = attention.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def attention_entropy(weights: Tensor) -> Tensor:
    """Entropy of attention weights (..., T) in nats, (...): 0 is one token, log T all alike."""
    return -torch.xlogy(weights, weights).sum(-1)


def attention_coverage(weights: Tensor) -> Tensor:
    """Share of a group's tokens that any query or head looks at, of weights (B, H, S, T): (B,).

    The entropy of the mean weights, as a number of tokens: 1/T if all look at the same token, 1 if
    each token is looked at as much as any other, be it by a query of its own.
    """
    return attention_entropy(weights.mean((1, 2))).exp() / weights.shape[-1]
