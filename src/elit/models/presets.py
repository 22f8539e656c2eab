"""Sizes of the named models, a line each; a table that needs no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

from elit._choices import check_choice, hint_at

if TYPE_CHECKING:
    from elit.models.elastic import ElasticMixin


@dataclass(frozen=True)
class Size:
    """Width, heads, depth, and the blocks of head and tail of the elastic form."""

    hidden_size: int
    num_heads: int
    depth: int
    head: int
    tail: int


@dataclass(frozen=True)
class Input:
    """Arguments of a model of some resolution, beside its size; None is no argument of it."""

    sample_size: int | tuple[int, ...]
    in_channels: int
    group: int | tuple[int, ...]
    min_latents: int
    num_classes: int | None = None
    max_text_length: int | None = None
    text_dim: int | None = None
    vocab_size: int | None = None
    pooled_dim: int | None = None

    def scale(self, resolution: int) -> int:
        """Pixels per element of the input along an axis: the VAE's, or 1."""
        return resolution // self.side

    @property
    def side(self) -> int:
        """Height and width of the input."""
        return self.sample_size if isinstance(self.sample_size, int) else self.sample_size[-1]


# The splits are the paper's: 71 % of XL's blocks and 50 % of B's are in the core.
SIZES = {
    "tiny": Size(hidden_size=64, num_heads=2, depth=4, head=1, tail=1),
    "s": Size(hidden_size=384, num_heads=6, depth=12, head=3, tail=3),
    "b": Size(hidden_size=768, num_heads=12, depth=12, head=3, tail=3),
    "l": Size(hidden_size=1024, num_heads=16, depth=24, head=4, tail=4),
    # 256 px, 500k steps, no guidance: FID 13.0 plain, 8.2 elastic, 7.8 multi-budget.
    # 512 px: 18.8, 11.1, 10.1.
    "xl": Size(hidden_size=1152, num_heads=16, depth=28, head=4, tail=4),
    # As large as SD3-medium, and as Qwen-Image (DPG-Bench 91.27 plain, 90.45 elastic).
    "sd3": Size(hidden_size=1536, num_heads=24, depth=24, head=4, tail=4),
    "qwen": Size(hidden_size=3072, num_heads=24, depth=60, head=8, tail=8),
}

# The public checkpoints have the Read behind 8 blocks at every size: 57 % of XL's blocks are in
# the core, and 17 % of B's.
SIT_SIZES = {
    name: replace(SIZES[name], head=8, tail=tail)
    for name, tail in {"s": 2, "b": 2, "l": 4, "xl": 4}.items()
}

# Latents of the SD VAE (1/8 of the pixels, 4 channels); groups as in the paper, 16 in both.
LATENT_INPUTS = {
    256: Input(sample_size=32, in_channels=4, num_classes=1000, group=4, min_latents=1),
    512: Input(sample_size=64, in_channels=4, num_classes=1000, group=8, min_latents=4),
}
# Pixels of the small built-in data sets: `digits` and `shapes`.
PIXEL_INPUTS = {
    16: Input(sample_size=16, in_channels=1, num_classes=10, group=4, min_latents=1),
    32: Input(sample_size=32, in_channels=3, num_classes=10, group=4, min_latents=1),
}

# Clips: 8 frames of `moving-shapes`, and 29 frames of Kinetics-700 in VAE latents (time / 4).
VIDEO_PIXEL_INPUTS = {
    16: Input((8, 16, 16), in_channels=3, num_classes=4, group=(2, 4, 4), min_latents=1)
}
VIDEO_LATENT_INPUTS = {
    256: Input((8, 32, 32), in_channels=16, num_classes=700, group=(2, 4, 4), min_latents=2)
}


# Tokens of a representation autoencoder with a ViT-B of patch 14 or 16: DINOv2, SigLIP 2 or MAE.
RAE_INPUTS = {
    256: Input(sample_size=16, in_channels=768, num_classes=1000, group=4, min_latents=1),
    512: Input(sample_size=32, in_channels=768, num_classes=1000, group=8, min_latents=4),
}

