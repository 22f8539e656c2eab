"""Real images to compare with: a folder, a data set, what `elit prepare` wrote, an ADM .npz."""

import hashlib
import itertools
import logging
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from elit._choices import nearest
from elit._files import digest_of, typed_path
from elit._listing import checksums, files_of
from elit.data import DATASETS, ImageDataset, load_dataset
from elit.data.manifest import MANIFEST
from elit.evaluation.parts import batches
from elit.interface.fit import format_size
from elit.networks.weights import checksum_of
from elit.pipelines.autoencoder import check_same_latents, decode
from elit.preparation.autoencoder import weights_sha256
from elit.preparation.images import READING, fit, picture_suffixes, read_image

logger = logging.getLogger(__name__)

_UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Images:
    """Images or clips of one shape, by number."""

    name: str  # what they are, in words
    digest: str  # of the data
    count: int  # how many
    shape: tuple[int, ...]  # (C, H, W), of clips (C, T, H, W)
    read: Callable[[Sequence[int]], Tensor]  # uint8 (n, *shape) of some numbers
    # texts of some numbers, where there are any
    captions: Callable[[Sequence[int]], list[str]] | None = None
    # mean and covariance by "network.output", where the file holds them
    statistics: dict[str, tuple[Tensor, Tensor]] | None = None


def to_bytes(pictures: Tensor) -> Tensor:
    """Eight bits of pictures in [0, 1], rounded as image files are."""
    return (pictures.float() * 255).round().clamp(0, 255).to(torch.uint8)


def has_splits(name: str) -> bool:
    """Tell whether a name is of a data set with several splits; a folder goes before a name."""
    return (Path(name) / MANIFEST).exists() or (name in DATASETS and not Path(name).exists())


def open_images(
    name: str,
    split: str = "train",
    fit_to: tuple[int, int] | None = None,
    vae: Any = None,
    trained_on: Mapping[str, Any] | None = None,
) -> Images:
    """Images by the name of a data set, or the path of a folder or an .npz file.

    A folder goes before a data set of its name, but not for what a run was trained on.

    Args:
        name: of a built-in data set, or a path.
        split: "train" or "validation", of a data set.
        fit_to: (H, W) that pictures of a folder are scaled and cut to; None takes them as they are.
        vae: autoencoder that decodes what is stored as latents.
        trained_on: options of the built-in data set that a run was trained on.
    """
    name = typed_path(name)
    path = Path(name)
    if trained_on is not None or (name in DATASETS and not path.exists()):
        return of_dataset(load_dataset(name, split, **trained_on or {}), f"{name}, {split}", vae)
    if path.suffix == ".npz":
        return _of_npz(path)
    if (path / MANIFEST).exists():
        dataset: Any = load_dataset("prepared", split, path=name)
        dataset.check_unchanged()
        return of_dataset(dataset, f"{name}, {split}", vae)
    if path.is_dir():
        return _of_folder(path, fit_to)
    near = nearest(name, DATASETS)
    hint = f"; did you mean {near}?" if near else ""
    raise ValueError(
        f"{name} is no folder, no .npz file and no data set of {', '.join(DATASETS)}{hint}"
    )


