"""SiT and ELIT-SiT: the architecture of the public checkpoints, plain and elastic in one class."""

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # diffusers looks it up here on loading
from torch import Tensor, nn

from elit._numbers import is_whole
from elit._wide import wide
from elit.interface.grid import TokenGrid
from elit.layers.transformer import (
    FinalLayer,
    LabelEmbedding,
    TimestepEmbedding,
    TransformerBlock,
    init_weights,
)
from elit.models.elastic import ClassConditional
from elit.models.geometry import Geometry
from elit.models.sit_interface import (
    GroupPlaces,
    SiTRead,
    SiTWrite,
    keep_latents,
    restore_latents,
)


class SiT(ClassConditional, ModelMixin, ConfigMixin):
    """Class-conditional diffusion transformer on images, as the public SiT and ELIT-SiT have it.

    Other than in `DiT`, positions are absolute and no block rotates by them, queries and keys are
    not normalised, and with `group` the Write sees all latents: those that the core did not keep
    as the Read left them. So Read and Write cost the same at any budget, and dropped latents cost
    nothing in the core. `elit.from_official_checkpoint` loads public weights into it.

    It takes other sizes and shapes than `sample_size`, with interpolated positions: that is
    outside what it was trained for.

    Args, beside those of a `DiT`:
        sample_size: input size, h, w, that positions are made for. One number is a square image.
        hidden_size: D, a multiple of 4.
        qk_norm: whether the blocks normalise queries and keys of each head.
        write_depth: layers of the Write.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTBlock", "SiTRead", "SiTWrite"]
    _repeated_blocks = ["SiTBlock"]
    _skip_layerwise_casting_patterns = ["embed", "norm", "modulation", "project", "place"]

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
        head: int = 0,
        tail: int = 0,
        min_latents: int = 1,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        write_depth: int = 1,
    ):
        super().__init__()
        shape = (sample_size, in_channels, patch_size, group, min_latents)
        self.set_geometry(Geometry.of(*shape, (depth, head, tail)))
        grid = self.own_grid()
        if not is_whole(hidden_size) or hidden_size % 4:
            raise ValueError(
                f"hidden_size={hidden_size!r} cannot hold sines and cosines of two axes; give a "
                f"multiple of 4"
            )
        if not is_whole(write_depth) or not (self.is_elastic or write_depth == 1):
            raise ValueError(
                f"write_depth={write_depth!r} is not allowed; give a positive integer, or leave it "
                f"at 1 in a plain model"
            )
        if not isinstance(qk_norm, bool):
            raise ValueError(f"qk_norm={qk_norm!r} is not allowed; give True or False")

        self.patch_embed = nn.Linear(self.patch_dim, hidden_size)
        self.time_embed = TimestepEmbedding(hidden_size, scale=1)
        self.label_embed = LabelEmbedding(hidden_size, num_classes)
        self.blocks = nn.ModuleList(
            SiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth)
        )
        self.read = self.write = None
        if self.is_elastic:
            self.places = GroupPlaces(hidden_size, self.max_latents)
            self.read = SiTRead(hidden_size, num_heads, grid)
            self.write = SiTWrite(hidden_size, num_heads, self.max_latents, write_depth)
        self.project = FinalLayer(hidden_size, self.patch_dim)

        self.gradient_checkpointing = False
        self.apply(init_weights)

    def own_grid(self) -> TokenGrid:
        """Tokens of an input of the size that the model was made for."""
        if len(self.sample_size) != 2:
            raise ValueError(
                f"sample_size={self.sample_size} has {len(self.sample_size)} axes, but a "
                f"{type(self).__name__} takes images alone; give (h, w), or use a DiT"
            )
        return self.geometry.grid((1, self.in_channels, *self.sample_size))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: None = None,
        *,
        num_latents: int | None = None,
        latent_indices: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity; the arguments are those of `DiT.forward`."""
        grid, levels, num_latents = self.check_inputs(
            hidden_states, timestep, num_latents, latent_indices
        )
        labels = self.check_labels(class_labels, encoder_hidden_states, hidden_states)
        head, core, tail = self.split_blocks(self.blocks)

        tokens = self.patch_embed(grid.patchify(hidden_states, self.patch_size))  # (B, N, D)
        tokens = tokens + self.positions(grid, tokens)
        condition = self.embed_condition(levels, labels)  # (B, D)
        tokens = self.run(head, tokens, condition, None)  # (B, N, D)
        if self.read is not None:
            tokens = self.places(tokens, grid)
            latents = self.read(tokens, condition, grid)  # (B, N, D): all of them
            first = keep_latents(latents, grid, num_latents, latent_indices)  # (B, G*n, D)
            first = self.run(core, first, condition, None)
            latents = restore_latents(latents, first, grid, latent_indices)  # (B, N, D)
            tokens = self.write(tokens, latents, grid)  # (B, N, D)
        tokens = self.run(tail, tokens, condition, None)  # (B, N, D)
        velocity = grid.unpatchify(self.project(tokens, condition), self.patch_size)

        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def positions(self, grid: TokenGrid, like: Tensor) -> Tensor:
        """Absolute positions (N, D) of the tokens, stretched to the model's own grid."""
        dim, exact = like.shape[-1], wide(like.device)
        rows, cols = (
            axis_waves((torch.arange(n, **exact) + 0.5) * (own / n) - 0.5, dim // 2)
            for own, n in zip(self.own_grid().size, grid.size, strict=True)
        )  # (h, D/2), (w, D/2)
        table = torch.cat(torch.broadcast_tensors(cols[None], rows[:, None]), dim=-1)  # (h, w, D)
        table = grid.to_groups(table.view(1, -1, dim)).view(-1, dim)  # (N, D)
        return table.to(like.device, like.dtype)


class SiTBlock(TransformerBlock):
    """A block without rotations; its queries and keys may have a LayerNorm each."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__(dim, num_heads, mlp_ratio)
        for name in ("q_norm", "k_norm"):
            norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
            setattr(self.attention, name, norm)


def sincos_positions(places: Tensor, dim: int) -> Tensor:
    """Sines and cosines of columns, then of rows, at dim/4 frequencies: (N, dim) float32.

    Args:
        places: (N, 2), row and column.
        dim: a multiple of 4.
    """
    exact = places.to(**wide(places.device))
    waves = torch.cat([axis_waves(exact[:, axis], dim // 2) for axis in (1, 0)], dim=-1)
    return waves.to(places.device)


def axis_waves(places: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of places (n,) along one axis: (n, dim) float32.

    The places come from `wide`: float32 would be off by a millionth at the far end of the grid.
    All of it is arithmetic on the device, with no numbers to copy there.
    """
    exponents = torch.arange(dim // 2, device=places.device, dtype=places.dtype) * (2 / dim)
    angles = places[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()
