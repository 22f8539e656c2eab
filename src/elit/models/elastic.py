"""What the forwards of our models share: rotations, the split of blocks, running them by budget."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elit.interface.grid import TokenGrid
from elit.layers.neighborhood import Neighborhood
from elit.layers.tables import kept
from elit.layers.transformer import Rotary, rotary_embedding
from elit.models.base import ModelBase


class ElasticMixin(ModelBase):
    """A transformer that may have a latent interface; `base.py` has all beside its forward."""

    def rotary(self, grid: TokenGrid, x: Tensor, num_latents: int | None = None) -> Rotary:
        """Rotations of a grid's tokens, or of its latents, where x is."""
        return _rotary(grid, num_latents, x.device, *self.rotary_options)

    @property
    def rotary_options(self) -> tuple[int, float]:
        """Width of a head, and base of the wavelengths."""
        config = self.config
        return config.hidden_size // config.num_heads, config.rope_theta

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


@kept
def _rotary(
    grid: TokenGrid, num_latents: int | None, device: torch.device, head_dim: int, theta: float
) -> Rotary:
    if num_latents is None:
        return rotary_embedding(grid.token_places(device), head_dim, theta)
    return rotary_embedding(grid.latent_places(num_latents, device), head_dim, theta)


def by_budget(
    through_core: Callable[..., Any],
    num_latents: int | tuple[int, ...] | None,
    *batched: Tensor | None,
) -> Any:
    """What `through_core(n, *batched)` gives: Read, core and Write at n latents per group.

    Where n differs, the samples of each number pass as a batch of their own, so that each costs
    what it costs alone; what is given and comes back is (B, ...) each, or None.
    """
    if not isinstance(num_latents, tuple):
        return through_core(num_latents, *batched)
    rows_of: dict[int, list[int]] = {}
    for row, n in enumerate(num_latents):
        rows_of.setdefault(n, []).append(row)
    parts = [
        through_core(n, *(x if x is None else x[_index(rows, x)] for x in batched))
        for n, rows in rows_of.items()
    ]
    order = [row for rows in rows_of.values() for row in rows]
    back = sorted(range(len(order)), key=order.__getitem__)

    def join(pieces: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(list(pieces))
        return joined[_index(back, joined)]

    if isinstance(parts[0], Tensor):
        return join(parts)
    return tuple(map(join, zip(*parts, strict=True)))


def _index(rows: list[int], x: Tensor) -> Any:
    """Neighbours, as guidance has them, as a slice: it copies nothing."""
    if rows == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=x.device)
