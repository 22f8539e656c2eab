"""What a config describes, made: the model, what tells it what to draw, its tail dropping.

What can only be checked with the data or the model at hand is checked here; the rest by the config.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import torch

from elit._choices import check_choice
from elit._plain import from_plain
from elit._random import generator
from elit.cost.flops import cost_of
from elit.data import ImageDataset, load_dataset
from elit.flow.objective import SigmaDensity
from elit.interface.budget import TailDropping, default_budgets
from elit.models.elastic import ElasticMixin
from elit.models.presets import DEFAULT_VOCAB_SIZE, nearest_resolution, preset_config, preset_model
from elit.pipelines.autoencoder import check_same_latents
from elit.pipelines.text_encoder import encoder_settings, load_text_encoder
from elit.preparation.autoencoder import load_vae, weights_sha256
from elit.retrofit.known import is_foreign
from elit.training.alignment import check_alignment
from elit.training.conditioning import (
    STATES,
    Conditioning,
    LabelConditioning,
    StoredTextConditioning,
    TextConditioning,
    first_batch,
)
from elit.training.config import PREPARED, WORDS, LatentsConfig, TextConfig, TrainConfig
from elit.training.distributed import World, place

if TYPE_CHECKING:
    from elit.training.finetune import Distillation

logger = logging.getLogger(__name__)

MakeModel = Callable[[TrainConfig, ImageDataset, Mapping[str, Any]], Any]
"""(config, data set, arguments that follow from the text encoder) -> model on the CPU"""

MASK, POOLED = "encoder_attention_mask", "pooled_projections"


class DataSets(NamedTuple):
    """What a run learns from, and what it is validated on."""

    train: ImageDataset
    validation: ImageDataset


def read_data(config: TrainConfig) -> DataSets:
    """The data of a config."""
    name, options = config.data.name, config.data.options
    return DataSets(*(load_dataset(name, split, **options) for split in DataSets._fields))


def sigma_density(config: TrainConfig) -> SigmaDensity:
    """Density of the noise levels of a config."""
    objective = config.objective
    if config.few_steps.base is not None:
        return SigmaDensity("uniform", shift=objective.shift, steps=config.few_steps.steps)
    mean, std = objective.logit_mean, objective.logit_std
    return SigmaDensity(objective.density, mean, std, objective.shift)


def build_parts(
    config: TrainConfig, dataset: ImageDataset, world: World, make_model: MakeModel | None = None
) -> tuple[Any, Conditioning, Distillation | None, str | None]:
    """A run's model on the CPU, what turns batches into conditions, what it is compared with, and
    a fingerprint of the weights that a checkpoint leaves out.
    """
    from elit.training.resume import frozen_digest

    model, teacher = build_checked(config, dataset, make_model)
    frozen = frozen_digest(model) or (teacher and frozen_digest(teacher))
    conditioning = make_conditioning(config, dataset, model, world.device)
    conditioning.shift = config.objective.shift
    told = {"class_labels", "captions", *dataset.encodings}
    dataset.left_out = frozenset(told.difference(conditioning.reads))
    if teacher is None:
        return model, conditioning, None, frozen
    if teacher is not model:
        place(teacher, config.train, world)
    if (options := config.few_steps).base is not None:
        from elit.training.few_steps import FewSteps

        scale, shift = options.guidance_scale, config.objective.shift
        conditioning.few_steps = FewSteps(teacher, options.steps, scale, shift)
        return model, conditioning, None, frozen
    from elit.training.finetune import Distillation

    return model, conditioning, Distillation(model, teacher, config.retrofit, conditioning), frozen


def build_checked(
    config: TrainConfig, dataset: ImageDataset, make_model: MakeModel | None = None
) -> tuple[Any, Any | None]:
    """The model of a config, which suits the data, and its teacher, if it has one."""
    teacher = None
    if config.retrofit.base is not None:
        from elit.training.finetune import build_retrofit

        model, teacher = build_retrofit(config, dataset, make_model)
        check_condition(config, dataset, model)
    else:
        make_model = make_model or build_model
        model = make_model(config, dataset, text_settings(config.text, dataset))
    if config.few_steps.base is not None:
        from elit.training.few_steps import start_from_base

        teacher = start_from_base(model, config)
    check_buckets(model, dataset)
    if config.alignment.weight:
        check_alignment(model, dataset, config.alignment)
    if isinstance(model, ElasticMixin):
        cost_of(model)  # or an error: do the groups divide the grid?
    return model, teacher


def warn_of_width(model: Any) -> None:
    """Tell of a model that is too narrow for the velocities of its tokens (arXiv 2510.11690)."""
    if getattr(model, "prediction_type", None) != "velocity":  # or it is not ours
        return
    embed = model.patch_embed
    if embed.in_features > embed.out_features:
        logger.warning(
            "the model is %d wide, but its tokens hold %d numbers each: what is narrower than that "
            "learns velocities badly; take a wider preset, a smaller patch, or "
            "objective.prediction_type=sample",
            embed.out_features, embed.in_features,
        )  # fmt: skip


def make_conditioning(
    config: TrainConfig, dataset: ImageDataset, model: Any, device: torch.device
) -> Conditioning:
    """What turns batches into what the model is told."""
    if is_foreign(model):
        from elit.training.finetune import TensorConditioning

        keeps_base = config.retrofit.train in ("adapters", "interface")
        return TensorConditioning(model, device, dataset, keeps_base)
    vae, name = load_run_vae(config, dataset), config.text.encoder
    if not model.takes_text:
        return LabelConditioning(model, device, dataset.class_names, vae)
    if name == PREPARED:
        return StoredTextConditioning(model, device, dataset, vae)
    if name == WORDS:
        return TextConditioning(model, device, vae)
    if os.path.isdir(name):  # the pipeline keeps the name, wherever it is loaded
        name = os.path.abspath(name)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    tokenizer, encoder = load_text_encoder(name, dtype)
    return TextConditioning(model, device, vae, name, tokenizer, encoder.to(device))


def load_run_vae(config: TrainConfig, dataset: ImageDataset) -> Any | None:
    """The autoencoder that encoded a data set, frozen, on the CPU; None of pixels.

    One that can't be loaded is an error where the run draws; else its pipeline has none.
    """
    about = dataset.autoencoder
    if about is None:
        return None
    try:
        vae, _ = load_vae(about.name)
    except ValueError as error:
        if config.train.sample_every:
            raise ValueError(
                f"{error}. Samples are drawn with it: give its folder as data.options.vae, or set "
                f"train.sample_every=0"
            ) from error
        logger.warning("the saved pipeline has no autoencoder: %s", error)
        return None
    sha256 = weights_sha256(vae)
    if sha256 != about.sha256:
        raise ValueError(
            f"the autoencoder {about.name} has weights of SHA-256 {sha256}, the data was encoded "
            f"with those of {about.sha256}; give the folder of the right one as data.options.vae"
        )
    check_same_latents(vae, about, "the data")
    return vae.eval().requires_grad_(False)


def build_model(
    config: TrainConfig, dataset: ImageDataset, of_texts: Mapping[str, Any] | None = None
) -> Any:
    """Model of a config, made for the images of a data set, with weights from the run's seed.

    `of_texts` are the arguments of the model that follow from its text encoder.
    """
    name, overrides = config.model.preset, config.model.overrides
    hints = get_type_hints(preset_model(name).__init__)
    hints.pop("return", None)
    for key, value in overrides.items():
        check_choice(key, hints, "key", " of model.overrides")
        from_plain(hints[key], value, f"model.overrides.{key}")
    channels, *size = dataset.image_shape
    resolution = nearest_resolution(name, size)
    preset = preset_config(name, resolution, overrides)
    patch = preset["patch_size"]
    if len(size) == 2 and isinstance(patch, Sequence) and len(patch) == 3:
        raise ValueError(
            f"{name!r} draws clips, but the data set {config.data.name!r} has images; use "
            f"data.name=moving-shapes, or a preset of images"
        )
    follows = {
        "sample_size": size[0] if len(size) == 2 and size[0] == size[1] else size,
        "in_channels": channels,
        **_condition_arguments(config, dataset, of_texts or {}),
    }
    for key, value in follows.items():
        if overrides.get(key, value) != value:
            raise ValueError(
                f"model.overrides.{key}={overrides[key]} does not fit the data set "
                f"{config.data.name!r} or the text encoder, which has {value}; leave it out"
            )
    if config.objective.prediction_type != "velocity":
        if "prediction_type" not in hints:
            raise ValueError(
                f"objective.prediction_type={config.objective.prediction_type} asked of {name!r}, "
                f"which is made as public checkpoints are: they predict velocities; use a dit, "
                f"uvit, hdit or mmdit preset, or leave it out"
            )
        follows["prediction_type"] = config.objective.prediction_type
    if preset.get("group") is not None and config.latents.min is not None:
        follows["min_latents"] = config.latents.min
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "weights").initial_seed())
        try:
            arguments = preset_config(name, resolution, {**follows, **overrides})
            return preset_model(name)(**arguments)
        except (RuntimeError, OverflowError) as error:
            if "overflow" not in str(error).lower() and "too large" not in str(error):
                raise
            raise ValueError(
                f"{name!r} for {'x'.join(map(str, dataset.image_shape))} of {config.data.name!r} "
                f"with model.overrides={overrides} is too large"
            ) from error


def _condition_arguments(
    config: TrainConfig, dataset: ImageDataset, of_texts: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of the model that say what it is told: classes, or texts."""
    name, takes_text = config.model.preset, preset_model(config.model.preset).takes_text
    _check_told(config, dataset, takes_text, repr(name))
    if not takes_text:
        if not dataset.num_classes:
            raise ValueError(
                f"{name!r} draws classes, but the data set {config.data.name!r} has "
                f"{'texts' if dataset.has_captions else 'none'}; use an mmdit preset for captions, "
                f"or prepare the data with labels, which are whole numbers from 0"
            )
        return {"num_classes": dataset.num_classes}
    arguments = dict(of_texts)
    if config.text.encoder == WORDS:  # which have no vector for a whole text
        arguments["pooled_dim"] = None
        if preset_config(name).get("vocab_size") is None:
            arguments |= {"vocab_size": DEFAULT_VOCAB_SIZE, "text_dim": None}
    if config.text.max_length is not None:
        arguments["max_text_length"] = config.text.max_length
    return arguments