# Words of the tiny models' own encoder; states of CLIP-L, of T5-XXL, of Qwen2.5-VL-7B.
DEFAULT_VOCAB_SIZE = 4096
_WORDS = {"num_classes": None, "max_text_length": 32, "vocab_size": DEFAULT_VOCAB_SIZE}
_CLIP = {"num_classes": None, "max_text_length": 77, "text_dim": 768}
_T5 = {"max_text_length": 256, "text_dim": 4096}
_QWEN = {"max_text_length": 512, "text_dim": 3584}


def _with_text(inputs: Mapping[int, Input], text: Mapping[str, Any]) -> dict[int, Input]:
    """The same inputs with a text in place of a class."""
    return {resolution: replace(given, **text) for resolution, given in inputs.items()}


# VAE latents of 16 channels at 1/8 of the pixels; groups of 8x8: 64 of them at 1024 px.
_WIDE_LATENTS = {
    512: Input(sample_size=64, in_channels=16, group=8, min_latents=8),
    1024: Input(sample_size=128, in_channels=16, group=8, min_latents=8),
}


@dataclass(frozen=True)
class Family:
    """A backbone: its class, and the patch sizes of each of its named sizes."""

    model: str  # name of its class
    patches: dict[str, tuple[int, ...]]  # by name of the size, as `special` and `sizes`
    always_split: bool = False  # head and tail are there in the plain model too
    pixels: Mapping[int, Input] = field(default_factory=lambda: PIXEL_INPUTS)  # of the tiny size
    latents: Mapping[int, Input] = field(default_factory=lambda: LATENT_INPUTS)  # of the others
    frames_per_patch: tuple[int, int] | None = None  # of the tiny size and of the others
    frames_per_latent: int = 1  # frames per element of the input in time; of the tiny size, 1
    special: Mapping[str, Mapping[int, Input]] = field(default_factory=dict)  # neither
    sizes: Mapping[str, Size] = field(default_factory=lambda: SIZES)

    def inputs(self, size: str) -> Mapping[int, Input]:
        """Inputs of a size, by resolution."""
        return self.special.get(size) or (self.pixels if size == "tiny" else self.latents)


_ALL_SIZES = {"tiny": (2, 4), "s": (2, 4, 8), "b": (2, 4, 8), "l": (2, 4, 8), "xl": (2, 4, 8)}
_SOME_SIZES = {"tiny": (2, 4), "b": (2,), "xl": (2,)}

# A new backbone is one line here and one file.
FAMILIES = {
    "dit": Family("DiT", _ALL_SIZES),
    # 256 px, 500k steps, no guidance: FID 8.3 plain, 7.5 elastic, 7.1 multi-budget.
    # 512 px: 11.6, 8.9, 7.7.
    # arXiv 2510.11690: the width has to be no less than what a token holds, here 768.
    "rae-dit": Family("DiT", {"b": (1,), "l": (1,), "xl": (1,)}, latents=RAE_INPUTS),
    "uvit": Family("UViT", _SOME_SIZES),
    # 256 px: 12.8, 9.4, 9.4. 512 px: 13.0, 10.1, 9.6.
    "hdit": Family("HDiT", _SOME_SIZES, always_split=True),
    # Kinetics-700, 29 frames, no guidance: FVD 135.9 plain, 116.5 elastic.
    "video-dit": Family(
        "DiT",
        {"tiny": (2,), "b": (2,), "xl": (2,)},
        pixels=VIDEO_PIXEL_INPUTS,
        latents=VIDEO_LATENT_INPUTS,
        frames_per_patch=(2, 1),
        frames_per_latent=4,
    ),
    "mmdit": Family(
        "MMDiT",
        {"tiny": (2, 4), "b": (2,), "sd3": (2,), "qwen": (2,)},
        pixels=_with_text(PIXEL_INPUTS, _WORDS),
        latents=_with_text(LATENT_INPUTS, _CLIP),
        special={
            "sd3": _with_text(_WIDE_LATENTS, _T5),
            "qwen": _with_text(_WIDE_LATENTS, _QWEN),
        },
    ),
    "video-mmdit": Family(
        "MMDiT",
        {"tiny": (2,), "b": (2,)},
        pixels=_with_text(VIDEO_PIXEL_INPUTS, _WORDS),
        latents=_with_text(VIDEO_LATENT_INPUTS, _CLIP),
        frames_per_patch=(2, 1),
        frames_per_latent=4,
    ),
    # The public checkpoints. 256 px, no guidance: FID 18.97 plain, 11.23 elastic, 9.98
    # multi-budget (8.93 at 2M steps). 512 px: 21.82, 10.28, 9.65 (8.77 at 1M).
    "sit": Family(
        "SiT", dict.fromkeys(("tiny", *SIT_SIZES), (2,)), sizes=SIT_SIZES | {"tiny": SIZES["tiny"]}
    ),
}
MODELS = tuple(dict.fromkeys(family.model for family in FAMILIES.values()))

