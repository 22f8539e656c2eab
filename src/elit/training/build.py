"""What a config describes, made: the model and the sampler of its tail dropping."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from elit.data import ImageDataset
from elit.data.tensors import Tensors
from elit.interface.budget import TailDropping
from elit.models.elastic import ElasticMixin
from elit.models.presets import DEFAULT_VOCAB_SIZE, nearest_resolution, preset_config, preset_model
from elit.training.conditioning import (
    Conditioning,
    LabelConditioning,
    TextConditioning,
    TextEncoding,
)
from elit.training.config import WORDS, LatentsConfig, TextConfig, TrainConfig
from elit.training.distributed import World
from elit.training.foreign import TensorConditioning
from elit.training.parallel import place
from elit.training.randomness import generator
from elit.training.retrofit import Distillation, build_retrofit


def build_parts(
    config: TrainConfig, dataset: ImageDataset, world: World
) -> tuple[Any, Conditioning, Distillation | None]:
    """A run's model on the CPU, what turns batches into conditions, what it is compared with."""
    device = world.device
    is_retrofit = config.retrofit.base is not None
    teacher, settings = None, {}
    if is_retrofit:
        model, teacher = build_retrofit(config, dataset)
        check_condition(config, dataset, model)
        takes_text = getattr(model, "takes_text", False)
    else:
        takes_text = preset_model(config.model.preset).takes_text
    if takes_text:
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        encoding = TextEncoding(config.text, device, dtype)
        settings = encoding.settings
    if not is_retrofit:
        model = build_model(config, dataset, settings)
    conditioning: Conditioning
    if isinstance(dataset, Tensors):
        keeps_base = config.retrofit.train in ("adapters", "interface")
        conditioning = TensorConditioning(model, dataset, device, keeps_base)
    elif takes_text:
        conditioning = TextConditioning(model, device, encoding)
    else:
        conditioning = LabelConditioning(model, device)
    distillation = None
    if teacher is not None:
        if teacher is not model:
            place(teacher, config.train, world)
        distillation = Distillation(model, teacher, config.retrofit, conditioning)
    return model, conditioning, distillation


def check_draws(config: TrainConfig, chunks: int) -> None:
    """Raise a ValueError if a micro-batch, one of `chunks` of a step, is too small to be shared."""
    samples, draws = config.data.batch_size // chunks, config.latents.draws
    if draws > samples:
        raise ValueError(
            f"latents.draws={draws} shares a micro-batch of {samples} samples; lower it, or raise "
            f"data.batch_size to {draws * chunks}"
        )


def check_condition(config: TrainConfig, dataset: ImageDataset, model: ElasticMixin) -> None:
    """Raise a ValueError if the data can't tell a pretrained model what to draw."""
    if isinstance(dataset, Tensors):
        check_tensors(config, dataset, model)
        return
    if model.takes_text and not dataset.has_captions:
        raise ValueError(
            f"{config.retrofit.base} draws texts, but the data set {config.data.name!r} has no "
            f"captions; use data.name=captioned-shapes"
        )
    if not model.takes_text and config.text != TextConfig():
        raise ValueError(
            f"text.* have no effect on {config.retrofit.base}, which draws classes; leave them out"
        )


def check_tensors(config: TrainConfig, dataset: Tensors, model: Any) -> None:
    """Raise a ValueError if a diffusers transformer doesn't take a data set's tensors."""
    if config.text != TextConfig():
        raise ValueError("text.* have no effect on data.name=tensors, which are encoded already")
    missing = sorted(dataset.conditions.keys() - dataset.null.keys())
    if config.objective.label_dropout and missing:
        raise ValueError(
            f"objective.label_dropout={config.objective.label_dropout} needs the tensors of the "
            f"empty text in the data, null.{missing[0]}; add them, or set it to 0"
        )
    conditioning = TensorConditioning(model, dataset, torch.device("cpu"))
    batch = dataset.batch([0])
    try:
        with torch.no_grad():
            x, sigma = batch["images"].to(model.dtype), torch.ones(1)
            conditioning.velocity(model, x, sigma, conditioning(batch), {"num_latents": 1})
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{config.data.options.get('path')} doesn't fit {config.retrofit.base}: {reason}; it "
            f"has {', '.join(['latents', *sorted(dataset.conditions)])}, which are to be arguments "
            f"of the transformer's forward"
        ) from error


def build_model(
    config: TrainConfig, dataset: ImageDataset, text_settings: Mapping[str, Any] | None = None
) -> Any:
    """Model of a config, made for the images of a data set, with weights from the run's seed.

    Args:
        config: of the run.
        dataset: that it trains on.
        text_settings: arguments of the model that follow from its text encoder.
    """
    channels, *size = dataset.image_shape
    arguments: dict[str, Any] = {
        "sample_size": size[0] if len(size) == 2 and size[0] == size[1] else size,
        "in_channels": channels,
    }
    arguments |= condition_arguments(config, dataset, text_settings or {})
    resolution = nearest_resolution(config.model.preset, size)
    preset = preset_config(config.model.preset, resolution, config.model.overrides)
    patch = preset["patch_size"]
    if len(size) == 2 and isinstance(patch, Sequence) and len(patch) == 3:
        raise ValueError(
            f"{config.model.preset!r} draws clips, but the data set {config.data.name!r} has "
            f"images; use data.name=moving-shapes, or a preset of images"
        )
    if preset.get("group") is not None and config.latents.min is not None:
        arguments["min_latents"] = config.latents.min
        if "min_latents" in config.model.overrides:
            raise ValueError(
                "latents.min and model.overrides.min_latents are the same thing; give one of them"
            )
    for key, given in arguments.items():
        wanted = config.model.overrides.get(key, given)
        if wanted != given and key != "min_latents":
            raise ValueError(
                f"model.overrides.{key}={wanted} does not fit the data set {config.data.name!r} or "
                f"the text encoder, which has {given}; leave it out"
            )
    arguments |= config.model.overrides
    arguments = preset_config(config.model.preset, resolution, arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "weights").initial_seed())
        return preset_model(config.model.preset)(**arguments)


def condition_arguments(
    config: TrainConfig, dataset: ImageDataset, text_settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of the model that say what it is told: classes, or texts."""
    if not preset_model(config.model.preset).takes_text:
        if config.text != TextConfig():
            raise ValueError(
                f"text.* have no effect on {config.model.preset!r}, which draws classes; leave "
                f"them out, or use an mmdit preset"
            )
        return {"num_classes": dataset.num_classes}
    if not dataset.has_captions:
        raise ValueError(
            f"{config.model.preset!r} draws texts, but the data set {config.data.name!r} has no "
            f"captions; use data.name=captioned-shapes, or a preset that draws classes"
        )
    arguments = dict(text_settings)
    preset = preset_config(config.model.preset)
    if config.text.encoder == WORDS:  # which have no vector for a whole text
        arguments["pooled_dim"] = None
        if preset.get("vocab_size") is None:
            arguments |= {"vocab_size": DEFAULT_VOCAB_SIZE, "text_dim": None}
    if config.text.max_length is not None:
        arguments["max_text_length"] = config.text.max_length
    return arguments


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
