"""What the forwards of our models share: rotations, the split of blocks, and running them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from elit.layers.neighborhood import Neighborhood
from elit.layers.transformer import Rotary, rotary_embedding
from elit.models.base import ModelBase


class ElasticMixin(ModelBase):
    """A transformer that may have a latent interface; `base.py` has all beside its forward."""

    def rotary(self, places: Tensor) -> Rotary:
        """Rotations of tokens or latents at these places."""
        config = self.config
        head_dim = config.hidden_size // config.num_heads
        return rotary_embedding(places, head_dim, config.rope_theta)

    def split_blocks(self, blocks: Iterable[Any]) -> tuple[list[Any], ...]:
        """Head, core and tail of the blocks."""
        head, core, _ = self.split
        blocks = list(blocks)
        return blocks[:head], blocks[head : head + core], blocks[head + core :]

    def run(
        self, blocks: Iterable[nn.Module], x: Tensor, condition: Tensor,
        rotary: Rotary | Neighborhood | None, *more: Tensor,
    ) -> Tensor:  # fmt: skip
        """Run blocks one after the other, checkpointed where that is switched on."""
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, condition, rotary, *more)
            else:
                x = block(x, condition, rotary, *more)
        return x
