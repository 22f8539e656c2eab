"""Folders of idx files as Fashion-MNIST's, of noise, made on the spot."""

import gzip
import struct
from pathlib import Path

import numpy as np

PREFIXES = ("train", "t10k")


def idx(array: np.ndarray) -> bytes:
    """The content of an idx file of bytes."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray, end: str = ""):
    """The two files of a split, plain or, with the ending .gz, packed."""
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if end else bytes
    (folder / f"{prefix}-images-idx3-ubyte{end}").write_bytes(pack(idx(images)))
    (folder / f"{prefix}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels)))


def idx_folder(folder: Path, count: int = 60, end: str = "", size: int = 28, seed: int = 0) -> Path:
    """A folder of both splits, each of so many images; labels go round."""
    for number, prefix in enumerate(PREFIXES):
        images = noise(count, size, seed + number)
        write_idx(folder, prefix, images, (np.arange(count) + number) % 10, end)
    return folder


def noise(count: int, size: int = 28, seed: int = 0) -> np.ndarray:
    """Images (count, size, size) of `idx_folder`; t10k's seed is one more."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size), dtype=np.uint8)
