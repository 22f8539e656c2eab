"""Folders of idx files, as MNIST and its successors come; numpy and Pillow read none."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

IMAGES, LABELS = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"
PREFIXES = {"train": "train", "validation": "t10k"}  # of a split's files
FILES = tuple(name.format(prefix) for prefix in PREFIXES.values() for name in (IMAGES, LABELS))
_PACKED = ".gz"
_BYTES = 8  # code of the type uint8


def is_idx_folder(folder: str | os.PathLike) -> bool:
    """Tell whether a folder has one of the four files, packed or not."""
    return any(Path(folder, name + end).is_file() for name in FILES for end in ("", _PACKED))


def read_split(folder: str | os.PathLike, split: str, classes: int) -> tuple[Array, Array]:
    """Pictures (N, H, W) and labels (N,), below `classes`, of a split: uint8.

    Raises:
        ValueError: for what is wrong with the files.
    """
    prefix = PREFIXES[split]
    paths = [_find(Path(folder), name.format(prefix)) for name in (IMAGES, LABELS)]
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise ValueError(
            f"{paths[0]} has {len(images)} images, but {paths[1].name} has {len(labels)} labels; "
            f"give the two files that belong together"
        )
    if not images.size:
        raise ValueError(
            f"{paths[0]} has no pixels, its shape is {images.shape}; give one that has"
        )
    if labels.max() >= classes:
        row = int((labels >= classes).argmax())
        raise ValueError(
            f"{paths[1]} has the label {labels[row]} in row {row}; labels are 0 to {classes - 1}"
        )
    return images, labels


def read_idx(path: Path, axes: int) -> Array:
    """Read an array of bytes with so many axes, or say in a ValueError what the file is instead."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == _PACKED else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}); copy it again") from error
    magic, start = bytes([0, 0, _BYTES, axes]), 4 + 4 * axes
    if content[:4] != magic:
        raise ValueError(
            f"{path} is no idx file of bytes with {axes} axes: it begins with "
            f"{content[:4].hex(' ') or 'nothing'}, not with {magic.hex(' ')}; give such a file"
        )
    if len(content) < start:
        raise ValueError(f"{path} ends within its header of {start} bytes; copy it again")
    shape = struct.unpack(f">{axes}I", content[4:start])
    length = start + math.prod(shape)
    if len(content) != length:
        size = "x".join(map(str, shape))
        raise ValueError(
            f"{path} has {len(content)} bytes, but its header of {size} makes {length}; copy it "
            f"again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / (name + _PACKED)):
        if path.is_file():
            return path
    raise ValueError(f"{folder} has neither {name} nor {name}{_PACKED}; put one of them there")
