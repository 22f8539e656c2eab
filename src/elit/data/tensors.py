"""Samples encoded beforehand: one safetensors file with latents and what goes with them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from elit._choices import check_choice
from elit._files import typed_path
from elit._listing import checksums
from elit.data import SPLITS, ImageDataset

LATENTS, NULL = "latents", "null."
_RESERVED = ("images", "hidden_states", "timestep", "class_labels", "num_latents", "return_dict")
_HOLD_OUT = 20  # one sample in twenty is held out


class Tensors(ImageDataset):
    """Your own data for a diffusers transformer, encoded by its pipeline's autoencoder and texts.

    The file has `latents` (K, C, h, w), of clips (K, C, t, h, w), scaled as the transformer takes
    them. Every other tensor (K, ...) is an argument of the transformer's forward by its name, such
    as `encoder_hidden_states` and `pooled_projections`; `null.NAME` (1, ...) is the same of the
    empty text, for label dropout.
    """

    class_names = ()
    for_diffusers = True

    def __init__(self, split: str = "train", path: str | os.PathLike = "") -> None:
        check_choice(split, SPLITS, "split")
        path = typed_path(path) if isinstance(path, str | os.PathLike) else ""
        if not Path(path).is_file():
            raise ValueError(
                f"data.options.path={str(path)!r} is no file; give a safetensors file with latents"
            )
        try:
            tensors = load_file(path)  # mapped, not read
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        nulls = [name for name in tensors if name.startswith(NULL)]
        self.null = {name.removeprefix(NULL): tensors.pop(name) for name in nulls}
        self.images = tensors.pop(LATENTS, torch.empty(0))
        self.path, self.conditions, self.encodings = path, tensors, tuple(tensors)
        self._check()
        count = len(self.images)
        rows = torch.arange(count)
        held = rows % _HOLD_OUT == 0
        self.split, file = split, Path(path)
        (self.fingerprint,) = checksums(file.parent, [file])
        self.rows = rows[held if split == "validation" else ~held]
        self.labels = torch.zeros(len(self.rows), dtype=torch.long)
        self.image_shape = tuple(self.images.shape[1:])

    def _check(self) -> None:
        """Raise a ValueError for tensors that don't belong together."""
        latents, count = self.images, len(self.images) if self.images.ndim else 0
        if latents.ndim not in (4, 5) or count < 2 or not latents.is_floating_point():
            raise ValueError(
                f"{self.path} has {LATENTS} of {latents.dtype} and shape {tuple(latents.shape)}; "
                f"it needs two or more of floats, (K, C, h, w), or (K, C, t, h, w) of clips"
            )
        check_names(self.conditions, self.path)
        for name, tensor in self.conditions.items():
            if not tensor.ndim or len(tensor) != count:
                raise ValueError(
                    f"{self.path} has {name} of shape {tuple(tensor.shape)}, but {count} "
                    f"{LATENTS}; give one for each"
                )
        for name, null in self.null.items():
            if name not in self.conditions:
                raise ValueError(f"{self.path} has {NULL}{name}, but no {name}")
            own = self.conditions[name]
            if (tuple(null.shape), null.dtype) != ((1, *own.shape[1:]), own.dtype):
                raise ValueError(
                    f"{self.path} has {NULL}{name} of {null.dtype} and shape {tuple(null.shape)}, "
                    f"but {(1, *own.shape[1:])} of {own.dtype} belongs to its {name}; pad "
                    f"texts to one length"
                )

    def batch(self, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        rows = self.rows[self._positions(indices)]
        conditions = {name: _as_float32(x[rows]) for name, x in self.conditions.items()}
        batch = {"images": self.images[rows].float(), **conditions}
        for name, x in batch.items():
            finite = x.isfinite().flatten(1).all(1) if x.is_floating_point() else None
            if finite is not None and not finite.all():
                row = int(rows[int((~finite).nonzero()[0])])
                raise ValueError(
                    f"{self.path} has numbers that are not finite in row {row}: {name}"
                )
        return batch


def check_names(names: Iterable[str], where: str) -> None:
    """Raise a ValueError for arguments of the transformer that training gives it."""
    for name in names:
        if name in _RESERVED:
            raise ValueError(f"{where} has {name}, which training makes itself; remove it")


def _as_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Texts are often kept in half precision; numbers and masks stay as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor
