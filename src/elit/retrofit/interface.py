"""The modules that a retrofit adds, all under the prefix `elit` of the transformer."""

from torch import Tensor, nn

from elit.interface.grid import TokenGrid
from elit.interface.read import Read
from elit.interface.write import Write
from elit.layers.embeddings import TimestepEmbedding
from elit.retrofit.lossless import LosslessRead, LosslessWrite
from elit.retrofit.places import LatentPlaces
from elit.retrofit.settings import Init


class LatentInterface(nn.Module):
    """Read and Write of a retrofitted transformer, and the noise level that both are told.

    Args:
        dim: D, width of the transformer's tokens.
        num_heads: attention heads.
        max_latents: J, tokens of a group.
        init: "identity" changes nothing at full budget; "learned" is the paper's.
        adapters: of the blocks, or none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        max_latents: int,
        init: Init,
        adapters: nn.ModuleList | None = None,
    ):
        super().__init__()
        self.adapters = adapters
        self.dim, self.max_latents = dim, max_latents
        self.is_lossless = init == "identity"
        self.time_embed = TimestepEmbedding(dim)
        if self.is_lossless:
            self.read: nn.Module = LosslessRead(dim, num_heads, max_latents)
            self.write: nn.Module = LosslessWrite(dim, num_heads, max_latents)
        else:
            self.read = Read(dim, num_heads, max_latents)
            self.write = Write(dim, num_heads, max_latents)

    def condition(self, noise_level: Tensor, batch_size: int) -> Tensor:
        """(B,) in [0, 1], or one for all, or one for each token (B, N) -> (B, D)."""
        if noise_level.ndim > 1:
            noise_level = noise_level.flatten(1).mean(1)
        return self.time_embed(noise_level.expand(batch_size))

    def into_latents(
        self,
        groups: Tensor,
        condition: Tensor | None,
        grid: TokenGrid,
        places: LatentPlaces,
    ) -> Tensor:
        """Tokens (B, G, P, D) -> latents (B, G * n, D), group by group."""
        if self.is_lossless:
            return self.read(groups, condition, places)
        # A length, not a number: one compiled graph serves all.
        num_latents = len(places.index) // grid.num_groups
        return self.read(groups.flatten(1, 2), condition, grid, num_latents)

    def into_tokens(
        self,
        groups: Tensor,
        latents_in: Tensor,
        latents_out: Tensor,
        condition: Tensor | None,
        grid: TokenGrid,
        places: LatentPlaces,
    ) -> Tensor:
        """What entered Read and the latents before and after the core -> (B, G, P, D)."""
        if self.is_lossless:
            return self.write(groups, latents_in, latents_out, condition, places)
        return self.write(groups.flatten(1, 2), latents_out, condition, grid).view_as(groups)
