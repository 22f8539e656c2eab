"""HDiT and ELIT-HDiT: an hourglass, local outside and global inside."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # diffusers looks it up here on loading
from torch import Tensor, nn

from elit._numbers import is_whole
from elit.interface import Read, TokenGrid, Write
from elit.interface.initial import init_weights
from elit.layers.neighborhood import Neighborhood, NeighborhoodBlock, neighborhood
from elit.layers.sizes import tile_size
from elit.layers.tables import kept
from elit.layers.transformer import (
    FinalLayer,
    LabelEmbedding,
    TimestepEmbedding,
    TransformerBlock,
    rotary_embedding,
)
from elit.models.base import PredictionType
from elit.models.elastic import ElasticMixin, by_budget


class HDiT(ElasticMixin, ModelMixin, ConfigMixin):
    """Hourglass diffusion transformer, class-conditional.

    Head and tail are its outer level: neighbourhood attention on tokens of half the patch and half
    the width. Between them, a linear layer merges the outer tokens of a patch into one inner token,
    the core attends globally, another linear layer splits, and the outer tokens skip around it.
    With `group` the core is elastic (ELIT): Read, latents, Write stand within the inner level.

    Paper: the layout is not published; here: all inner blocks are the core, which agrees with the
    FLOPs that tail dropping saves there.

    Args:
        sample_size, in_channels, num_classes, min_latents, rope_theta, prediction_type: as of a
            `DiT`.
        patch_size: input elements per inner token along each axis. Outer tokens have half of each
            even number.
        hidden_size: D of the inner level; the outer level has D / 2.
        num_heads: attention heads of the inner level, even; the outer level has half of them.
        depth: blocks in all.
        group: inner tokens of one group along each axis; None makes a plain HDiT.
        head: blocks of the outer level before the inner one.
        tail: blocks of the outer level after it.
        kernel_size: neighbours of an outer token along each axis, odd.
        mlp_ratio: hidden width of the blocks' MLPs, over their width.
    """

    always_split = True
    _no_split_modules = ["TransformerBlock", "NeighborhoodBlock", "Read", "Write"]
    _repeated_blocks = ["TransformerBlock", "NeighborhoodBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int],
        in_channels: int,
        patch_size: int | Sequence[int],
        hidden_size: int,
        num_heads: int,
        depth: int,
        num_classes: int,
        group: int | Sequence[int] | None = None,
        head: int = 1,
        tail: int = 1,
        min_latents: int = 1,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        rope_theta: float = 10_000.0,
        prediction_type: PredictionType = "velocity",
    ):
        super().__init__()
        self.set_geometry()
        self.merge = tuple(2 if p % 2 == 0 else 1 for p in self.patch_size)
        self.outer_patch = tuple(p // m for p, m in zip(self.patch_size, self.merge, strict=True))
        outer_per_inner = int(torch.Size(self.merge).numel())
        if outer_per_inner == 1 or num_heads % 2 or hidden_size % 2:
            raise ValueError(
                f"patch_size={patch_size!r}, hidden_size={hidden_size} and num_heads={num_heads} "
                f"cannot be halved for the outer level; use even numbers"
            )
        if not is_whole(kernel_size) or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size!r} is not allowed; use an odd number, as 7")

        outer_size, outer_patch_dim = hidden_size // 2, self.patch_dim // outer_per_inner
        self.patch_embed = nn.Linear(outer_patch_dim, outer_size)
        self.time_embed = TimestepEmbedding(hidden_size)
        self.label_embed = LabelEmbedding(hidden_size, num_classes)
        inner = range(head, depth - tail)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_size, num_heads, mlp_ratio)
            if index in inner
            else NeighborhoodBlock(outer_size, num_heads // 2, mlp_ratio, hidden_size)
            for index in range(depth)
        )
        self.merge_tokens = nn.Linear(outer_per_inner * outer_size, hidden_size)
        self.split_tokens = nn.Linear(hidden_size, outer_per_inner * outer_size)
        self.skip_weight = nn.Parameter(torch.empty(()))
        sizes = (hidden_size, num_heads, self.max_latents)
        self.read = Read(*sizes) if self.is_elastic else None
        self.write = Write(*sizes) if self.is_elastic else None
        self.project = FinalLayer(outer_size, outer_patch_dim, hidden_size)

        self.apply(init_weights)

    def reset_parameters(self) -> None:
        """Half of what comes out of the inner level is new, half is what skipped it."""
        nn.init.constant_(self.skip_weight, 0.5)

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
        head, core, tail = self.split_blocks(self.blocks)
        outer = self.outer_grid(grid)
        kernel = self.config.kernel_size
        near = _neighborhood(outer, kernel, hidden_states.device, *self.rotary_options)

        tokens = self.patch_embed(outer.patchify(hidden_states, self.outer_patch))  # (B, M, D/2)
        condition = F.silu(self.time_embed(levels) + self.label_embed(labels))  # (B, D)
        tokens = skipped = self.run(head, tokens, condition, near)  # (B, M, D/2)

        patches = outer.unpatchify(tokens, (1,) * len(outer.size))  # (B, D/2, *outer.size)
        tokens = self.merge_tokens(grid.patchify(patches, self.merge))  # (B, N, D)
        rotary = self.rotary(grid, tokens)
        if self.read is not None:

            def through_core(n: int, tokens: Tensor, condition: Tensor) -> Tensor:
                rotary = self.rotary(grid, tokens, n)
                latents = self.read(tokens, condition, grid, n, latent_indices)
                latents = self.run(core, latents, condition, rotary)  # (B, G*n, D)
                return self.write(tokens, latents, condition, grid)

            tokens = by_budget(through_core, num_latents, tokens, condition)  # (B, N, D)
        else:
            tokens = self.run(core, tokens, condition, rotary)  # (B, N, D)
        patches = grid.unpatchify(self.split_tokens(tokens), self.merge)  # (B, D/2, *outer.size)

        tokens = outer.patchify(patches, (1,) * len(outer.size))  # (B, M, D/2)
        tokens = torch.lerp(skipped, tokens, self.skip_weight.to(tokens.dtype))
        tokens = self.run(tail, tokens, condition, near)  # (B, M, D/2)
        output = outer.unpatchify(self.project(tokens, condition), self.outer_patch)
        velocity = self.velocity_of(output, hidden_states, levels)

        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def outer_grid(self, grid: TokenGrid) -> TokenGrid:
        """Grid of the outer level, in the tiles of its neighbourhoods, for one of the inner."""
        size = tuple(n * m for n, m in zip(grid.size, self.merge, strict=True))
        return TokenGrid(size, tile_size(size))


@kept
def _neighborhood(
    grid: TokenGrid, kernel: int, device: torch.device, head_dim: int, theta: float
) -> Neighborhood:
    places = grid.token_places(device)
    rotary = rotary_embedding(places, head_dim, theta)
    return neighborhood(places, grid.size, kernel, rotary)
