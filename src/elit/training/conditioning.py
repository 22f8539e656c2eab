"""What tells a model what to draw: labels or captions of a batch, as the model takes them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit.flow.schedulers import make_scheduler
from elit.models.elastic import ElasticMixin
from elit.pipelines.base import ElasticPipeline
from elit.pipelines.elit_pipeline import ElitPipeline
from elit.pipelines.text_encoder import encode, encoder_settings, load_text_encoder
from elit.pipelines.text_pipeline import ElitTextPipeline
from elit.training.config import WORDS, TextConfig
from elit.training.foreign import TensorConditioning

Arguments = dict[str, Tensor]


class OwnConditioning:
    """What our models have in common: how they are called, and that a pipeline draws with them."""

    draws = True
    model: ElasticMixin

    def __call__(self, batch: Mapping[str, Any], dropped: Tensor | None = None) -> Arguments:
        """The model's condition of a batch.

        Args:
            batch: of the data set.
            dropped: (B,) bool, samples whose label or text is not told.
        """
        raise NotImplementedError

    def velocity(
        self,
        model: Any,
        x: Tensor,
        sigma: Tensor,
        condition: Arguments,
        latents: Mapping[str, Any],
    ) -> Tensor:
        """Velocity (B, ...) of noisy samples x (B, ...) at noise levels (B,)."""
        return model(x, sigma, **condition, **latents, return_dict=False)[0]

    def pipeline(self) -> ElasticPipeline:
        """A pipeline that draws with the model."""
        raise NotImplementedError

    def export(self, model: Any, folder: Path) -> None:
        """Write the pipeline."""
        pipeline = self.pipeline()
        pipeline.register_modules(transformer=model)
        pipeline.save_pretrained(folder)


class LabelConditioning(OwnConditioning):
    """Class labels; a dropped one is the null label."""

    def __init__(self, model: ElasticMixin, device: torch.device):
        self.model, self.device = model, device

    def __call__(
        self, batch: Mapping[str, Any], dropped: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Labels of a batch."""
        labels = batch["class_labels"].to(self.device, non_blocking=True)
        if dropped is not None:
            labels = labels.masked_fill(dropped, self.model.config.num_classes)
        return {"class_labels": labels}

    def pipeline(self) -> ElitPipeline:
        """A pipeline that draws with the model."""
        return ElitPipeline(self.model, make_scheduler("euler"))


class TextEncoding:
    """The text encoder of a run: none for words, which the model reads itself.

    Attributes:
        settings: arguments of the model that follow from it.
    """

    def __init__(self, config: TextConfig, device: torch.device, dtype: torch.dtype):
        self.name = None if config.encoder == WORDS else config.encoder
        self.tokenizer = self.encoder = None
        self.settings: dict[str, Any] = {}
        if self.name is not None:
            if os.path.isdir(self.name):  # the pipeline keeps the name, wherever it is loaded
                self.name = os.path.abspath(self.name)
            self.settings = encoder_settings(self.name)
            self.tokenizer, encoder = load_text_encoder(self.name, dtype)
            self.encoder = encoder.to(device)


class TextConditioning(OwnConditioning):
    """Captions; a dropped one is the empty text."""

    def __init__(self, model: ElasticMixin, device: torch.device, encoding: TextEncoding):
        self.model, self.device, self.encoding = model, device, encoding

    def __call__(
        self, batch: Mapping[str, Any], dropped: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Captions of a batch, read."""
        captions = list(batch["captions"])
        if dropped is not None:
            pairs = zip(captions, dropped.tolist(), strict=True)
            captions = ["" if drop else caption for caption, drop in pairs]
        return encode(
            captions,
            self.model.config,
            self.encoding.tokenizer,
            self.encoding.encoder,
            truncate=True,
            device=self.device,
        )

    def pipeline(self) -> ElitTextPipeline:
        """A pipeline that draws with the model; a text encoder is saved by its name alone."""
        return ElitTextPipeline(
            self.model,
            make_scheduler("euler"),
            text_encoder=self.encoding.encoder,
            tokenizer=self.encoding.tokenizer,
            text_encoder_name=self.encoding.name,
        )


Conditioning = OwnConditioning | TensorConditioning
