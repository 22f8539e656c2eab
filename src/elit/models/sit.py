"""SiT and ELIT-SiT: the architecture of the public checkpoints, plain and elastic in one class."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # diffusers looks it up here on loading
from torch import Tensor, nn

from elit._devices import wide
from elit._numbers import is_whole
from elit.interface.grid import TokenGrid
from elit.interface.initial import init_weights, zero_
from elit.interface.raster import from_groups, to_groups
from elit.layers.tables import kept
from elit.layers.transformer import (
    MLP,
    AdaLNZero,
    CrossAttention,
    FinalLayer,
    LabelEmbedding,
    TimestepEmbedding,
    TransformerBlock,
    modulate,
)
from elit.models.elastic import ElasticMixin, by_budget


class SiT(ElasticMixin, ModelMixin, ConfigMixin):
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

    _no_split_modules = ["SiTBlock", "SiTRead", "SiTWrite"]
    _repeated_blocks = ["SiTBlock"]

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
        self.set_geometry()
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

        self.apply(init_weights)

    def own_grid(self) -> TokenGrid:
        """Tokens of an input of the size that the model was made for."""
        if len(self.sample_size) != 2:
            raise ValueError(
                f"sample_size={self.sample_size} has {len(self.sample_size)} axes, but a "
                f"{type(self).__name__} takes images alone; give (h, w), or use a DiT"
            )
        return self.geometry.grid(self.sample_size)

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

        tokens = self.patch_embed(grid.patchify(hidden_states, self.patch_size))  # (B, N, D)
        tokens = tokens + self.positions(grid, tokens)
        condition = F.silu(self.time_embed(levels) + self.label_embed(labels))  # (B, D)
        tokens = self.run(head, tokens, condition, None)  # (B, N, D)
        if self.read is not None:
            tokens = self.places(tokens, grid)

            def through_core(n: int, tokens: Tensor, condition: Tensor) -> Tensor:
                latents = self.read(tokens, condition, grid)  # (B, N, D): all of them
                first = keep_latents(latents, grid, n, latent_indices)  # (B, G*n, D)
                first = self.run(core, first, condition, None)
                latents = restore_latents(latents, first, grid, latent_indices)  # (B, N, D)
                return self.write(tokens, latents, grid)

            tokens = by_budget(through_core, num_latents, tokens, condition)  # (B, N, D)
        tokens = self.run(tail, tokens, condition, None)  # (B, N, D)
        velocity = grid.unpatchify(self.project(tokens, condition), self.patch_size)

        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def positions(self, grid: TokenGrid, like: Tensor) -> Tensor:
        """Absolute positions (N, D) of the tokens, stretched to the model's own grid."""
        return _positions(grid, self.own_grid().size, like.shape[-1], like.device, like.dtype)


