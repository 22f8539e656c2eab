"""The latent interface of the public ELIT-SiT checkpoints, where it is another than ours.

What they do and `interface/` does not: the Read makes all latents, at any budget; what the core
does not keep reaches the Write as the Read left it; neither the Read's queries nor anything in the
Write is normalised or modulated; queries and keys are normalised over the full width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.interface.grid import TokenGrid
from elit.layers.transformer import MLP, AdaLNZero, CrossAttention, gated_add, modulate, zero_


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
        latents = gated_add(self.latents.repeat(grid.num_groups, 1), attention.gate, update)
        update = self.mlp(modulate(latents, mlp.shift, mlp.scale))
        return gated_add(latents, mlp.gate, update) + self.places_on(grid)

    def places_on(self, grid: TokenGrid) -> Tensor:
        """Learned vector of each latent's place (N, D); interpolated on a grid of another size."""
        if grid.size == self.grid.size:
            return self.latent_places
        raster = self.grid.from_groups(
            self.latent_places[None].unflatten(1, (-1, self.grid.tokens_per_group))
        )
        raster = raster.unflatten(1, self.grid.size).permute(0, 3, 1, 2)  # (1, D, h, w)
        resized = F.interpolate(raster.float(), grid.size, mode="bicubic", align_corners=False)
        resized = grid.to_groups(resized.flatten(2).transpose(1, 2))  # (1, G, J, D)
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
