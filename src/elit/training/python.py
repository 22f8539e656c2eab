"""`elit.train` and `elit.finetune`: what the commands do, with data and models of Python."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from elit.data import MEMORY
from elit.data.given import Given, split_given
from elit.models.base import ModelBase
from elit.pipelines.base import ElasticPipeline
from elit.pipelines.folder import draws_images
from elit.training import loop
from elit.training.build import DataSets, MakeModel
from elit.training.config import DataConfig, TrainConfig
from elit.training.config_files import load_config, settings_of_base
from elit.training.estimate import match_flops as steps_of
from elit.training.finetune import check_kind, check_same_shift
from elit.training.loop import TrainResult
from elit.training.preflight import check_config

Config = TrainConfig | str | os.PathLike
Overrides = Mapping[str, Any]


def train(
    config: Config,
    dataset: Any = None,
    validation: Any = None,
    overrides: Overrides | None = None,
    class_names: Sequence[str] | None = None,
    match_flops: Config | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train as `elit train` does, on any data set; the same call again goes on with a stopped run.

    Args:
        config: a `TrainConfig`, the path of a YAML file, or the name of a built-in config.
        dataset: of torch, map-style: pairs (image, label or caption) or dicts of these, images of
            PIL, uint8, or floats in [-1, 1]. A run goes on only with as many items of the same
            shape and classes, and is the same run only if an index always gives the same item. By
            default what the config names.
        validation: the same, held out; by default one item in twenty.
        overrides: settings over the config's, by dotted keys: `{"train.steps": 500}`.
        class_names: of the labels from 0; by default the data set's `classes`, else numbers up to
            the largest label, for which each item is read once.
        match_flops: run or config whose training FLOPs set `train.steps`.
        progress: whether to show a progress bar.
    """
    config = _config(config, overrides)
    data = _data(dataset, {"validation": validation, "class_names": class_names})
    return _run(config, data, overrides, match_flops, progress)


def finetune(
    model: Any,
    dataset: Any = None,
    config: Config = "finetune",
    validation: Any = None,
    overrides: Overrides | None = None,
    null: Mapping[str, Tensor] | None = None,
    match_flops: Config | None = None,
    progress: bool = True,
) -> TrainResult:
    """Make a pretrained model elastic and fine-tune it, as `elit finetune` does.

    Args:
        model: a transformer that predicts a velocity, of diffusers' or a plain one of ours, or a
            pipeline with one: a copy of it is trained, in float32. Or a folder, or a name on the
            hub.
        dataset: as for `train`; for diffusers' transformers dicts of `latents` (C, h, w), scaled
            as they take them, and what else their forward takes, by its arguments' names, without
            a batch. By default what the config names.
        config: as for `train`.
        validation: the same, held out; by default one item in twenty.
        overrides: as for `train`, such as `{"retrofit.head": 1}`.
        null: the arguments of the empty text, (1, ...) each, for label dropout.
        match_flops: as for `train`.
        progress: whether to show a progress bar.
    """
    if isinstance(model, str | os.PathLike):
        under, make_base = settings_of_base(os.fspath(model)), None
    else:
        base = getattr(model, "transformer", model)
        if not isinstance(base, ModelBase):
            check_kind(type(base).__name__, "the model")
        under = {"retrofit": {"base": f"<{type(base).__name__}>"}}

        def make_base(*_: Any) -> Any:
            return copy.deepcopy(base).float().requires_grad_(True)

    config = _config(config, overrides, under)
    if make_base is not None and isinstance(model, ElasticPipeline):
        check_same_shift(model.scheduler, config.objective.shift, "the pipeline")
    data = _data(dataset, {"validation": validation, "null": null})
    return _run(config, data, overrides, match_flops, progress, make_base)


def _data(dataset: Any, beside: dict[str, Any]) -> tuple[Given, Given] | None:
    """What was given, or None where the config names the data."""
    if dataset is not None:
        return split_given(dataset, **beside)
    for name, value in beside.items():
        if value is not None:
            raise ValueError(f"{name} without a dataset; give both, or neither")
    return None


def _config(
    config: Config, overrides: Overrides | None, under: Mapping[str, Any] | None = None
) -> TrainConfig:
    _check_is_config(config, "config")
    if not isinstance(overrides, Mapping | None):
        raise ValueError(
            f"overrides {overrides!r:.60} are no settings; give a dict of them by dotted keys, "
            f"such as {{'train.steps': 500}}"
        )
    if isinstance(config, TrainConfig):
        tree = config.to_dict()
        tree["retrofit"] |= (under or {}).get("retrofit", {})
        return load_config(None, overrides or {}, tree)
    return load_config(os.fspath(config), overrides or {}, under)


def _check_is_config(given: Any, name: str) -> None:
    if not isinstance(given, TrainConfig | str | os.PathLike):
        raise ValueError(
            f"{name} {given!r:.60} is no config; give a TrainConfig, the path of a YAML file, or "
            f"the name of a built-in one, such as 'digits'"
        )


def _run(
    config: TrainConfig, given: tuple[Given, Given] | None,
    overrides: Overrides | None, match_flops: Config | None, progress: bool,
    make_model: MakeModel | None = None,
) -> TrainResult:  # fmt: skip
    data = None
    if given is not None:
        data, own, about = DataSets(*given), config.data, given[0].about()
        memory = DataConfig(MEMORY, about, own.batch_size, own.num_workers)
        config, channels = replace(config, data=memory), about["shape"][0]
        is_drawn = config.train.sample_every and not given[0].for_diffusers
        if is_drawn and not draws_images(channels):
            raise ValueError(
                f"{channels} channels are no image, and there is no autoencoder to draw with; set "
                f"train.sample_every=0, or prepare the data by `elit prepare --vae`"
            )
    if match_flops is not None:
        _check_is_config(match_flops, "match_flops")
        if "train.steps" in (overrides or {}):
            raise ValueError("match_flops sets train.steps; give one of them")
        other = match_flops if isinstance(match_flops, TrainConfig) else os.fspath(match_flops)
        config = steps_of(config, other, data and data.train)
    data = check_config(config, data=data)
    return loop.train(config, progress, make_model, data)
