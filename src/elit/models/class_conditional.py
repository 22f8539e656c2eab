"""What class-conditional models share: the condition of label and noise level, and rotations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from elit.layers.attention import head_dim
from elit.layers.embeddings import LabelEmbedding, TimestepEmbedding
from elit.layers.positions import Rotary, pairs_per_axis, rotary_embedding
from elit.models.elastic import ElasticMixin


class ClassConditional(ElasticMixin):
    """A model with a condition of noise level and class label."""

    time_embed: TimestepEmbedding
    label_embed: LabelEmbedding
    rotary_options: tuple[int, float]  # width of a head, base of the wavelengths

    def set_rotary(self, hidden_size: int, num_heads: int, theta: float) -> None:
        """Take what rotations need from a config."""
        if not 0 < theta < math.inf:
            raise ValueError(f"rope_theta={theta} is not allowed; give a number above 0, as 10000")
        self.rotary_options = (head_dim(hidden_size, num_heads), theta)
        pairs_per_axis(self.rotary_options[0], len(self.sample_size))  # or an error, now

    def embed_condition(self, timestep: Tensor, labels: Tensor | None, like: Tensor) -> Tensor:
        """Condition (B, D) of all modulations, its nonlinearity applied once for all layers."""
        timestep = torch.as_tensor(timestep, device=like.device)
        for name, value in (("timestep", timestep), ("class_labels", labels)):
            if value is not None and tuple(value.shape) not in ((), (1,), (len(like),)):
                raise ValueError(
                    f"{name} of shape {tuple(value.shape)} does not fit a batch of {len(like)}; "
                    f"give one number for each sample"
                )
        timestep = timestep.expand(len(like))
        return F.silu(self.time_embed(timestep) + self.label_embed(labels))

    def check_no_text(self, encoder_hidden_states: Tensor | None) -> None:
        """Raise a ValueError if there is a text."""
        if encoder_hidden_states is not None:
            raise ValueError(
                f"a {type(self).__name__} takes class_labels, not encoder_hidden_states; "
                f"leave it None"
            )

    def rotary(self, places: Tensor) -> Rotary:
        """Rotations of tokens or latents at these places."""
        return rotary_embedding(places, *self.rotary_options)