PRESETS = tuple(
    f"{form}{name}-{size}/{patch}"
    for name, family in FAMILIES.items()
    for form in ("", "elit-")
    for size, patches in family.patches.items()
    for patch in patches
)


def _parts(name: str) -> tuple[Family, str, int, bool]:
    """Family, size, patch and whether elastic, of a preset's name."""
    check_choice(name.lower() if isinstance(name, str) else name, PRESETS, "preset")
    rest, patch = name.lower().removeprefix("elit-").split("/")
    family, size = rest.rsplit("-", 1)
    return FAMILIES[family], size, int(patch), name.lower().startswith("elit-")


def model_class(name: str) -> type[ElasticMixin]:
    """One of MODELS; its module, named as it is, takes seconds to import."""
    return getattr(importlib.import_module(f"{__package__}.{name.lower()}"), name)


def preset_class(name: str) -> str:
    """Name of the class of the model that a preset's name stands for."""
    return _parts(name)[0].model


def preset_model(name: str) -> type[ElasticMixin]:
    """Class of the model that a preset's name stands for."""
    return model_class(preset_class(name))


def preset_inputs(name: str) -> Mapping[int, Input]:
    """Inputs of a preset at each resolution that it knows."""
    family, size, *_ = _parts(name)
    return family.inputs(size)


def preset_frames_per_latent(name: str) -> int:
    """Frames per element of a preset's input in time."""
    family, size, *_ = _parts(name)
    return 1 if size == "tiny" else family.frames_per_latent


def nearest_resolution(name: str, sample_size: Sequence[int]) -> int:
    """The resolution of a preset that was made for inputs of nearly this size."""
    inputs = preset_inputs(name)
    side = max(sample_size)
    return min(inputs, key=lambda resolution: abs(inputs[resolution].side - side))


def preset_config(
    name: str, resolution: int | None = None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Arguments of the model that a preset's name stands for; see `create_model`."""
    inputs = preset_inputs(name)
    family, size, patch, elastic = _parts(name)
    resolution = min(inputs) if resolution is None else resolution
    if resolution not in inputs:
        raise ValueError(
            f"preset {name.lower()!r} is not made for {resolution} px; "
            f"it knows {' and '.join(map(str, inputs))}"
        )
    patches: Any = patch
    if family.frames_per_patch is not None:
        patches = (family.frames_per_patch[size != "tiny"], patch, patch)
    given = {key: value for key, value in vars(inputs[resolution]).items() if value is not None}
    config = {"patch_size": patches, **vars(family.sizes[size]), **given}
    if not elastic:
        for key in ("group", "min_latents") + (() if family.always_split else ("head", "tail")):
            del config[key]
    return config | dict(overrides or {})


def create_model(name: str, resolution: int | None = None, **overrides: Any) -> Any:
    """Make the model that a preset's name stands for, with random weights.

    Args:
        name: such as "dit-xl/2" or "elit-dit-xl/2", upper or lower case.
        resolution: pixels of an image's side; by default the smallest that the preset knows.
        **overrides: arguments of the model to change.
    """
    model = preset_model(name)
    taken = list(signature(model).parameters)
    for key in overrides.keys() - set(taken):
        hint = hint_at(key, taken, f"it takes {', '.join(taken)}")
        raise TypeError(f"unknown argument {key!r:.60} of {model.__name__}: {hint}")
    return model(**preset_config(name, resolution, overrides))
