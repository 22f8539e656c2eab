"""Sizes of the named models, a line each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elit._choices import check_choice
from elit.models.dit import DiT


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
    """What a model of some resolution sees: input side and channels, classes, groups."""

    sample_size: int
    in_channels: int
    num_classes: int
    group: int
    min_latents: int

    def scale(self, resolution: int) -> int:
        """Pixels per element of the input along an axis: the VAE's, or 1."""
        return resolution // self.sample_size


# The splits are the paper's: 71 % of XL's blocks and 50 % of B's are in the core.
SIZES = {
    "tiny": Size(hidden_size=64, num_heads=2, depth=4, head=1, tail=1),
    "s": Size(hidden_size=384, num_heads=6, depth=12, head=3, tail=3),
    "b": Size(hidden_size=768, num_heads=12, depth=12, head=3, tail=3),
    "l": Size(hidden_size=1024, num_heads=16, depth=24, head=4, tail=4),
    # 256 px, 500k steps, no guidance: FID 13.0 plain, 8.2 elastic, 7.8 multi-budget.
    # 512 px: 18.8, 11.1, 10.1.
    "xl": Size(hidden_size=1152, num_heads=16, depth=28, head=4, tail=4),
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

PATCHES = {"tiny": (2, 4), "s": (2, 4, 8), "b": (2, 4, 8), "l": (2, 4, 8), "xl": (2, 4, 8)}

PRESETS = tuple(
    f"{form}dit-{size}/{patch}"
    for form in ("", "elit-")
    for size, patches in PATCHES.items()
    for patch in patches
)


def preset_inputs(name: str) -> dict[int, Input]:
    """What a preset sees at each resolution that it knows."""
    name = name.lower()
    check_choice(name, PRESETS, "preset")
    return PIXEL_INPUTS if "tiny" in name else LATENT_INPUTS


def nearest_resolution(name: str, sample_size: Sequence[int]) -> int:
    """The resolution of a preset that was made for inputs of nearly this size."""
    inputs = preset_inputs(name)
    side = max(sample_size)
    return min(inputs, key=lambda resolution: abs(inputs[resolution].sample_size - side))


def preset_config(
    name: str, resolution: int | None = None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Arguments of the model that a preset's name stands for.

    Args:
        name: such as "dit-xl/2" or "elit-dit-xl/2", upper or lower case.
        resolution: pixels of an image's side; by default the smallest that the preset knows.
        overrides: arguments to change, by name.
    """
    inputs = preset_inputs(name)
    name = name.lower()
    size_name, patch = name.removeprefix("elit-").removeprefix("dit-").split("/")
    resolution = resolution or min(inputs)
    if resolution not in inputs:
        raise ValueError(
            f"preset {name!r} is not made for {resolution} px; "
            f"it knows {' and '.join(map(str, inputs))}"
        )
    config = {"patch_size": int(patch), **vars(SIZES[size_name]), **vars(inputs[resolution])}
    if not name.startswith("elit-"):
        for elastic in ("group", "head", "tail", "min_latents"):
            del config[elastic]
    return config | dict(overrides or {})


def create_model(name: str, resolution: int | None = None, **overrides: Any) -> DiT:
    """Make the model that a preset's name stands for, with random weights.

    Args:
        name: such as "dit-xl/2" or "elit-dit-xl/2".
        resolution: pixels of an image's side; by default the smallest that the preset knows.
        **overrides: arguments of the model to change.
    """
    return DiT(**preset_config(name, resolution, overrides))