def _check_told(config: TrainConfig, dataset: ImageDataset, takes_text: bool, name: str) -> None:
    """Raise a ValueError if the data can't tell a model what its config says it is told."""
    if not takes_text:
        if config.text != TextConfig():
            raise ValueError(
                f"text.* have no effect on {name}, which draws classes; leave them out, or use an "
                f"mmdit preset"
            )
    elif config.text.encoder == PREPARED:
        check_null(config, dataset)
    elif not dataset.has_captions:
        raise ValueError(
            f"{name} draws texts, but the data set {config.data.name!r} has no captions; use "
            f"data.name=captioned-shapes, or a preset that draws classes"
        )


def check_null(config: TrainConfig, dataset: ImageDataset) -> None:
    """Raise a ValueError if texts are to be dropped, but the empty one is not in the data."""
    missing = sorted({*dataset.encodings} - {*dataset.null})
    if config.objective.label_dropout and missing:
        raise ValueError(
            f"objective.label_dropout={config.objective.label_dropout} needs the tensors of the "
            f"empty text in the data, null.{missing[0]}; add them, or set it to 0"
        )


def text_settings(config: TextConfig, dataset: ImageDataset) -> dict[str, Any]:
    """Arguments of the model that follow from what encodes its texts."""
    if config.encoder != PREPARED:
        return {} if config.encoder == WORDS else encoder_settings(config.encoder)
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


