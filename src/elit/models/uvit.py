"""U-ViT and ELIT-U-ViT: a DiT with long skips between its first blocks and its last."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # diffusers looks it up here on loading
from torch import Tensor, nn

from elit.layers.transformer import Rotary, TransformerBlock
from elit.models.dit import DiT
from elit.models.elastic import by_budget

__all__ = ["ModelMixin", "UViT"]


class SkipBlock(TransformerBlock):
    """A block that first takes in what an earlier block gave: concatenate, linear 2D -> D."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__(dim, num_heads, mlp_ratio)
        self.skip = nn.Linear(2 * dim, dim)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, condition: Tensor, rotary: Rotary, skipped: Tensor
    ) -> Tensor:
        """(B, N, D), (B, D), the tokens' rotation, (B, N, D) -> (B, N, D)."""
        x = self.skip(torch.cat((hidden_states, skipped), dim=-1))  # (B, N, D)
        return super().forward(x, condition, rotary)


class UViT(DiT):
    """A DiT with long skips (U-ViT); its arguments are DiT's.

    Skips tie the first block of a stretch to its last, the second to the last but one, and so on.
    In a plain model the stretch is all blocks. In an elastic one there are two: head and tail in
    space, and the core among latents, whose first half is tied to its second.
    """

    _no_split_modules = ["TransformerBlock", "SkipBlock", "Read", "Write"]
    _repeated_blocks = ["TransformerBlock", "SkipBlock"]

    def block_class(self, index: int) -> type[TransformerBlock]:
        return SkipBlock if index in self.skip_sources else TransformerBlock

    @property
    def skip_sources(self) -> dict[int, int]:
        """Number of each block that takes a skip: number of the block whose output it takes."""
        head, core, tail = self.split if self.split[1] else (0, self.split[0], 0)
        last = head + core + tail - 1
        outer = {last - i: i for i in range(min(head, tail))}
        inner = {head + core - 1 - i: head + i for i in range((core - 1) // 2)}
        return outer | inner

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: None = None,
        *,
        num_latents: int | Sequence[int] | None = None,
        latent_indices: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity; the arguments are those of `DiT.forward`."""
        grid, levels, num_latents = self.check_inputs(
            hidden_states, timestep, num_latents, latent_indices
        )
        labels = self.check_labels(class_labels, encoder_hidden_states, hidden_states)
        head, core, tail = self.split_blocks(range(len(self.blocks)))
        skips: dict[int, Tensor] = {}

        tokens = self.patch_embed(grid.patchify(hidden_states, self.patch_size))  # (B, N, D)
        condition = F.silu(self.time_embed(levels) + self.label_embed(labels))  # (B, D)
        rotary = self.rotary(grid, tokens)
        tokens = self.run_skipping(head, tokens, condition, rotary, skips)  # (B, N, D)
        if self.read is not None:

            def through_core(n: int, tokens: Tensor, condition: Tensor) -> Tensor:
                rotary = self.rotary(grid, tokens, n)
                latents = self.read(tokens, condition, grid, n, latent_indices)
                latents = self.run_skipping(core, latents, condition, rotary, skips)  # (B, G*n, D)
                return self.write(tokens, latents, condition, grid)

            tokens = by_budget(through_core, num_latents, tokens, condition)  # (B, N, D)
        tokens = self.run_skipping(tail, tokens, condition, rotary, skips)  # (B, N, D)
        output = grid.unpatchify(self.project(tokens, condition), self.patch_size)
        velocity = self.velocity_of(output, hidden_states, levels)

        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def run_skipping(
        self, numbers: list[int], x: Tensor, condition: Tensor, rotary: Rotary,
        skips: dict[int, Tensor],
    ) -> Tensor:  # fmt: skip
        """Run blocks by number; `skips` holds what earlier ones gave to those that take it."""
        sources = self.skip_sources
        for number in numbers:
            skipped = (skips.pop(sources[number]),) if number in sources else ()
            x = self.run([self.blocks[number]], x, condition, rotary, *skipped)
            if number in sources.values():
                skips[number] = x
        return x
