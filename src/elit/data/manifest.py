"""Manifest of a prepared folder: its shards, and what they were made of.

PREPARED/
settings.json                    what it is made of; written first, by `elit prepare`
train-00000-256x256.safetensors  a shard: the samples of one size from one part of the source
train-00000.json                 record of a part, written after its shards: the part is done
null.safetensors                 the empty text, encoded; of captioned sets with a text encoder
null.json                        its record, with the checksum
manifest.json                    written when all parts are done
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elit._choices import check_choice
from elit._files import json_text, write_text
from elit._numbers import MOST, is_whole
from elit._plain import from_plain, read_json

MANIFEST, SETTINGS = "manifest.json", "settings.json"
NULL, NULL_RECORD = "null.safetensors", "null.json"
FORMAT, VERSION = "elit-prepared", 1

# What a shard holds, n samples: one of these three, (n, ...), and NAME_flipped with mirrored ones.
MOMENTS = "moments"  # (n, 2C, h, w): mean and log-variance of the autoencoder's posterior
LATENTS = "latents"  # (n, C, h, w) of an autoencoder that has no posterior
PIXELS = "images"  # (n, C, H, W) uint8, 0 black, 255 white
KINDS = (MOMENTS, LATENTS, PIXELS)
FLIPPED = "_flipped"
FEATURES = "features"  # (n, c, h, w) of a vision model; of mirrored samples FEATURES_flipped
LABELS = "class_labels"  # (n,) int64
ROWS = "rows"  # (n,) int64, of the source
CAPTIONS, CAPTION_ENDS = "captions", "caption_ends"  # UTF-8 of all texts, and (n,) where each ends
# Every other tensor (n, ...) is a text's encoding, by the argument of the model that takes it.
_MIRRORED = (*KINDS, FEATURES)
RESERVED = (
    *_MIRRORED, *(f"{name}{FLIPPED}" for name in _MIRRORED), LABELS, ROWS, CAPTIONS, CAPTION_ENDS
)  # fmt: skip


Headers = Mapping[str, tuple[str, tuple[int, ...]]]  # safetensors' type, and shape, by name


@dataclass(frozen=True)
class Shard:
    """A file of samples of one size."""

    file: str  # its name in the folder
    size: tuple[int, ...]  # of its pictures in pixels, (H, W), of clips (T, H, W)
    count: int  # samples, mirrored ones not counted
    bytes: int  # length of the file
    sha256: str  # of the file


@dataclass(frozen=True)
class Split:
    """The shards of one split, in the order of the source."""

    shards: tuple[Shard, ...] = ()  # all of them
    # row of the source and reason, of what could not be read
    skipped: tuple[tuple[int, str], ...] = ()

    @property
    def count(self) -> int:
        """Samples in all."""
        return sum(shard.count for shard in self.shards)


@dataclass(frozen=True)
class Autoencoder:
    """The encoder of the pictures: latents = (draw - shift) * scale, of each channel."""

    name: str  # on the hub, or its folder
    class_name: str  # diffusers' class
    sha256: str  # of its weights
    scale: tuple[float, ...] = (1.0,)  # one number, or one for each channel
    shift: tuple[float, ...] = (0.0,)  # likewise


@dataclass(frozen=True)
class Features:
    """What made maps of features of the pictures."""

    name: str  # on the hub, or its folder
    class_name: str  # transformers' class
    sha256: str  # of its weights
    shape: tuple[int, ...]  # of one picture's, (c, h, w)


@dataclass(frozen=True)
class Manifest:
    """Content of a prepared folder."""

    kind: str  # "moments", "latents" or "images"
    # shape of one sample as the model sees it, (C, h, w) or (C, t, h, w), by the size of its
    # pictures, such as "256x256"
    shapes: dict[str, tuple[int, ...]]
    splits: dict[str, Split]  # by name; "train" and, if the source has one, "validation"
    classes: tuple[str, ...] = ()  # their names, by label; empty without labels
    captions: bool = False  # whether every sample has a text
    flips: bool = False  # whether every sample has a mirrored one
    autoencoder: Autoencoder | None = None  # None for pixels
    text_encoder: str | None = None  # name of what encoded the texts, or None
    max_text_length: int | None = None  # tokens that encoded texts are padded to
    # where it came from: name, split, rows, fingerprint and what else is known
    source: dict[str, Any] = field(default_factory=dict)
    # which one each size belongs to, by the size, such as "192x320": 256; a size that is not
    # named is one of its own
    resolutions: dict[str, int] = field(default_factory=dict)
    null: Shard | None = None  # file of the empty text, encoded, or None
    features: Features | None = None  # of the vision model whose features are stored, or None

    def check(self) -> None:
        """Raise a ValueError for parts that don't belong together."""
        check_choice(self.kind, KINDS, "kind")
        for name, shape in self.shapes.items():
            sides = name.split("x")
            numbers = (*(int(side) for side in sides if side.isdecimal()), *shape)
            fits = len(sides) == len(shape) - 1 and len(numbers) == len(sides) + len(shape)
            if not fits or not all(map(is_whole, numbers)):
                raise ValueError(
                    f"a size {name!r} of shape {shape} is none; give 256x256: (C, h, w)"
                )
        for name in self.resolutions:
            check_choice(name, self.shapes, "size", " in resolutions")
        for name, split in self.splits.items():
            check_choice(name, ("train", "validation"), "split")
            for shard in split.shards:
                check_choice(size_name(shard.size), self.shapes, "size", f" of {shard.file}")
        shards = [shard for split in self.splits.values() for shard in split.shards]
        for shard in (*shards, *([self.null] if self.null else [])):
            if not (is_whole(shard.count, most=2**62) and is_whole(shard.bytes, most=2**62)):
                counts = f"count {shard.count} and bytes {shard.bytes}"
                raise ValueError(f"{counts} of {shard.file} are not both above 0")
            if not re.fullmatch(r"[\w.-]+\.safetensors", shard.file):
                raise ValueError(f"the file {shard.file!r} is none in this folder")
        for what, names in (("file", [s.file for s in shards]), ("class", self.classes)):
            if twice := [name for name, times in Counter(names).items() if times > 1]:
                raise ValueError(f"{what} {twice[0]!r} is named twice")
        if (self.autoencoder is None) != (self.kind == PIXELS):
            raise ValueError(f"autoencoder is {self.autoencoder}, which {self.kind} can't have")
        if self.max_text_length is not None and not is_whole(self.max_text_length):
            raise ValueError(f"max_text_length is {self.max_text_length}; give 1 or more, or null")
        if self.features and not (
            len(self.features.shape) == 3 and all(map(is_whole, self.features.shape))
        ):
            raise ValueError(f"features.shape is {self.features.shape}; give (c, h, w)")
        for name in ("scale", "shift") if self.autoencoder else ():
            numbers = getattr(self.autoencoder, name)
            fits = all(len(numbers) in (1, shape[0]) for shape in self.shapes.values())
            if not fits or (name == "scale" and 0 in numbers) or max(map(abs, numbers)) > MOST:
                raise ValueError(
                    f"autoencoder.{name} is {numbers}; give one number, or one for each channel"
                )

    def misfit(self, shard: Shard, tensors: Headers) -> str | None:
        """The first fault of a shard's tensors, by their types and shapes, or None."""
        channels, *space = self.shapes[size_name(shard.size)]
        image = (channels * (2 if self.kind == MOMENTS else 1), *space)
        numbers = ("U8",) if self.kind == PIXELS else ("F32", "F16", "BF16")
        expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {self.kind: (numbers, image)}
        if self.features:
            expected[FEATURES] = ("F32", "F16", "BF16"), self.features.shape
        if self.flips:
            expected |= {f"{name}{FLIPPED}": about for name, about in expected.items()}
        if self.classes:
            expected[LABELS] = ("I64",), ()
        if self.captions:
            expected |= {CAPTION_ENDS: (("I64",), ()), CAPTIONS: (("U8",), ())}
        if lacks := [name for name in expected if name not in tensors]:
            return f"it has no {lacks[0]}, but {', '.join(sorted(tensors))}"
        for name, (kind, shape) in tensors.items():
            kinds, of_sample = expected.get(name, ((kind,), shape[1:]))
            if name != CAPTIONS and shape != (shard.count, *of_sample):
                return f"{name} is {shape}, but {MANIFEST} has {(shard.count, *of_sample)}"
            if kind not in kinds:
                return f"{name} is of {kind}, not of {' or '.join(kinds)}"
        return None

    def write(self, folder: Path) -> None:
        """Write it into a prepared folder, unless the same is there."""
        path = folder / MANIFEST
        text = json_text({"format": FORMAT, "version": VERSION, **asdict(self)})
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder, or a ValueError that says what is wrong with it."""
    path = folder / MANIFEST
    if not path.is_file():
        begun = (folder / SETTINGS).exists()
        what = "is not finished: run its `elit prepare` again, it goes on" if begun else (
            f"is no prepared folder: it has no {MANIFEST}; give the output of `elit prepare`"
        )  # fmt: skip
        raise ValueError(f"{folder} {what}")
    advice = "prepare the data again into an empty folder"
    content = read_json(path, advice)
    try:
        if content.pop("format", None) != FORMAT:
            raise ValueError("it is of something else")
        if (version := content.pop("version", None)) != VERSION:
            raise ValueError(f"it is of version {version}, this elit reads {VERSION}")
        manifest = from_plain(Manifest, content)
        manifest.check()
        return manifest
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); {advice}") from error


def size_name(size: tuple[int, ...]) -> str:
    """(256, 256) -> '256x256'."""
    return "x".join(map(str, size))
