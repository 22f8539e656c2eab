"""What a config describes, made: the model and the sampler of its tail dropping."""

from typing import Any

import torch

from elit.data import ImageDataset
from elit.interface.budget import TailDropping
from elit.models.elastic import ElasticMixin
from elit.models.presets import nearest_resolution, preset_config, preset_model
from elit.training.config import LatentsConfig, TrainConfig
from elit.training.randomness import generator


def build_model(config: TrainConfig, dataset: ImageDataset) -> Any:
    """Model of a config, made for the images of a data set, with weights from the run's seed."""
    channels, *size = dataset.image_shape
    arguments: dict[str, Any] = {
        "sample_size": size[0] if len(set(size)) == 1 else size,
        "in_channels": channels,
        "num_classes": dataset.num_classes,
    }
    resolution = nearest_resolution(config.model.preset, size)
    preset = preset_config(config.model.preset, resolution, config.model.overrides)
    if preset.get("group") is not None and config.latents.min is not None:
        arguments["min_latents"] = config.latents.min
        if "min_latents" in config.model.overrides:
            raise ValueError(
                "latents.min and model.overrides.min_latents are the same thing; give one of them"
            )
    for key in ("sample_size", "in_channels", "num_classes"):
        wanted = config.model.overrides.get(key, arguments[key])
        if wanted != arguments[key]:
            raise ValueError(
                f"model.overrides.{key}={wanted} does not fit the data set {config.data.name!r}, "
                f"which has {arguments[key]}; leave it out"
            )
    arguments |= config.model.overrides
    arguments = preset_config(config.model.preset, resolution, arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "weights").initial_seed())
        return preset_model(config.model.preset)(**arguments)


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
    return TailDropping(low, high, total, latents.order)
