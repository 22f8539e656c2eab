"""A picture spread among zero tokens: four times the tokens, no more to see."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # diffusers looks it up here on loading
from einops import rearrange
from torch import Tensor

from elit.data import ImageDataset
from elit.models.dit import DiT
from elit.training.build import build_model
from elit.training.config import TrainConfig

__all__ = ["ModelMixin", "SpreadDiT", "build_spread_model", "gather", "spread"]


def spread(x: Tensor, patch: Sequence[int]) -> Tensor:
    """Put the patch at (r, c) of a token grid to (2r, 2c) of one twice as large, else zeros."""
    patches = _patches(x, patch)
    wide = patches.new_zeros(*patches.shape[:4], 2 * patches.shape[4], 2 * patches.shape[5])
    wide[..., ::2, ::2] = patches
    return rearrange(wide, "b c p q h w -> b c (h p) (w q)")  # (B, C, 2h, 2w)


def gather(x: Tensor, patch: Sequence[int]) -> Tensor:
    """Take the patches that `spread` has put into (B, C, 2h, 2w)."""
    return rearrange(_patches(x, patch)[..., ::2, ::2], "b c p q h w -> b c (h p) (w q)")


def _patches(x: Tensor, patch: Sequence[int]) -> Tensor:
    return rearrange(x, "b c (h p) (w q) -> b c p q h w", p=patch[0], q=patch[1])


class SpreadDiT(DiT):
    """A DiT that sees each picture spread among zero tokens; its arguments are DiT's.

    Groups have as many tokens as before, so that an elastic one has four times the groups.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Predict the velocity; the arguments are those of `DiT.forward`."""
        return_dict = kwargs.pop("return_dict", True)
        self.token_grid(hidden_states)  # or an error
        wide = spread(hidden_states, self.patch_size)  # (B, C, 2h, 2w)
        velocity = super().forward(wide, *args, **kwargs, return_dict=False)[0]
        velocity = gather(velocity, self.patch_size)  # (B, C, h, w)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)


def build_spread_model(
    config: TrainConfig, dataset: ImageDataset, of_texts: Mapping[str, Any] | None = None
) -> SpreadDiT:
    """What `build_model` makes, with the same weights, as a SpreadDiT."""
    model = build_model(config, dataset, of_texts)
    with torch.random.fork_rng(devices=[]):
        wide = SpreadDiT.from_config(dict(model.config))
    if next(model.parameters()).device.type != "meta":
        wide.load_state_dict(model.state_dict())
    return wide
