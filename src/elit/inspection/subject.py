"""What an inspection looks at: images of a data set with their conditions, and their pictures."""

from typing import Any

import torch
from torch import Tensor

from elit.data import ImageDataset
from elit.inspection.inspector import Subject
from elit.pipelines.autoencoder import check_same_latents, decode
from elit.pipelines.base import ElasticPipeline

SHOWN = 4  # images on the sheets


def choose_subject(
    pipeline: ElasticPipeline,
    dataset: ImageDataset,
    name: str,
    count: int = 32,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 32,
) -> tuple[Subject, list[int], list[str]]:
    """Images of a data set with their conditions, their indices, and a name for each.

    Args:
        pipeline: on its device; its model is what is looked into.
        dataset: such as the model was trained on.
        name: of the data set, for messages.
        count: images, spread over the data set.
        draws: of noise for each image, an even number.
        seed: of the noise.
        batch_size: samples of a forward.
    """
    check_same_latents(pipeline.vae, dataset.autoencoder, name)
    indices = spread_indices(dataset, count)
    batch = dataset.batch(indices)
    images = batch["images"]
    posterior = None
    if dataset.has_posterior:
        shape = len(images), *dataset.seen_shape(images)
        posterior = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    images = dataset.on_device(images, posterior)
    try:
        pipeline.transformer.token_grid(images)
    except ValueError as error:
        raise ValueError(
            f"{name} doesn't fit the model: {error}. Choose what it was trained on by --data"
        ) from error
    condition, names = conditions(batch, dataset, pipeline, name)
    return Subject(images, condition, seed, draws, batch_size), indices, names


def spread_indices(dataset: ImageDataset, count: int) -> list[int]:
    """Indices spread over the set, or over its first bucket; those that are shown come first.

    The set may be sorted by class, so these are spread too.
    """
    if dataset.buckets:
        known = dataset.buckets[0].indices().tolist()
    else:
        known = range(len(dataset))
    count = min(count, len(known))
    if count < 2:
        raise ValueError(
            f"the data set has {len(known)} images of this size; two or more are needed, so that "
            f"one can be set against another"
        )
    spread = torch.linspace(0, len(known) - 1, count).round().long()
    first = torch.arange(count) % max(1, count // SHOWN)
    return [known[i] for i in spread[first.argsort(stable=True)].tolist()]


def conditions(
    batch: dict[str, Any], dataset: ImageDataset, pipeline: ElasticPipeline, name: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The model's arguments for a batch, on the CPU, and a name for each image."""
    model = pipeline.transformer
    captions = list(batch.get("captions") or map(str, range(len(batch["images"]))))
    if not model.takes_text:
        labels = batch.get("class_labels")
        if (
            labels is None
            or not dataset.num_classes
            or int(labels.max()) >= model.config.num_classes
        ):
            raise ValueError(
                f"the model knows {model.config.num_classes} classes, the data set {name} has "
                f"{dataset.num_classes}; choose what it was trained on by --data"
            )
        return {"class_labels": labels}, [dataset.class_names[i] for i in labels.tolist()]
    if dataset.encodings:
        stored = {key: batch[key] for key in dataset.encodings}
        return {k: x.float() if x.is_floating_point() else x for k, x in stored.items()}, captions
    if not dataset.has_captions:
        raise ValueError(
            f"the model reads texts, but the data set {name} has none; choose what it was trained "
            f"on by --data"
        )
    encoded, _ = pipeline.encode_prompt(captions, truncate=True)
    return {key: value.cpu() for key, value in encoded.items()}, captions


@torch.no_grad()
def to_pictures(pipeline: ElasticPipeline, samples: Tensor) -> list[Any]:
    """PIL images of samples as the model sees them, (B, C, *space); of clips lists of frames.

    VAE latents without an autoencoder are shown by the mean of their channels.
    """
    device = next(pipeline.transformer.parameters()).device
    if pipeline.vae is not None:
        samples = decode(pipeline.vae, samples.to(device))
    elif samples.shape[1] not in (1, 3):
        mean = samples.mean(1, keepdim=True)
        samples = mean / mean.abs().amax().clamp_min(1e-6)
    samples = samples.float().cpu()
    if pipeline.draws_clips:
        return pipeline.video_processor.postprocess_video(samples, "pil")
    return pipeline.image_processor.postprocess(samples, output_type="pil")
