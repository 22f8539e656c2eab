"""What a config describes, made: the model and the sampler of its tail dropping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from elit.cost.flops import cost_of
from elit.data import ImageDataset
from elit.interface.budget import TailDropping, default_budgets
from elit.models.elastic import ElasticMixin
from elit.models.presets import DEFAULT_VOCAB_SIZE, nearest_resolution, preset_config, preset_model
from elit.training.conditioning import (
    Conditioning,
    LabelConditioning,
    StoredTextConditioning,
    TextConditioning,
    TextEncoding,
    text_settings,
)
from elit.training.config import PREPARED, WORDS, LatentsConfig, TextConfig, TrainConfig
from elit.training.distributed import World
from elit.training.foreign import TensorConditioning, is_foreign
from elit.training.parallel import place
from elit.training.randomness import generator
from elit.training.vae import load_run_vae

if TYPE_CHECKING:
    from elit.training.retrofit import Distillation

MakeModel = Callable[[TrainConfig, ImageDataset, Mapping[str, Any]], Any]
"""(config, data set, arguments that follow from the text encoder) -> model on the CPU"""


def build_parts(
    config: TrainConfig, dataset: ImageDataset, world: World, make_model: MakeModel | None = None
) -> tuple[Any, Conditioning, Distillation | None]:
    """A run's model on the CPU, what turns batches into conditions, what it is compared with."""
    device = world.device
    teacher = None
    if config.retrofit.base is not None:
        from elit.training.retrofit import build_retrofit

        model, teacher = build_retrofit(config, dataset)
        check_condition(config, dataset, model)
        if isinstance(model, ElasticMixin):
            cost_of(model)  # or an error: do the groups divide the grid?
    else:
        make_model = make_model or build_model
        model = make_model(config, dataset, text_settings(config.text, dataset))
    check_buckets(model, dataset)
    conditioning = make_conditioning(config, dataset, model, device)
    told = {"class_labels", "captions", *dataset.encodings}
    dataset.left_out = frozenset(told.difference(conditioning.reads))
    distillation = None
    if teacher is not None:
        if teacher is not model:
            place(teacher, config.train, world)
        from elit.training.retrofit import Distillation

        distillation = Distillation(model, teacher, config.retrofit, conditioning)
    return model, conditioning, distillation


def make_conditioning(
    config: TrainConfig, dataset: ImageDataset, model: Any, device: torch.device
) -> Conditioning:
    """What turns batches into what the model is told."""
    if is_foreign(model):
        keeps_base = config.retrofit.train in ("adapters", "interface")
        return TensorConditioning(model, dataset, device, keeps_base)
    vae = load_run_vae(config, dataset)
    if not model.takes_text:
        return LabelConditioning(model, device, vae)
    if config.text.encoder == PREPARED:
        return StoredTextConditioning(model, device, dataset, vae)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return TextConditioning(model, device, TextEncoding(config.text, device, dtype), vae)


def check_draws(config: TrainConfig, chunks: int) -> None:
    """Raise a ValueError if a micro-batch, one of `chunks` of a step, is too small to be shared."""
    samples, draws = config.data.batch_size // chunks, config.latents.draws
    if draws > max(samples, 1):  # that none are left is told where the batch is cut
        raise ValueError(
            f"latents.draws={draws} shares a micro-batch of {samples} samples; lower it, or raise "
            f"data.batch_size to {draws * chunks}"
        )


def check_condition(config: TrainConfig, dataset: ImageDataset, model: ElasticMixin) -> None:
    """Raise a ValueError if the data can't tell a pretrained model what to draw."""
    if is_foreign(model):
        check_tensors(config, dataset, model)
        return
    if model.takes_text and config.text.encoder == PREPARED:
        check_stored_texts(config, dataset, text_settings(config.text, dataset), model.config)
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