@kept
def _positions(
    grid: TokenGrid, own_size: tuple[int, ...], dim: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    exact = wide(device)
    rows, cols = (
        axis_waves((torch.arange(n, **exact) + 0.5) * (own / n) - 0.5, dim // 2)
        for own, n in zip(own_size, grid.size, strict=True)
    )  # (h, D/2), (w, D/2)
    table = torch.cat(torch.broadcast_tensors(cols[None], rows[:, None]), dim=-1)  # (h, w, D)
    table = to_groups(grid, table.view(1, -1, dim)).view(-1, dim)  # (N, D)
    return table.to(device, dtype)


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


# ---- the interface of the public ELIT-SiT checkpoints, where it is another than ours ----
#
# What they do and `interface/` does not: the Read makes all latents, at any budget; what the core
# does not keep reaches the Write as the Read left it; neither the Read's queries nor anything in
# the Write is normalised or modulated; queries and keys are normalised over the full width.


class WidthNorm(nn.Module):
    """RMS norm over the full width, before heads are split, with epsilon outside the root."""

    eps = 1e-5

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Scale by 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., D) in float32, or in what is wider, and round back."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
        return (wide / (rms + self.eps) * self.weight).to(x.dtype)


class WidthNormAttention(CrossAttention):
    """Attention of queries on a context, with queries and keys normalised over the full width."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        self.q_norm = WidthNorm(dim)  # type: ignore[assignment]
        self.k_norm = WidthNorm(dim)  # type: ignore[assignment]

    def project(self, queries: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_norm(self.to_q(queries)).unflatten(-1, self.heads)  # (..., S, H, d)
        k, v = self.to_kv(context).chunk(2, dim=-1)  # 2 x (B, T, D)
        k, v = self.k_norm(k).unflatten(-1, self.heads), v.unflatten(-1, self.heads)
        q = q.expand(context.shape[0], -1, -1, -1)  # (B, S, H, d)
        return q.to(v.dtype), k.to(v.dtype), v


def _torch_default(*modules: nn.Module) -> None:
    """Start linear layers as torch does: the public models' interface is made so."""
    for module in modules:
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                linear.reset_parameters()


class GroupPlaces(nn.Module):
    """Tells the tokens of a group apart: a learned vector for each place, alike in all groups."""

    def __init__(self, dim: int, tokens_per_group: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(tokens_per_group, dim))

    def reset_parameters(self) -> None:
        """Start small."""
        nn.init.normal_(self.table, std=0.02)

    def forward(self, tokens: Tensor, grid: TokenGrid) -> Tensor:
        """(B, N, D), group by group -> (B, N, D)."""
        return (tokens.unflatten(1, (grid.num_groups, -1)) + self.table).flatten(1, 2)


class SiTRead(nn.Module):
    """Grouped cross-attention from spatial tokens into learned latents, then an MLP.

    Each latent has a place on the grid of the tokens that the model was made for.
    """

    def __init__(self, dim: int, num_heads: int, grid: TokenGrid):
        super().__init__()
        self.grid = grid
        self.latents = nn.Parameter(torch.empty(grid.tokens_per_group, dim))
        self.latent_places = nn.Parameter(torch.empty(grid.num_tokens, dim))  # group by group
        self.modulation = AdaLNZero(dim, num_layers=2)
        self.attention = WidthNormAttention(dim, num_heads)
        self.mlp = MLP(dim, ratio=1, bias=False)

    def reset_parameters(self) -> None:
        """Start the learned vectors small and the gates closed, as the public format has it."""
        nn.init.normal_(self.latents, std=0.02)
        nn.init.normal_(self.latent_places, std=0.02)
        _torch_default(self.attention, self.mlp)

    def forward(self, tokens: Tensor, condition: Tensor, grid: TokenGrid) -> Tensor:
        """Tokens (B, N, D), with their places in the groups -> all latents (B, N, D)."""
        attention, mlp = self.modulation(condition)
        context = modulate(tokens, attention.shift, attention.scale)
        context = context.unflatten(1, (grid.num_groups, -1)).flatten(0, 1)  # (B*G, J, D)
        # Projected for each group, though alike in all: so the cost is the published one, of which
        # that is 0.3 % in an XL.
        queries = self.latents.expand(context.shape[0], -1, -1)  # (B*G, J, D)
        update = self.attention(queries, context).view_as(tokens)  # (B, N, D)
        latents = torch.addcmul(self.latents.repeat(grid.num_groups, 1), attention.gate, update)
        update = self.mlp(modulate(latents, mlp.shift, mlp.scale))
        return torch.addcmul(latents, mlp.gate, update) + self.places_on(grid)

    def places_on(self, grid: TokenGrid) -> Tensor:
        """Learned vector of each latent's place (N, D); interpolated on a grid of another size."""
        if grid.size == self.grid.size:
            return self.latent_places
        raster = from_groups(
            self.grid, self.latent_places[None].unflatten(1, (-1, self.grid.tokens_per_group))
        )
        raster = raster.unflatten(1, self.grid.size).permute(0, 3, 1, 2)  # (1, D, h, w)
        resized = F.interpolate(raster.float(), grid.size, mode="bicubic", align_corners=False)
        resized = to_groups(grid, resized.flatten(2).transpose(1, 2))  # (1, G, J, D)
        return resized.flatten(0, 2).to(self.latent_places.dtype)


class WriteLayer(nn.Module):
    """Cross-attention from the latents of a group into its tokens, and an MLP: no norm before."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.attention = WidthNormAttention(dim, num_heads)
        self.mlp = MLP(dim, ratio=1, bias=False)

    def reset_parameters(self) -> None:
        """Write nothing at first."""
        _torch_default(self.attention, self.mlp)
        zero_(self.attention.to_out)
        nn.init.zeros_(self.mlp.get_parameter("2.weight"))

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """(B*G, J, D) of tokens and latents -> (B*G, J, D)."""
        tokens = tokens + self.attention(tokens, latents)
        return tokens + self.mlp(tokens)


class SiTWrite(nn.Module):
    """Write that takes from all latents of a group, also those that the core did not get."""

    def __init__(self, dim: int, num_heads: int, tokens_per_group: int, depth: int):
        super().__init__()
        self.places = GroupPlaces(dim, tokens_per_group)
        self.layers = nn.ModuleList(WriteLayer(dim, num_heads) for _ in range(depth))

    def forward(self, tokens: Tensor, latents: Tensor, grid: TokenGrid) -> Tensor:
        """Tokens as they entered Read, all latents (B, N, D) -> tokens (B, N, D)."""
        groups = (grid.num_groups, -1)
        written = self.places(tokens, grid).unflatten(1, groups).flatten(0, 1)  # (B*G, J, D)
        latents = latents.unflatten(1, groups).flatten(0, 1)  # (B*G, J, D)
        for layer in self.layers:
            written = layer(written, latents)
        return written.view_as(tokens)  # (B, N, D)


def keep_latents(
    latents: Tensor, grid: TokenGrid, num_latents: int, indices: Tensor | None
) -> Tensor:
    """The first latents of each group, or those named: (B, N, D) -> (B, G*n, D)."""
    groups = latents.unflatten(1, (grid.num_groups, -1))  # (B, G, J, D)
    return (groups[:, :, :num_latents] if indices is None else groups[:, :, indices]).flatten(1, 2)


def restore_latents(
    latents: Tensor, cores: Tensor, grid: TokenGrid, indices: Tensor | None
) -> Tensor:
    """All latents (B, N, D), the core's (B, G*n, D) in their places."""
    groups, cores = (x.unflatten(1, (grid.num_groups, -1)) for x in (latents, cores))
    if indices is None:
        return torch.cat((cores, groups[:, :, cores.shape[2] :]), dim=2).flatten(1, 2)
    places = indices.long()
    places = torch.where(places < 0, places + groups.shape[2], places)
    return groups.index_copy(2, places, cores.to(groups.dtype)).flatten(1, 2)
