"""What `elit inspect` looks at: images of a run's own data set, and their pictures."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit.cli.config import load_config
from elit.data import ImageDataset, load_dataset
from elit.inspection.inspector import Subject
from elit.pipelines.autoencoder import decode
from elit.pipelines.base import ElasticPipeline
from elit.training.conditioning import stored_texts

SHOWN = 4  # images on the sheets
_OPTION = "data.options."


def load_subject(
    args: argparse.Namespace, pipeline: ElasticPipeline
) -> tuple[Subject, dict[str, Any]]:
    """Images of a data set with their conditions, and what to tell of them."""
    dataset, about = run_dataset(args)
    model = pipeline.transformer
    indices = spread_indices(dataset, args.images)
    batch = dataset.batch(indices)
    images = batch["images"]
    posterior = None
    if dataset.has_posterior:
        draw = torch.Generator().manual_seed(args.seed)
        shape = len(images), *dataset.seen_shape(images)
        posterior = torch.randn(shape, generator=draw)
    images = dataset.on_device(images, posterior)
    try:
        model.token_grid(images)
    except ValueError as error:
        raise ValueError(
            f"{about['data']} doesn't fit {args.run}: {error}. Choose what it was trained on by "
            f"--data"
        ) from error
    condition, names = conditions(batch, dataset, pipeline, about["data"])
    subject = Subject(images, condition, args.seed, args.draws, args.batch_size)
    about |= {"images": len(images), "indices": indices, "names": names}
    return subject, about


def run_dataset(args: argparse.Namespace) -> tuple[ImageDataset, dict[str, Any]]:
    """The data set that a run was trained on, or the one of the flags."""
    import yaml

    given = {
        key.removeprefix(_OPTION): yaml.safe_load(value)
        for key, value in vars(args).items()
        if key.startswith(_OPTION)
    }
    file = Path(args.run) / "config.yaml"
    if args.data is not None:
        name, options = args.data, given
    elif file.is_file():
        config = load_config(str(file), {})
        name, options = config.data.name, {**config.data.options, **given}
    else:
        raise ValueError(
            f"{args.run} has no config.yaml, which would say what it was trained on; choose a data "
            f"set with --data, such as --data digits"
        )
    dataset = load_dataset(name, args.split, **options)
    return dataset, {"data": name, "options": options, "split": args.split}


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
        return stored_texts(batch, dataset.encodings, {}, torch.device("cpu"), None), captions
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
