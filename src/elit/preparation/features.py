"""Features of a vision model, made once of each picture, for representation alignment."""

from dataclasses import dataclass

import torch
from torch import Tensor

from elit.data.manifest import Features
from elit.networks.feature_maps import FeatureMaps, load_feature_maps
from elit.preparation.settings import DTYPES


@dataclass
class FeatureEncoder:
    """Makes the maps of features of pictures."""

    maps: FeatureMaps
    device: torch.device  # that it computes on
    store: torch.dtype  # that its numbers are stored in

    @property
    def about(self) -> Features:
        """What the manifest says of it."""
        return self.maps.about

    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, c, h, w) float32 on the processor."""
        pictures = pictures.to(self.device).movedim(-1, 1).float() / 127.5 - 1
        return self.maps(pictures).float().cpu()


def load_features(name: str, device: torch.device, dtype: str, store: str) -> FeatureEncoder:
    """The vision model of that name."""
    maps = load_feature_maps(name, device)
    maps.module.to(getattr(torch, DTYPES[dtype]))
    return FeatureEncoder(maps, device, getattr(torch, DTYPES[store]))