def check_condition(config: TrainConfig, dataset: ImageDataset, model: Any) -> None:
    """Raise a ValueError if the data can't tell a pretrained model what to draw."""
    if is_foreign(model):
        from elit.training.finetune import check_tensors

        check_null(config, dataset)
        check_tensors(config, dataset, model)
        return
    _check_told(config, dataset, model.takes_text, str(config.retrofit.base))
    if not model.takes_text or config.text.encoder != PREPARED:
        return
    stored, length = text_settings(config.text, dataset), "max_text_length"
    read = {key: model.config[key] for key in stored}
    if read[length] < stored[length] or read | {length: 0} != stored | {length: 0}:
        raise ValueError(
            f"the data's encoded texts are of {stored}, the model reads {read}; encode them as for "
            f"the data that it was trained on"
        )


def check_buckets(model: Any, dataset: ImageDataset) -> None:
    """Raise a ValueError if one of a data set's sizes doesn't fit a model's patches and groups."""
    for bucket in (dataset.buckets or ()) if isinstance(model, ElasticMixin) else ():
        x = torch.empty(1, model.in_channels, *bucket.shape[1:], device="meta")
        try:
            model.token_grid(x)
        except ValueError as error:
            pixels, group = bucket.name.split("x"), model.group or (1,) * len(model.patch_size)
            multiple = int(pixels[-1]) // bucket.shape[-1] * model.patch_size[-1] * group[-1]
            raise ValueError(
                f"pictures of {bucket.name}, {'x'.join(map(str, bucket.shape))} to the model: "
                f"{error}. Prepare the data with sides that are multiples of {multiple} pixels"
            ) from error