def of_dataset(dataset: ImageDataset, name: str, vae: Any = None) -> Images:
    """Images of a data set; of VAE latents those that the autoencoder makes of them."""
    if dataset.buckets is not None and len({b.shape for b in dataset.buckets}) > 1:
        shapes = ", ".join(sorted(format_size(b.shape) for b in dataset.buckets))
        raise ValueError(
            f"{name} has samples of several sizes ({shapes}): scores need one; prepare the data "
            f"without aspect buckets"
        )
    if dataset.autoencoder is not None and vae is None:
        raise ValueError(f"{name} holds VAE latents, and the model has no VAE to decode them")
    check_same_latents(vae, dataset.autoencoder, name)
    is_pixels = dataset.autoencoder is None
    about = dataset.autoencoder
    if about and vae.dtype == torch.float32 and weights_sha256(vae) != about.sha256:
        logger.warning(
            "the pipeline's autoencoder has other weights than the one that encoded %s: its "
            "pictures are right only if both encode alike", name
        )  # fmt: skip
    device = torch.device("cpu") if is_pixels else next(vae.parameters()).device

    @torch.no_grad()
    def read(numbers: Sequence[int]) -> Tensor:
        stored = dataset.batch(numbers)["images"]
        if stored.dtype == torch.uint8:
            return stored
        pictures = dataset.on_device(stored.to(device))
        return to_bytes((pictures if is_pixels else decode(vae, pictures).float()).cpu() / 2 + 0.5)

    def captions(numbers: Sequence[int]) -> list[str]:  # without holding all their images
        parts = (dataset.batch(part)["captions"] for part in batches(numbers, 256))
        return list(itertools.chain.from_iterable(parts))

    first = read([0])
    count = len(dataset) // dataset.copies  # mirrored ones are no more images
    digest = dataset.fingerprint
    if digest is None:  # built in: made by this code
        some = read(range(0, count, max(1, count // 64)))
        digest = hashlib.sha256(repr(dataset).encode() + some.numpy().tobytes()).hexdigest()[:16]
    return Images(
        name + ("" if is_pixels else ", decoded"),
        digest_of([digest, dataset.split, count, None if is_pixels else checksum_of(vae)]),
        count,
        tuple(first.shape[1:]),
        read,
        captions if dataset.has_captions else None,
    )


def _of_folder(folder: Path, size: tuple[int, int] | None) -> Images:
    files = [path for path in files_of(folder)[0] if path.suffix.lower() in picture_suffixes()]
    if not files:
        raise ValueError(
            f"{folder} has no pictures in it, such as .png or .jpg; give a folder with some"
        )

    def picture(path: Path) -> Image.Image:
        try:
            image = read_image(str(path))
        except Exception as error:  # a file can be broken in any way, or too large
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"{path} cannot be read as a picture: {reason}; mend or remove it"
            ) from error
        return image if size is None else fit(image, size)

    width, height = picture(files[0]).size

    def read(numbers: Sequence[int]) -> Tensor:
        pictures = [picture(files[number]) for number in numbers]
        for number, image in zip(numbers, pictures, strict=True):
            if image.size != (width, height):
                raise ValueError(
                    f"{files[number]} has {image.height}x{image.width} pixels, {files[0]} has "
                    f"{height}x{width}: all must have one size; --fit scales and cuts them to the "
                    f"model's"
                )
        stacked = np.stack([np.asarray(image) for image in pictures])
        return torch.from_numpy(stacked).movedim(-1, 1).contiguous()

    # Of names, lengths and contents: a copy elsewhere has the same digest.
    entries = [
        [str(path.relative_to(folder)), path.stat().st_size, checksum]
        for path, checksum in zip(files, checksums(folder, files), strict=True)
    ]
    words = f"{folder}" if size is None else f"{folder}, fitted to {format_size(size)}"
    return Images(words, digest_of([entries, size, READING]), len(files), (3, height, width), read)


_KEYS = {"inception.pool": ("mu", "sigma"), "inception.spatial": ("mu_s", "sigma_s")}


def _of_npz(path: Path) -> Images:
    """ADM's batches: images `arr_0` (N, H, W, 3) uint8, statistics of Inception, or both.

    Images are read by hand, row by row: numpy maps no file within a zip, and they take gigabytes.
    """
    if not path.exists():
        raise ValueError(f"there is no {path}; give an .npz file, a folder or a data set")
    statistics: dict[str, tuple[Tensor, Tensor]] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            for output, keys in _KEYS.items():
                if names.issuperset(keys):
                    if any(file[k].dtype.kind != "f" for k in keys):
                        raise TypeError(f"{keys[0]} and {keys[1]} are no floating-point numbers")
                    mean, covariance = (torch.from_numpy(file[k]).double() for k in keys)
                    statistics[output] = mean, covariance
        archive = zipfile.ZipFile(path)  # open as long as it is read
        digest = digest_of([[i.filename, i.file_size, i.CRC] for i in archive.infolist()])
        if "arr_0" in names:
            member: Any = archive.open("arr_0.npy")
            version = np.lib.format.read_magic(member)
            reader = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            whole, fortran, dtype = reader(member)
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as .npz ({error}); copy it again") from error
    for mean, covariance in statistics.values():
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{path} holds a mean {tuple(mean.shape)} and a covariance "
                f"{tuple(covariance.shape)}, which don't fit each other"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{path} holds statistics that are not finite; make them again")
    if "arr_0" not in names:
        if not statistics:
            raise ValueError(
                f"{path} holds {', '.join(sorted(names)) or 'nothing'}: give a file with images "
                f"(arr_0), or with Inception's statistics (mu, sigma)"
            )
        return Images(str(path), digest, 0, (), lambda _: torch.empty(0), statistics=statistics)
    if len(whole) != 4 or whole[3] != 3 or dtype != np.uint8 or fortran or not min(whole):
        raise ValueError(
            f"{path} has arr_0 of {dtype} {whole}; give uint8 (N, H, W, 3), in the order of C"
        )
    count, *row = whole
    start, size = member.tell(), math.prod(row)

    def read(numbers: Sequence[int]) -> Tensor:  # quick where they follow those read before
        first, length = numbers[0], len(numbers) * size
        if list(numbers) != list(range(first, first + len(numbers))):
            return torch.cat([read([number]) for number in numbers])
        try:
            member.seek(start + first * size)
            content = member.read(length)
        except _UNREADABLE as error:
            raise ValueError(f"{path} is damaged ({error}); copy it again") from error
        if len(content) != length:
            raise ValueError(f"{path} is cut off; copy it again")
        array = np.frombuffer(content, np.uint8).reshape(len(numbers), *row)
        return torch.from_numpy(array.copy()).movedim(-1, 1).contiguous()

    return Images(str(path), digest, count, (3, *row[:2]), read, statistics=statistics or None)
