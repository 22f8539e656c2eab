"""What class-conditional models share: the condition of label and noise level."""

import torch
import torch.nn.functional as F
from torch import Tensor

from elit.layers.embeddings import LabelEmbedding, TimestepEmbedding
from elit.models.elastic import ElasticMixin, check_range


class ClassConditional(ElasticMixin):
    """A model with a condition of noise level and class label."""

    time_embed: TimestepEmbedding
    label_embed: LabelEmbedding

    def embed_condition(self, timestep: Tensor, labels: Tensor | None, like: Tensor) -> Tensor:
        """Condition (B, D) of all modulations, its nonlinearity applied once for all layers."""
        timestep = self.noise_levels(timestep, like)
        if labels is not None:
            labels = self.one_per_sample(labels, "class_labels", like)
            if labels.dtype not in (torch.int64, torch.int32):
                raise ValueError(
                    f"class_labels of {labels.dtype}; give whole numbers in "
                    f"0..{self.config.num_classes}, the last of which means no class"
                )
            most = self.config.num_classes
            check_range(labels, 0, most, "class label", f"{most} means no class")
        return F.silu(self.time_embed(timestep) + self.label_embed(labels))

    def check_inputs(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> None:
        """Raise a ValueError if there is a text, or if the samples are not as the weights."""
        self.check_input(hidden_states)
        if encoder_hidden_states is not None:
            raise ValueError(
                f"a {type(self).__name__} takes class_labels, not encoder_hidden_states; "
                f"leave it None"
            )

    def example_condition(self, batch_size: int) -> dict[str, Tensor]:
        return {"class_labels": torch.arange(batch_size) % self.config.num_classes}