def check_stored_texts(
    config: TrainConfig, dataset: ImageDataset, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Raise a ValueError if a data set's encoded texts are not what a model reads."""
    check_null(config, dataset)
    keys = ("vocab_size", "text_dim", "pooled_dim")
    short = wanted["max_text_length"] < found["max_text_length"]
    if short or any(found[key] != wanted[key] for key in keys):
        here, there = ({k: d[k] for k in (*keys, "max_text_length")} for d in (found, wanted))
        raise ValueError(
            f"the data's encoded texts are of {here}, the model reads {there}; encode them as for "
            f"the data that it was trained on"
        )


def check_null(config: TrainConfig, dataset: ImageDataset) -> None:
    """Raise a ValueError if texts are to be dropped, but the empty one is not in the data."""
    missing = sorted({*dataset.encodings} - {*dataset.null})
    if config.objective.label_dropout and missing:
        raise ValueError(
            f"objective.label_dropout={config.objective.label_dropout} needs the tensors of the "
            f"empty text in the data, null.{missing[0]}; add them, or set it to 0"
        )


def check_tensors(config: TrainConfig, dataset: ImageDataset, model: Any) -> None:
    """Raise a ValueError if a diffusers transformer doesn't take a data set's tensors."""
    if config.text != TextConfig():
        raise ValueError(
            f"text.* have no effect on data.name={config.data.name}, which are encoded already"
        )
    check_null(config, dataset)
    conditioning = TensorConditioning(model, dataset, torch.device("cpu"))
    firsts = [int(bucket.runs[0, 0]) for bucket in dataset.buckets or ()] or [0]
    for first in firsts:
        batch = dataset.batch([first])
        try:
            with torch.no_grad():
                x, sigma = dataset.on_device(batch["images"]).to(model.dtype), torch.ones(1)
                conditioning.velocity(model, x, sigma, conditioning(batch), {"num_latents": 1})
        except (RuntimeError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{config.data.options.get('path')} doesn't fit {config.retrofit.base}: {reason}; "
                f"it has {', '.join(['latents', *sorted(dataset.encodings)])}, which are to be "
                f"arguments of the transformer's forward"
            ) from error


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


def build_model(
    config: TrainConfig, dataset: ImageDataset, of_texts: Mapping[str, Any] | None = None
) -> Any:
    """Model of a config, made for the images of a data set, with weights from the run's seed.

    Args:
        config: of the run.
        dataset: that it trains on.
        of_texts: arguments of the model that follow from its text encoder.
    """
    channels, *size = dataset.image_shape
    arguments: dict[str, Any] = {
        "sample_size": size[0] if len(size) == 2 and size[0] == size[1] else size,
        "in_channels": channels,
    }
    arguments |= condition_arguments(config, dataset, of_texts or {})
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
        try:
            return preset_model(config.model.preset)(**arguments)
        except (RuntimeError, OverflowError) as error:
            if "overflow" not in str(error).lower() and "too large" not in str(error):
                raise
            raise ValueError(
                f"{config.model.preset!r} for {'x'.join(map(str, dataset.image_shape))} of "
                f"{config.data.name!r} with model.overrides={config.model.overrides} is too large"
            ) from error


def condition_arguments(
    config: TrainConfig, dataset: ImageDataset, of_texts: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of the model that say what it is told: classes, or texts."""
    if not preset_model(config.model.preset).takes_text:
        if config.text != TextConfig():
            raise ValueError(
                f"text.* have no effect on {config.model.preset!r}, which draws classes; leave "
                f"them out, or use an mmdit preset"
            )
        if not dataset.num_classes:
            raise ValueError(
                f"{config.model.preset!r} draws classes, but the data set {config.data.name!r} has "
                f"none; use an mmdit preset for captions, or prepare the data with labels"
            )
        return {"num_classes": dataset.num_classes}
    is_stored = config.text.encoder == PREPARED
    if is_stored:
        check_null(config, dataset)
    if is_stored and config.text.max_length is not None:
        raise ValueError(
            f"text.max_length={config.text.max_length} has no effect on text.encoder={PREPARED}, "
            f"whose texts are encoded already; leave it out"
        )
    if not dataset.has_captions and not is_stored:
        raise ValueError(
            f"{config.model.preset!r} draws texts, but the data set {config.data.name!r} has no "
            f"captions; use data.name=captioned-shapes, or a preset that draws classes"
        )
    arguments = dict(of_texts)
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


def latents_to_show(
    model: ElasticMixin, budgets: Sequence[float] | None, most: int | None = None
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
    kept = {model.resolve_budget(budget) for budget in budgets}
    return sorted(kept, key=lambda n: n or 0, reverse=True)