def check_draws(config: TrainConfig, chunks: int) -> None:
    """Raise a ValueError if a micro-batch, one of `chunks` of a step, is too small to be shared."""
    samples, draws = config.data.batch_size // chunks, config.latents.draws
    if draws > max(samples, 1):  # that none are left is told where the batch is cut
        raise ValueError(
            f"latents.draws={draws} shares a micro-batch of {samples} samples; lower it, or raise "
            f"data.batch_size to {draws * chunks}"
        )


def tail_dropping(config: TrainConfig, model: ElasticMixin) -> TailDropping | None:
    """Sampler of tail dropping; None for a plain model."""
    latents, total = config.latents, model.max_latents
    if not model.is_elastic:
        if latents != LatentsConfig():
            raise ValueError(
                f"latents.* have no effect on the plain model {config.model.preset!r}; "
                f"leave them out, or use an elit- preset"
            )
        return None
    low = model.min_latents if latents.min is None else latents.min
    high = total if latents.max is None else latents.max
    options = config.retrofit
    keeps_base = options.base is not None and options.train in ("adapters", "interface")
    if keeps_base and options.init == "identity":
        high = min(high, total - 1)  # at full budget there is nothing to train
        if low > high:
            raise ValueError(
                f"latents.min={low} of {total} leaves nothing to train: at full budget "
                f"retrofit.train={options.train} changes nothing; give at most {total - 1}"
            )
    return TailDropping(low, high, total, latents.order)


def latents_to_show(
    model: ElasticMixin, budgets: Sequence[float | str] | None, most: int | None = None
) -> list[int | None]:
    """Latents per group at each budget, most first; [None] for a plain model.

    Args:
        model: the model.
        budgets: budgets to show; None are those trained, halves of `most` latents.
        most: most latents that training keeps; None are all.
    """
    if budgets is not None and not budgets:
        raise ValueError("sample.budgets is empty; give one or more, such as [1, 0.25]")
    if not model.is_elastic:
        return [model.resolve_budget(budget) for budget in (budgets or [1])][:1]
    if budgets is None:
        most = most or model.max_latents
        share = most / model.max_latents
        budgets = [share * b for b in default_budgets(model.min_latents, most)]
    numbers = {model.resolve_budget(budget) for budget in budgets}
    return sorted(numbers, key=lambda n: n or 0, reverse=True)
