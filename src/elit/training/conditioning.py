"""What tells a model what to draw: labels or captions of a batch, as the model takes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elit.data import ImageDataset
from elit.flow.schedulers import make_scheduler
from elit.models.elastic import ElasticMixin
from elit.pipelines.text_encoder import encode, encoder_settings, load_text_encoder
from elit.training.config import PREPARED, WORDS, TextConfig
from elit.training.foreign import TensorConditioning, stored_texts

if TYPE_CHECKING:  # they bring all of diffusers' autoencoders
    from elit.pipelines.base import ElasticPipeline
    from elit.pipelines.elit_pipeline import ElitPipeline
    from elit.pipelines.text_pipeline import ElitTextPipeline

Arguments = dict[str, Tensor]


class OwnConditioning:
    """What our models have in common: how they are called, and that a pipeline draws with them."""

    draws = True
    model: ElasticMixin
    reads: tuple[str, ...]  # of a batch, beside the images
    vae: Any  # of the pipeline: None for pixels, or where it could not be loaded

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

    def to_show(
        self, pipeline: ElasticPipeline, dataset: ImageDataset, count: int
    ) -> tuple[list[str], dict[str, Any]]:
        """Names of what a sheet shows, at most `count`, and the pipeline's arguments for it."""
        raise NotImplementedError

    def export(self, model: Any, folder: Path) -> None:
        """Write the pipeline."""
        pipeline = self.pipeline()
        pipeline.register_modules(transformer=model)
        pipeline.save_pretrained(folder)


class LabelConditioning(OwnConditioning):
    """Class labels; a dropped one is the null label."""

    reads = ("class_labels",)

    def __init__(self, model: ElasticMixin, device: torch.device, vae: Any = None):
        self.model, self.device, self.vae = model, device, vae

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
        from elit.pipelines.elit_pipeline import ElitPipeline

        return ElitPipeline(self.model, make_scheduler("euler"), self.vae)

    def to_show(
        self, pipeline: ElasticPipeline, dataset: ImageDataset, count: int
    ) -> tuple[list[str], dict[str, Any]]:
        """The first classes."""
        del pipeline
        names = list(dataset.class_names)[:count]
        return names, {"class_labels": list(range(len(names)))}


def text_settings(config: TextConfig, dataset: ImageDataset) -> dict[str, Any]:
    """Arguments of the model that follow from what encodes its texts."""
    if config.encoder == PREPARED:
        return stored_settings(dataset)
    return {} if config.encoder == WORDS else encoder_settings(config.encoder)


class TextEncoding:
    """The text encoder of a run: none for words, which the model reads itself, or stored texts.

    Attributes:
        settings: arguments of the model that follow from it.
    """

    def __init__(self, config: TextConfig, device: torch.device, dtype: torch.dtype):
        self.name = None if config.encoder in (WORDS, PREPARED) else config.encoder
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

    reads = ("captions",)

    def __init__(
        self, model: ElasticMixin, device: torch.device, encoding: TextEncoding, vae: Any = None
    ):
        self.model, self.device, self.encoding, self.vae = model, device, encoding, vae

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
        from elit.pipelines.text_pipeline import ElitTextPipeline

        return ElitTextPipeline(
            self.model,
            make_scheduler("euler"),
            self.vae,
            text_encoder=self.encoding.encoder,
            tokenizer=self.encoding.tokenizer,
            text_encoder_name=self.encoding.name,
        )

    def to_show(
        self, pipeline: ElasticPipeline, dataset: ImageDataset, count: int
    ) -> tuple[list[str], dict[str, Any]]:
        """The first captions; training cuts long ones, the pipeline by itself refuses them."""
        names = first_batch(dataset, count)["captions"]
        return names, {"prompt_embeds": pipeline.encode_prompt(names, truncate=True)}


STATES, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"


class StoredTextConditioning(OwnConditioning):
    """Texts that were encoded beforehand; a dropped one is the empty text."""

    def __init__(
        self, model: ElasticMixin, device: torch.device, dataset: ImageDataset, vae: Any = None
    ):
        self.model, self.device, self.vae = model, device, vae
        self.reads, self.null = dataset.encodings, dataset.null
        self.encoder_name = dataset.text_encoder

    def __call__(self, batch: Mapping[str, Any], dropped: Tensor | None = None) -> Arguments:
        """Encoded texts of a batch."""
        return stored_texts(batch, self.reads, self.null, self.device, dropped)

    def pipeline(self) -> ElitTextPipeline:
        """A pipeline that loads the texts' encoder by its name when it draws."""
        from elit.pipelines.text_pipeline import ElitTextPipeline

        return ElitTextPipeline(
            self.model, make_scheduler("euler"), self.vae, text_encoder_name=self.encoder_name
        )

    def to_show(
        self, pipeline: ElasticPipeline, dataset: ImageDataset, count: int
    ) -> tuple[list[str], dict[str, Any]]:
        """The first texts, as they are stored."""
        del pipeline
        batch = first_batch(dataset, count)
        told = self(batch)
        names = batch.get("captions") or [str(i) for i in range(len(told[STATES]))]
        null = {name: value.to(self.device) for name, value in self.null.items()}
        empty = {n: null.get(n, torch.zeros_like(x[:1])).to(x.dtype) for n, x in told.items()}
        return names, {"prompt_embeds": (told, {n: x.expand_as(told[n]) for n, x in empty.items()})}


def first_batch(dataset: ImageDataset, count: int) -> dict[str, Any]:
    """The first samples, at most `count`, all of one shape."""
    most = len(dataset.buckets[0]) if dataset.buckets else len(dataset)
    first = int(dataset.buckets[0].runs[0, 0]) if dataset.buckets else 0
    return dataset.batch(range(first, first + min(count, most)))


def stored_settings(dataset: ImageDataset) -> dict[str, Any]:
    """Arguments of an MM-DiT that reads a data set's encoded texts."""
    if STATES not in dataset.encodings:
        raise ValueError(
            f"text.encoder={PREPARED} reads texts that were encoded beforehand, and the data set "
            f"has none; run `elit prepare` with --text-encoder, or use text.encoder={WORDS}"
        )
    if foreign := sorted({*dataset.encodings} - {STATES, MASK, POOLED}):
        raise ValueError(
            f"the data set's encoded texts have {foreign[0]}, which an MM-DiT doesn't take; encode "
            f"them with CLIP, T5 or Qwen alone, or train the transformer that they are of"
        )
    batch = first_batch(dataset, 1)
    states, pooled = batch[STATES], batch.get(POOLED)
    return {
        "vocab_size": None,
        "text_dim": states.shape[2],
        "pooled_dim": None if pooled is None else pooled.shape[1],
        "max_text_length": states.shape[1],
    }


Conditioning = OwnConditioning | TensorConditioning
