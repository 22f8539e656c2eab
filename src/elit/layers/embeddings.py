"""Embeddings of the condition: noise level and class label."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit._numbers import is_whole


class TimestepEmbedding(nn.Module):
    """Noise level in [0, 1] -> (B, D): sinusoids of `scale` sigma, then two linear layers."""

    num_features = 256

    def __init__(self, dim: int, scale: int = 1000):
        super().__init__()
        self.scale = scale
        self.linear_in = nn.Linear(self.num_features, dim)
        self.linear_out = nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Start small, as the label embedding does."""
        nn.init.normal_(self.linear_in.weight, std=0.02)
        nn.init.normal_(self.linear_out.weight, std=0.02)

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.num_features // 2
        exponents = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
        # Scaled in float32, whatever the model's dtype: bf16 cannot tell 999 from 1000.
        angles = self.scale * timestep.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
        features = torch.cat((angles.cos(), angles.sin()), dim=-1)  # (B, 256)
        return self.linear_out(F.silu(self.linear_in(features.to(self.linear_in.weight.dtype))))


class LabelEmbedding(nn.Module):
    """Class label -> (B, D). The row after the last class is the null label: "no class"."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        if not is_whole(num_classes):
            raise ValueError(f"num_classes={num_classes!r} is not allowed; give a positive integer")
        self.null_label = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, class_labels: Tensor | None) -> Tensor:
        """Embed labels (B,), or give the null label's row (1, D) where there are none."""
        if class_labels is None:
            return self.table.weight[self.null_label :]  # (1, D)
        return self.table(class_labels)  # (B, D)
