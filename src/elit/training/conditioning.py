"""What tells a model what to draw: labels or captions of a batch, as the model takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elit.data import ImageDataset
from elit.flow.schedulers import make_scheduler
from elit.flow.shift import Shift
from elit.models.elastic import ElasticMixin
from elit.pipelines.text_encoder import encode

if TYPE_CHECKING:  # they bring all of diffusers' autoencoders
    from elit.pipelines.base import ElasticPipeline
    from elit.training.few_steps import FewSteps

Arguments = dict[str, Any]  # of a model, or of a pipeline
Shown = tuple[list[str], Arguments]
STATES = "encoder_hidden_states"


class Conditioning:
    """How a model is told what to draw, called, shown and saved.

    Attributes:
        reads: what it reads of a batch, beside the images.
        draws: whether a pipeline of ours draws with the model.
        vae: of that pipeline; None for pixels, or where it could not be loaded.
        shift: of its scheduler, as training has it.
        few_steps: what is learned in place of the data's velocity, or None.
    """

    reads: tuple[str, ...]
    draws = True
    shift: Shift = 1.0
    few_steps: FewSteps | None = None

    def __init__(self, model: Any, device: torch.device, vae: Any = None):
        self.model, self.device, self.vae = model, device, vae

    def __call__(self, batch: Mapping[str, Any], dropped: Tensor | None = None) -> Arguments:
        """The model's arguments for a batch; `dropped` (B,) are not told their label or text."""
        raise NotImplementedError

    def velocity(
        self, model: Any, x: Tensor, sigma: Tensor, condition: Arguments, latents: Mapping[str, Any]
    ) -> Tensor:
        """Velocity (B, ...) of noisy samples x (B, ...) at noise levels (B,)."""
        return model(x, sigma, **condition, **latents, return_dict=False)[0]

    def target(self, condition: Arguments) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What gives the velocity to learn, of noisy samples and levels; None is the data's."""
        return None if self.few_steps is None else partial(self.few_steps.velocity, **condition)

    def pipeline(self) -> ElasticPipeline:
        """A pipeline that draws with the model."""
        raise NotImplementedError

    def to_show(self, pipeline: ElasticPipeline, dataset: ImageDataset, count: int) -> Shown:
        """Names of what a sheet shows, at most `count`, and the pipeline's arguments for it."""
        raise NotImplementedError

    def export(self, model: Any, folder: Path) -> None:
        """Write what draws with a model."""
        pipeline = self.pipeline()
        pipeline.register_modules(transformer=model)
        pipeline.save_pretrained(folder)


class LabelConditioning(Conditioning):
    """Class labels; a dropped one is the null label."""

    reads = ("class_labels",)

    def __init__(
        self, model: Any, device: torch.device, names: Sequence[str] = (), vae: Any = None
    ):
        super().__init__(model, device, vae)
        # Digits are numbers wherever a label is read.
        is_named = not all(name.isdigit() for name in names)
        self.id2label = dict(enumerate(names)) if is_named else None

    def __call__(self, batch: Mapping[str, Any], dropped: Tensor | None = None) -> Arguments:
        labels = batch["class_labels"].to(self.device, non_blocking=True)
        if dropped is not None:
            labels = labels.masked_fill(dropped, self.model.config.num_classes)
        return {"class_labels": labels}

    def pipeline(self) -> ElasticPipeline:
        from elit.pipelines.elit_pipeline import ElitPipeline

        scheduler = make_scheduler("euler", self.shift)
        return ElitPipeline(self.model, scheduler, self.vae, self.id2label)

    def to_show(self, pipeline: ElasticPipeline, dataset: ImageDataset, count: int) -> Shown:
        """The first classes."""
        del pipeline
        names = list(dataset.class_names)[:count]
        return names, {"class_labels": list(range(len(names)))}


class TextConditioning(Conditioning):
    """Captions; a dropped one is the empty text.

    Without an encoder the model reads the words itself. A pipeline is saved with its name alone.
    """

    reads: tuple[str, ...] = ("captions",)

    def __init__(
        self,
        model: ElasticMixin,
        device: torch.device,
        vae: Any = None,
        name: str | None = None,
        tokenizer: Any = None,
        encoder: Any = None,
    ):
        super().__init__(model, device, vae)
        self.name, self.tokenizer, self.encoder = name, tokenizer, encoder

    def __call__(self, batch: Mapping[str, Any], dropped: Tensor | None = None) -> Arguments:
        captions = list(batch["captions"])
        if dropped is not None:
            pairs = zip(captions, dropped.tolist(), strict=True)
            captions = ["" if drop else caption for caption, drop in pairs]
        config, device = self.model.config, self.device
        return encode(captions, config, self.tokenizer, self.encoder, truncate=True, device=device)

    def pipeline(self) -> ElasticPipeline:
        from elit.pipelines.text_pipeline import ElitTextPipeline

        return ElitTextPipeline(
            self.model,
            make_scheduler("euler", self.shift),
            self.vae,
            text_encoder=self.encoder,
            tokenizer=self.tokenizer,
            text_encoder_name=self.name,
        )

    def to_show(self, pipeline: ElasticPipeline, dataset: ImageDataset, count: int) -> Shown:
        """The first captions; training cuts long ones, the pipeline by itself refuses them."""
        names = first_batch(dataset, count)["captions"]
        return names, {"prompt_embeds": pipeline.encode_prompt(names, truncate=True)}


class StoredTextConditioning(TextConditioning):
    """Texts that were encoded beforehand; a dropped one is the empty text."""

    def __init__(
        self, model: ElasticMixin, device: torch.device, dataset: ImageDataset, vae: Any = None
    ):
        super().__init__(model, device, vae, dataset.text_encoder)
        self.reads, self.null = dataset.encodings, dataset.null

    def __call__(self, batch: Mapping[str, Any], dropped: Tensor | None = None) -> Arguments:
        """Encoded texts of a batch on the device, in float32."""
        condition = {name: batch[name].to(self.device, non_blocking=True) for name in self.reads}
        for name, value in condition.items():
            if value.is_floating_point():
                value = value.float()
            if dropped is not None and name in self.null:
                keep = (~dropped).view(-1, *(1,) * (value.ndim - 1))
                value = torch.where(keep, value, self.null[name].to(self.device, value.dtype))
            condition[name] = value
        return condition

    def to_show(self, pipeline: ElasticPipeline, dataset: ImageDataset, count: int) -> Shown:
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
