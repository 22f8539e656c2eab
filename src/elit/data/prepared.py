"""Data of `elit prepare`: encoded samples, in shards that are mapped, not loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from elit._choices import check_choice
from elit._files import sha256_of, typed_path
from elit._listing import checksums
from elit._numbers import is_whole
from elit.data import SPLITS, ImageDataset
from elit.data.manifest import (
    FEATURES,
    FLIPPED,
    LABELS,
    MOMENTS,
    NULL,
    PIXELS,
    RESERVED,
    Headers,
    Manifest,
    Shard,
    read_manifest,
    size_name,
)
from elit.data.order import Bucket
from elit.data.shards import MEND, Shards, damage_error, what_is_wrong

logger = logging.getLogger(__name__)

DAMAGED = ("refuse", "skip")
_MAKE_FINITE = (
    "`elit prepare FOLDER --verify` tells whether the file is as it was written; if so, prepare "
    "the data into a new folder with --dtype fp32 --store-dtype fp32"
)
_HOLD_OUT, _MOST_HELD_OUT = 20, 2048  # one sample in twenty, and about so many at most
_WHOLE, _WINDOW = 2**22, 2**20  # samples that are shuffled at once: all, and of more than those


class Prepared(ImageDataset):
    """A folder that `elit prepare` wrote.

    With mirrored samples in it, the training split has each twice: index i + n is the mirrored
    i of n. A source without a validation split has every k-th sample of the others held out.

    Args:
        split: "train" or "validation".
        path: the folder.
        resolution: which of several; None is the only one. Aspect buckets belong to one.
        damaged: "refuse" shards and samples that can't be read, or "skip" them.
        verify: whether to compare the checksums of all shards, which reads them whole.
        vae: folder or name of the autoencoder, instead of the one that the manifest names.
        window: samples that are shuffled among each other, so that a disk far away reads few
            shards at a time; None shuffles all, of more than 4 million a million at a time.
    """

    def __init__(
        self,
        split: str = "train",
        path: str | os.PathLike = "",
        resolution: int | None = None,
        damaged: str = "refuse",
        verify: bool = False,
        vae: str | None = None,
        window: int | None = None,
    ) -> None:
        check_choice(split, SPLITS, "split")
        check_choice(damaged, DAMAGED, "data.options.damaged")
        if window is not None and not is_whole(window):
            raise ValueError(f"data.options.window={window!r}: give a whole number of samples")
        if not isinstance(verify, bool):
            raise ValueError(f"data.options.verify={verify!r}: give true or false")
        path = typed_path(path) if isinstance(path, str | os.PathLike) else ""
        if not path or not Path(path).is_dir():
            raise ValueError(
                f"data.options.path={str(path)!r} is no folder; give the output of `elit prepare`"
            )
        self.split, self.folder, self.skips = split, Path(path), damaged == "skip"
        self._checksum = _checksum if verify else None
        self.manifest = manifest = read_manifest(self.folder)
        self.sizes = _sizes_of(manifest, resolution, self.folder)
        self.class_names, self.has_captions = manifest.classes, manifest.captions
        self.autoencoder = manifest.autoencoder
        if vae is not None:
            if self.autoencoder is None:
                raise ValueError(f"data.options.vae={vae!r} has no effect on pixels; leave it out")
            self.autoencoder = dataclasses.replace(self.autoencoder, name=typed_path(vae))
        self.has_posterior = manifest.kind == MOMENTS
        self.text_encoder, self.features = manifest.text_encoder, manifest.features
        content = dataclasses.asdict(manifest)
        del content["source"]  # the samples are the same wherever they lie
        if manifest.features is None:  # as before there were any
            del content["features"]
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

        self._texts: dict[str, tuple[str, tuple[int, ...]]] | None = None  # of the first shard
        files, hold_out = self._files()
        whole = [self._is_whole(shard) for shard in files]
        names = [shard.file for shard, is_whole in zip(files, whole, strict=True) if is_whole]
        self.in_use = hashlib.sha256("\n".join(names).encode()).hexdigest()
        is_held = hold_out is not None and split == "validation"
        self.shards = Shards(self.folder, files, whole, hold_out, is_held, self.num_classes)
        if not len(self.shards):
            raise ValueError(
                f"{self.folder} has no {split} sample of {', '.join(self.sizes)}; prepare more data"
            )
        self.copies = 2 if manifest.flips and split == "train" else 1
        self._warned: set[int] = set()
        self._set_buckets(files, window)
        self.encodings, self.null = self._encoded_texts()

    def _files(self) -> tuple[list[Shard], int | None]:
        """Shards that the split is taken from, size by size, and k where every k-th is held out."""
        by_size = {
            name: [
                shard for size in self.sizes for shard in split.shards
                if size_name(shard.size) == size
            ]
            for name, split in self.manifest.splits.items()
        }  # fmt: skip
        if by_size.get("validation"):
            return by_size.get(self.split, []), None
        shards = by_size.get("train", [])
        count = sum(shard.count for shard in shards)
        if count < 2:
            raise ValueError(
                f"{self.folder} has {count} training samples of {', '.join(self.sizes)}; training "
                f"takes two or more, as one is held out"
            )
        return shards, min(count, max(_HOLD_OUT, math.ceil(count / _MOST_HELD_OUT)))

    def _is_whole(self, shard: Shard) -> bool:
        """Tell whether a shard can be read: else refuse it, or skip it with a warning."""
        path = self.folder / shard.file
        reason = what_is_wrong(self.folder, shard, self._checksum, self._misfit)
        if reason is None:
            return True
        if not self.skips:
            raise damage_error(path, reason)
        logger.warning("%s is left out with its %d samples: %s", path, shard.count, reason)
        return False

    def check_unchanged(self) -> None:
        """Raise a ValueError if a shard is no longer what the manifest says.

        Shards that have not been touched since they were last compared are not read again.
        """
        paths = [self.folder / shard.file for shard in self.shards.files]
        found = checksums(self.folder, paths)
        for path, shard, checksum in zip(paths, self.shards.files, found, strict=True):
            if checksum != shard.sha256:
                raise damage_error(path, "its checksum is wrong")

    def _misfit(self, shard: Shard, tensors: Headers) -> str | None:
        """The first fault of a shard's tensors, or None: texts are as in the first shard."""
        if reason := self.manifest.misfit(shard, tensors):
            return reason
        texts = {n: (kind, shape[1:]) for n, (kind, shape) in tensors.items() if n not in RESERVED}
        self._texts = texts if self._texts is None else self._texts
        return None if texts == self._texts else f"its texts are {texts}, others' {self._texts}"

    def _set_buckets(self, files: list[Shard], window: int | None) -> None:
        """A bucket of each size, and the shape of the model: the square one, else the commonest."""
        shards, shapes = self.shards, self.manifest.shapes
        counts: Counter[str] = Counter()
        for shard in files:
            counts[size_name(shard.size)] += shard.count
        is_square = {name: len(set(name.split("x")[-2:])) == 1 for name in self.sizes}
        self.image_shape = shapes[max(self.sizes, key=lambda name: (is_square[name], counts[name]))]
        window = window or (_WHOLE if len(self) <= _WHOLE else _WINDOW)
        offsets = tuple(range(0, len(self), len(shards)))
        sizes, buckets = [size_name(shard.size) for shard in shards.files], []
        for size in dict.fromkeys(sizes):
            which = [n for n, name in enumerate(sizes) if name == size]
            runs = np.stack([shards.ends[which] - shards.counts[which], shards.counts[which]], 1)
            buckets.append(Bucket(shapes[size], runs, offsets, window, size))
        # The model's own shape comes first: what is shown is taken from there.
        self.buckets = tuple(sorted(buckets, key=lambda b: b.shape != self.image_shape))

    def _encoded_texts(self) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        """Names of the encoded texts, and what they are of the empty text."""
        shapes = {name: shape for name, (_, shape) in (self._texts or {}).items()}
        path = self.folder / NULL
        if about := self.manifest.null:
            if reason := what_is_wrong(self.folder, about, self._checksum):
                raise ValueError(f"{path} is damaged: {reason}; {MEND}")
        elif not shapes or not path.exists():
            return tuple(shapes), {}
        try:
            null = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} can't be read ({error}); {MEND}") from error
        given = {name: tuple(tensor.shape) for name, tensor in null.items()}
        needed = {name: (1, *shape) for name, shape in shapes.items()}
        if given != needed:
            raise ValueError(
                f"{path} holds {given}, but the shards need {needed}; prepare the data again"
            )
        return tuple(shapes), {name: tensor.clone() for name, tensor in null.items()}

    def __len__(self) -> int:
        return len(self.shards) * self.copies

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name != "labels"}  # can be large

    @cached_property
    def labels(self) -> Tensor:  # type: ignore[override]
        return self.shards.labels().repeat(self.copies)

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """Samples as they are stored, all of one shape: images, class_labels, captions, texts.

        Names in `left_out` are not read.
        """
        index = np.array(self._positions(indices), dtype=np.int64)
        mirrored, index = np.divmod(index, len(self.shards))
        numbers, rows = (x.tolist() for x in self.shards.locate(index))
        kind = self.manifest.kind
        seen = {"images": kind} | ({FEATURES: FEATURES} if self.with_features else {})
        sources = {
            name: [stored + FLIPPED if flip else stored for flip in mirrored.tolist()]
            for name, stored in seen.items()
        }
        names = [LABELS] if self.class_names else []
        for name in (*names, *self.encodings):
            if name not in self.left_out:
                sources[name] = [name] * len(rows)
        batch: dict[str, Any] = self._gather(numbers, rows, sources)
        good = _all_finite(batch)
        if not good.all():
            for place in (~good).nonzero().flatten().tolist():
                names = [of_sample[place] for of_sample in sources.values()]
                rows[place] = self._next_good(numbers[place], rows[place], names)
            batch = self._gather(numbers, rows, sources)
        if self.has_captions and "captions" not in self.left_out:
            pairs = zip(numbers, rows, strict=True)
            batch["captions"] = [self.shards.caption(number, row) for number, row in pairs]
        return batch

    def _gather(
        self, numbers: list[int], rows: list[int], sources: dict[str, list[str]]
    ) -> dict[str, Tensor]:
        """Tensors of rows of shards, each from the shard's tensor of its name."""
        if len(sizes := {self.shards.files[number].size for number in numbers}) > 1:
            raise ValueError(
                f"samples of {', '.join(map(size_name, sorted(sizes)))} can't stand in one batch; "
                f"draw each batch from one of the data set's buckets"
            )
        shards = [self.shards[number] for number in numbers]
        batch = {}
        for name, names in sources.items():  # views of the mapped files; stacking them reads
            parts = [t[at][row] for t, at, row in zip(shards, names, rows, strict=True)]
            batch[name] = torch.stack(parts)
        return batch

    def _next_good(self, number: int, row: int, names: list[str]) -> int:
        """The next row of a shard whose numbers are finite, in place of one whose are not."""
        path = self.folder / self.shards.files[number].file
        if not self.skips:
            raise ValueError(
                f"{path} has numbers that are not finite in row {row}; {_MAKE_FINITE}, or go on "
                f"without such rows: data.options.damaged=skip"
            )
        good = _all_finite({name: self.shards[number][name] for name in names}).numpy()
        usable = self.shards.rows_of(number)
        usable = usable[good[usable]]
        if not len(usable):
            raise ValueError(f"{path} has no row whose numbers are finite; {_MAKE_FINITE}")
        if number not in self._warned:
            self._warned.add(number)
            logger.warning(
                "%s has %d rows with numbers that are not finite, such as %d; the next good row "
                "is taken instead", path, int((~good).sum()), row,
            )  # fmt: skip
        return int(usable[np.searchsorted(usable, row) % len(usable)])

    def on_device(self, images: Tensor, posterior: Tensor | None = None) -> Tensor:
        """Make what the model sees of stored samples: a scaled draw of the posterior, or pixels.

        As diffusers draws: mean + exp(log-variance / 2) noise. Without noise it is the mean.
        """
        images = images.float()
        if self.manifest.kind == PIXELS:
            return images / 127.5 - 1
        if self.has_posterior:
            images, log_variance = images.chunk(2, dim=1)
            if posterior is not None:
                images = images + torch.exp(0.5 * log_variance.clamp(-30, 20)) * posterior
        if self.autoencoder is None:
            return images
        shift, scale = (
            torch.tensor(numbers, device=images.device).view(-1, *(1,) * (images.ndim - 2))
            for numbers in (self.autoencoder.shift, self.autoencoder.scale)
        )
        return (images - shift) * scale

    def seen_shape(self, images: Tensor) -> tuple[int, ...]:
        channels, *space = images.shape[1:]
        return (channels // 2 if self.has_posterior else channels, *space)


def _checksum(path: Path) -> str:
    """Checksum of a file, once: both splits of a run may ask for it."""
    about = path.stat()
    return _checksum_of(path, about.st_size, about.st_mtime_ns)


@cache
def _checksum_of(path: Path, size: int, modified: int) -> str:
    del size, modified
    return sha256_of(path)


def _sizes_of(manifest: Manifest, resolution: int | None, folder: Path) -> list[str]:
    """Names of the sizes of one resolution."""
    belongs = dict(manifest.resolutions)
    for name in manifest.shapes.keys() - belongs.keys():  # the side of a square of as many pixels
        belongs[name] = round(math.sqrt(math.prod(map(int, name.split("x")[-2:]))))
    there = sorted(set(belongs.values()))
    if resolution is None and len(there) == 1:
        resolution = there[0]
    if resolution not in there:
        raise ValueError(
            f"data.options.resolution={resolution} is none that {folder} has alone; it has sizes "
            f"{', '.join(manifest.shapes)}: give one of {', '.join(map(str, there))}"
        )
    return [name for name in manifest.shapes if belongs[name] == resolution]


def _all_finite(tensors: dict[str, Tensor]) -> Tensor:
    """Mark the rows that hold nothing but finite numbers, (n,) bool."""
    good = torch.ones(len(next(iter(tensors.values()))), dtype=torch.bool)
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.numel():  # far quicker than isfinite of all
            flat = tensor.flatten(1)
            good &= flat.amin(1).isfinite() & flat.amax(1).isfinite()
    return good
