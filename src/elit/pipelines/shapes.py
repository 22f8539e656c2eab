"""Models by name, presets and checkpoints alike: their sizes and cost, without their weights."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elit._choices import nearest
from elit._numbers import latent_frames
from elit.cost.formulas import ModelCost
from elit.models.presets import (
    MODELS,
    PRESETS,
    model_class,
    preset_class,
    preset_config,
    preset_frames_per_latent,
    preset_inputs,
)
from elit.pipelines.folder import check_model_config, draws_images, read_config


@dataclass(frozen=True)
class Shape:
    """A model's sizes and what is known of it.

    Attributes:
        name: as given.
        kind: name of its class.
        config: its arguments.
        vae_scale: pixels per element of its input along an axis.
        time_scale: frames per element of its input in time.
        text_tokens: length of the text; None is the longest that the model takes.
    """

    name: str
    kind: str
    config: dict[str, Any]
    vae_scale: int
    time_scale: int
    text_tokens: int | None = None

    @property
    def cost(self) -> ModelCost:
        """Sizes, parameters and FLOPs."""
        return ModelCost(self.kind, self.config, text_tokens=self.text_tokens)

    @property
    def resolution(self) -> int | list[int]:
        """Pixels of an image's side, or of height and width."""
        *_, height, width = (side * self.vae_scale for side in self.cost.sample_size)
        return height if height == width else [height, width]

    @property
    def frames(self) -> int | None:
        """Frames of a clip; None of an image."""
        length = self.cost.sample_size[:-2]
        return (length[0] - 1) * self.time_scale + 1 if length else None

    @property
    def input_size(self) -> str:
        """Size of its input in words: "256 px", "29 frames of 256x512 px", "32x32 VAE latents"."""
        if self.vae_scale == 1 and not draws_images(self.config["in_channels"]):
            return f"{'x'.join(map(str, self.cost.sample_size))} VAE latents"
        sides = self.resolution if isinstance(self.resolution, list) else [self.resolution]
        frames = "" if self.frames is None else f"{self.frames} frames of "
        return f"{frames}{'x'.join(map(str, sides))} px"

    def describe(self) -> dict[str, Any]:
        """Config, size, split, groups and budgets, in plain types."""
        cost = self.cost
        kept = range(cost.min_latents, cost.max_latents + 1) if cost.is_elastic else []
        return {
            "model": self.name,
            "resolution": self.resolution,
            "frames": self.frames,
            "parameters": cost.parameters,
            "split": list(cost.split),
            "group": None if cost.group is None else list(cost.group),
            "max_latents": cost.max_latents,
            "min_latents": cost.min_latents,
            "budgets": [cost.budget_of(n) for n in kept] or [1.0],
            "config": self.config,
        }


def load_shape(
    name: str,
    resolution: int | None = None,
    frames: int | None = None,
    text_tokens: int | None = None,
) -> Shape:
    """Shape of a preset, a pipeline's folder or a model's folder.

    Args:
        name: preset or folder.
        resolution: pixels of an image's side; by default what the model was made for.
        frames: of a clip; by default what the model was made for.
        text_tokens: length of the text; by default the longest that the model takes.
    """
    shape = _find_shape(name, resolution)
    if frames is not None:
        if shape.frames is None:
            raise ValueError(f"--frames: {name} draws images, not clips; leave it out")
        length = latent_frames(frames, shape.time_scale, "frames")
        size = [length, *shape.cost.sample_size[1:]]
        shape = replace(shape, config=shape.config | {"sample_size": size})
    if text_tokens is None:
        return shape
    if not shape.cost.takes_text:
        raise ValueError(f"--text-tokens: {name} draws classes, not texts; leave it out")
    longest = shape.config["max_text_length"]
    if text_tokens > longest:
        raise ValueError(
            f"--text-tokens: {name} takes texts of {longest} tokens at most, not {text_tokens}"
        )
    return replace(shape, text_tokens=text_tokens)


def _find_shape(name: str, resolution: int | None) -> Shape:
    if name.lower() in PRESETS:
        config = preset_config(name, resolution)
        known, given = next(iter(preset_inputs(name).items()))
        scales = given.scale(known), preset_frames_per_latent(name)
        return Shape(name.lower(), preset_class(name), config, *scales)
    if Path(name).is_dir():
        return _checkpoint_shape(Path(name), resolution)
    near = nearest(name, PRESETS)
    hint = f"did you mean {near}? " if near else ""
    raise ValueError(
        f"{name} is neither a preset nor a checkpoint's folder: {hint}`elit info` lists the "
        f"presets; a folder is the output_dir of `elit train`, or one that save_pretrained wrote"
    )


def _checkpoint_shape(folder: Path, resolution: int | None) -> Shape:
    is_pipeline = (folder / "transformer" / "config.json").exists()
    file = folder / "transformer" / "config.json" if is_pipeline else folder / "config.json"
    if not file.exists():
        raise ValueError(
            f"{folder} holds neither transformer/config.json nor config.json: it is no checkpoint; "
            f"give the output_dir of `elit train`, or a folder that save_pretrained wrote"
        )
    config = read_config(file)
    class_name = str(config.get("_class_name"))
    base = class_name.removeprefix("Elastic")
    if base not in MODELS:
        raise ValueError(
            f"{file} is of a {class_name}: only elit's own models are known, {', '.join(MODELS)}"
        )
    from elit.cost.flops import on_meta
    from elit.retrofit.elastic import elastic_class

    model: Any = model_class(base)
    model = model if class_name == base else elastic_class(model)
    check_model_config(file, config, model)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    scales = _vae_scales(folder / "vae" / "config.json") if is_pipeline else (1, 1)
    if resolution is not None:
        saved, (side, rest) = config["sample_size"], divmod(resolution, scales[0])
        if rest:
            raise ValueError(
                f"resolution {resolution} is not a multiple of {scales[0]}, the VAE's scale; "
                f"use {(side + 1) * scales[0]}"
            )
        config["sample_size"] = side if isinstance(saved, int) else [*saved[:-2], side, side]
    try:
        on_meta(model, config)  # or an error
    except TypeError as error:
        raise ValueError(f"{file} does not describe a {class_name}: {error}") from error
    return Shape(str(folder), class_name, config, *scales)


def _vae_scales(file: Path) -> tuple[int, int]:
    """Pixels per element of the VAE latents along an axis of space, frames along time."""
    if not file.exists():
        return 1, 1
    import torch

    from elit.pipelines.autoencoder import autoencoder_class, spatial_scale, temporal_scale

    config = read_config(file)
    kind = autoencoder_class(file, config)
    try:
        with torch.device("meta"):
            vae = kind.from_config(config)
        return spatial_scale(vae), temporal_scale(vae)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not describe a {kind.__name__}: {error}") from error
