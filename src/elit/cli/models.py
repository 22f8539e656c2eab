"""Models by name, presets and checkpoints alike: their shapes, without their weights."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model on the meta device and what is known of it.

    Attributes:
        name: as given.
        model: the model, without memory.
        config: its arguments.
        vae_scale: pixels per element of its input along an axis.
    """

    name: str
    model: Any
    config: dict[str, Any]
    vae_scale: int

    @property
    def resolution(self) -> int | list[int]:
        """Pixels of an image's side, or of height and width."""
        *_, height, width = (side * self.vae_scale for side in self.model.sample_size)
        return height if height == width else [height, width]


def load_shape(name: str, resolution: int | None = None, text_tokens: int | None = None) -> Shape:
    """Shape of a preset, a pipeline's folder or a model's folder.

    Args:
        name: preset or folder.
        resolution: pixels of an image's side; by default what the model was made for.
        text_tokens: length of the text; by default the longest that the model takes.
    """
    shape = _find_shape(name, resolution)
    if text_tokens is None:
        return shape
    if not shape.model.takes_text:
        raise ValueError(f"--text-tokens: {name} draws classes, not texts; leave it out")
    longest = shape.config["max_text_length"]
    if text_tokens > longest:
        raise ValueError(
            f"--text-tokens: {name} takes texts of {longest} tokens at most, not {text_tokens}"
        )
    from elit.evaluation.flops import on_meta

    config = shape.config | {"max_text_length": text_tokens}
    return replace(shape, model=on_meta(type(shape.model), config), config=config)


def _find_shape(name: str, resolution: int | None) -> Shape:
    from elit._choices import nearest
    from elit.evaluation.flops import on_meta
    from elit.models.presets import PRESETS, preset_config, preset_inputs, preset_model

    if name.lower() in PRESETS:
        config = preset_config(name, resolution)
        known, given = next(iter(preset_inputs(name).items()))
        model = on_meta(preset_model(name), config)
        return Shape(name.lower(), model, config, given.scale(known))
    if Path(name).is_dir():
        return _checkpoint_shape(Path(name), resolution)
    near = nearest(name, PRESETS)
    hint = f"did you mean {near}? " if near else ""
    raise ValueError(
        f"{name} is neither a preset nor a checkpoint's folder: {hint}`elit info` lists the "
        f"presets; a folder is the output_dir of `elit train`, or one that save_pretrained wrote"
    )


def _checkpoint_shape(folder: Path, resolution: int | None) -> Shape:
    from elit.evaluation.flops import on_meta
    from elit.models.presets import MODELS
    from elit.pipelines.folder import check_model_config, read_config

    is_pipeline = (folder / "transformer" / "config.json").exists()
    file = folder / "transformer" / "config.json" if is_pipeline else folder / "config.json"
    if not file.exists():
        raise ValueError(
            f"{folder} holds neither transformer/config.json nor config.json: it is no checkpoint; "
            f"give the output_dir of `elit train`, or a folder that save_pretrained wrote"
        )
    config = read_config(file)
    class_name = config.get("_class_name")
    if class_name not in MODELS:
        raise ValueError(
            f"{file} is of a {class_name}: only elit's own models are known, {', '.join(MODELS)}"
        )
    model_class = MODELS[class_name]
    check_model_config(file, config, model_class)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    scale = _vae_scale(folder / "vae" / "config.json") if is_pipeline else 1
    if resolution is not None:
        config["sample_size"] = _sample_size(config["sample_size"], resolution, scale)
    try:
        return Shape(str(folder), on_meta(model_class, config), config, scale)
    except TypeError as error:
        raise ValueError(f"{file} does not describe a {class_name}: {error}") from error


def _vae_scale(file: Path) -> int:
    from elit.pipelines.folder import read_config

    if not file.exists():
        return 1
    config = read_config(file)
    stages = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if not stages:
        raise ValueError(f"{file} says nothing of the VAE's scale: it has no block_out_channels")
    return 2 ** (len(stages) - 1)


def _sample_size(saved: Any, resolution: int, scale: int) -> Any:
    """Size of the model's input, (t,) h, w, at another resolution."""
    if resolution % scale:
        raise ValueError(
            f"resolution {resolution} is not a multiple of {scale}, the VAE's scale; "
            f"use {-(-resolution // scale) * scale}"
        )
    side = resolution // scale
    return side if isinstance(saved, int) else [*saved[:-2], side, side]
