"""What a prepared folder holds: its shards, and what they were made of.

PREPARED/
settings.json                    what it is made of; written first, by `elit prepare`
train-00000-256x256.safetensors  a shard: the samples of one size from one part of the source
train-00000.json                 record of a part, written after its shards: the part is done
null.safetensors                 the empty text, encoded; of captioned sets with a text encoder
null.json                        its record, with the checksum
manifest.json                    written when all parts are done
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elit._files import json_text, write_text
from elit._numbers import is_whole

MANIFEST, SETTINGS = "manifest.json", "settings.json"
NULL, NULL_RECORD = "null.safetensors", "null.json"
FORMAT, VERSION = "elit-prepared", 1

# What a shard holds, n samples: one of these three, (n, ...), and NAME_flipped with mirrored ones.
MOMENTS = "moments"  # (n, 2C, h, w): mean and log-variance of the autoencoder's posterior
LATENTS = "latents"  # (n, C, h, w) of an autoencoder that has no posterior
PIXELS = "images"  # (n, C, H, W) uint8, 0 black, 255 white
KINDS = (MOMENTS, LATENTS, PIXELS)
FLIPPED = "_flipped"
LABELS = "class_labels"  # (n,) int64
ROWS = "rows"  # (n,) int64, of the source
CAPTIONS, CAPTION_ENDS = "captions", "caption_ends"  # UTF-8 of all texts, and (n,) where each ends
# Every other tensor (n, ...) is a text's encoding, by the argument of the model that takes it.
RESERVED = (*KINDS, *(f"{kind}{FLIPPED}" for kind in KINDS), LABELS, ROWS, CAPTIONS, CAPTION_ENDS)


@dataclass(frozen=True)
class Shard:
    """A file of samples of one size.

    Attributes:
        file: its name in the folder.
        size: of its pictures in pixels, (H, W), of clips (T, H, W).
        count: samples, mirrored ones not counted.
        bytes: length of the file.
        sha256: of the file.
    """

    file: str
    size: tuple[int, ...]
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of one split, in the order of the source.

    Attributes:
        shards: all of them.
        skipped: row of the source and reason, of what could not be read.
    """

    shards: tuple[Shard, ...] = ()
    skipped: tuple[tuple[int, str], ...] = ()

    @property
    def count(self) -> int:
        """Samples in all."""
        return sum(shard.count for shard in self.shards)


@dataclass(frozen=True)
class Autoencoder:
    """What encoded the pictures: latents = (draw - shift) * scale, of each channel.

    Attributes:
        name: on the hub, or its folder.
        class_name: diffusers' class.
        sha256: of its weights.
        scale: one number, or one for each channel.
        shift: likewise.
    """

    name: str
    class_name: str
    sha256: str
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
        kind: "moments", "latents" or "images".
        shapes: shape of one sample as the model sees it, (C, h, w) or (C, t, h, w), by the size of
            its pictures, such as "256x256".
        splits: by name; "train" and, if the source has one, "validation".
        classes: their names, by label; empty without labels.
        captions: whether every sample has a text.
        flips: whether every sample has a mirrored one.
        autoencoder: None for pixels.
        text_encoder: name of what encoded the texts, or None.
        max_text_length: tokens that encoded texts are padded to.
        source: where it came from: name, split, rows, fingerprint and what else is known.
        resolutions: which one each size belongs to, by the size, such as "192x320": 256; a size
            that is not named is one of its own.
        null: file of the empty text, encoded, or None.
    """

    kind: str
    shapes: dict[str, tuple[int, ...]]
    splits: dict[str, Split]
    classes: tuple[str, ...] = ()
    captions: bool = False
    flips: bool = False
    autoencoder: Autoencoder | None = None
    text_encoder: str | None = None
    max_text_length: int | None = None
    source: dict[str, Any] = field(default_factory=dict)
    resolutions: dict[str, int] = field(default_factory=dict)
    null: Shard | None = None

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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("it is of something else")
        if (version := content.pop("version")) != VERSION:
            raise ValueError(f"it is of version {version}, this elit reads {VERSION}")
        return _manifest(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
        raise ValueError(
            f"{path} cannot be read ({reason}); prepare the data again into an empty folder"
        ) from error


def _manifest(content: dict[str, Any]) -> Manifest:
    if content["kind"] not in KINDS:
        raise ValueError(f"kind {content['kind']!r} is none of {', '.join(KINDS)}")
    splits = {
        name: Split(
            tuple(map(_shard, split["shards"])),
            tuple((int(row), str(reason)) for row, reason in split["skipped"]),
        )
        for name, split in content.pop("splits").items()
    }
    if autoencoder := content.pop("autoencoder"):
        for name in ("scale", "shift"):
            autoencoder[name] = tuple(autoencoder[name])
        autoencoder = Autoencoder(**autoencoder)
    null = content.pop("null", None)
    shapes = {size: tuple(shape) for size, shape in content.pop("shapes").items()}
    classes = tuple(content.pop("classes"))
    return Manifest(
        shapes=shapes, splits=splits, classes=classes, autoencoder=autoencoder,
        null=_shard(null) if null else None, **content,
    )  # fmt: skip


def _shard(content: dict[str, Any]) -> Shard:
    shard = Shard(**{**content, "size": tuple(content["size"])})
    for name in ("count", "bytes"):
        if not is_whole(getattr(shard, name), most=2**62):
            raise ValueError(f"{name} of {shard.file} is {getattr(shard, name)!r}")
    return shard


def size_name(size: tuple[int, ...]) -> str:
    """(256, 256) -> '256x256'."""
    return "x".join(map(str, size))
