"""Worker processes that read, scale and cut pictures while the autoencoder is busy."""

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elit._devices import usable_cores
from elit._signals import ignore_signals
from elit.preparation.images import (
    MissingPackageError,
    buckets,
    fit,
    nearest_bucket,
    read_clips,
    read_image,
)
from elit.preparation.settings import PrepareSettings
from elit.preparation.source import Row, Rows

Size = tuple[int, ...]  # (H, W), of clips (T, H, W)
_CHUNK_BYTES = 2**22  # of pictures that go from a worker to us at once
_MOST_WORKERS = 16


class Sizes:
    """Sizes that a picture is cut to: one for each resolution.

    They are squares, or buckets of aspect ratios. No two resolutions share a bucket: they lie
    `multiple` or more apart.
    """

    def __init__(self, settings: PrepareSettings):
        self.frames, self.fps, self.clips = (
            settings.frames, settings.fps, settings.clips_per_video
        )  # fmt: skip
        # for each resolution, the sizes (H, W) to choose from
        self.choices = {
            n: buckets(n, settings.multiple) if settings.aspect_ratios else [(n, n)]
            for n in settings.resolution
        }
        self.all = [size for sizes in self.choices.values() for size in sizes]

    @property
    def pixels(self) -> int:
        """Numbers of one row's pictures, at most about."""
        numbers = sum(3 * h * w for h, w in (sizes[0] for sizes in self.choices.values()))
        return numbers * (self.frames or 1) * self.clips

    def resolution_of(self, size: Size) -> int:
        """The resolution that a size belongs to."""
        return next(n for n, sizes in self.choices.items() if size[-2:] in sizes)

    def cut(self, content: bytes | str) -> list[dict[Size, Tensor]]:
        """A picture (H, W, 3), or clips (T, H, W, 3), uint8, of a file, each by size."""
        if self.frames is None:
            return [self._cut([read_image(content)])]
        clips = read_clips(content, self.frames, self.fps, self.clips)
        return [self._cut(shown) for shown in clips]

    def _cut(self, shown: list[Image.Image]) -> dict[Size, Tensor]:
        by_size: dict[Size, Tensor] = {}
        for sizes in self.choices.values():
            size = nearest_bucket(shown[0].width, shown[0].height, sizes)
            cut = torch.from_numpy(np.stack([np.asarray(fit(image, size)) for image in shown]))
            if self.frames is None:
                by_size[size] = cut[0]
            else:
                by_size[(self.frames, *size)] = cut
        return by_size


@dataclass
class Chunk:
    """Rows of a part that were read."""

    rows: list[Row] = field(default_factory=list)  # that could be read; of a video one a clip
    # by size, positions in `rows` and pictures (n, H, W, 3) uint8
    pictures: dict[Size, tuple[list[int], Any]] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)  # reasons of the others, by number
    # checksum of every row's picture as it lies in the source
    digests: list[str] = field(default_factory=list)
    fault: Exception | None = None  # what stops the run


class Reader(Dataset[Chunk]):
    """Reads rows of some splits; an index is a list of (split, row)."""

    def __init__(self, splits: dict[str, Rows], sizes: Sizes):
        self.splits, self.sizes = splits, sizes

    def __getitem__(self, indices: Sequence[tuple[str, int]]) -> Chunk:
        chunk = Chunk()
        for split, number in indices:
            rows = self.splits[split]
            digest = ""
            try:
                digest = rows.digest(number)
                row = rows[number]
                cut = self.sizes.cut(rows.content(number))
            except Exception as error:  # a file can be broken in any way
                name, cut = rows.name(number), []
                if isinstance(error, MemoryError):
                    place = name or f"row {number} of {split}"
                    error = OSError(errno.ENOMEM, "no memory left to read it", place)
                if not is_of_file(error):
                    # Workers hand it over: what they raise loses its number
                    return Chunk(fault=error)
                # A file that is not there is named
                reason = getattr(error, "strerror", None) or str(error)
                reason = " ".join(reason.split()) or type(error).__name__
                if name is not None:
                    reason = f"{name}: {reason.replace(str(rows.folder / name), 'it')}"
                chunk.skipped[number] = reason
            chunk.digests.append(digest)
            for by_size in cut:
                for size, picture in by_size.items():
                    positions, pictures = chunk.pictures.setdefault(size, ([], []))
                    positions.append(len(chunk.rows))
                    pictures.append(picture)
                chunk.rows.append(row)
        chunk.pictures = {size: (at, torch.stack(p)) for size, (at, p) in chunk.pictures.items()}
        return chunk


def is_of_file(error: Exception) -> bool:
    """Tell whether a file is to blame, not the disk, the network or this machine.

    PIL's errors of broken files are OSErrors without a number.
    """
    if isinstance(error, OSError):
        return error.errno in (None, errno.ENOENT)
    return not isinstance(error, (MissingPackageError, MemoryError))


def default_workers(local_processes: int = 1) -> int:
    """One for each processor that this process may use but one, which feeds the device."""
    return max(1, min(_MOST_WORKERS, usable_cores() // local_processes - 1))


def read(
    splits: dict[str, Rows], sizes: Sizes, pieces: Sequence[tuple[str, range]], workers: int
) -> Iterator[Chunk]:
    """Chunks of ranges of rows in their order; none is of two."""
    at_once = max(1, min(64, _CHUNK_BYTES // sizes.pixels))
    loader: Any = DataLoader(
        Reader(splits, sizes),
        sampler=(
            [(split, row) for row in rows[start : start + at_once]]
            for split, rows in pieces
            for start in range(0, len(rows), at_once)
        ),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=3 if workers else None,
        worker_init_fn=ignore_signals,
    )
    for chunk in loader:
        if chunk.fault is not None:
            raise chunk.fault
        yield chunk
