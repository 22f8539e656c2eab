"""Samples encoded beforehand: one safetensors file with latents and what goes with them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from elit._choices import check_choice
from elit.data import SPLITS, ImageDataset

LATENTS, NULL = "latents", "null."
_HOLD_OUT = 20  # one sample in twenty is held out


class Tensors(ImageDataset):
    """Your own data for a diffusers transformer, encoded by its pipeline's autoencoder and texts.

    The file has `latents` (K, C, h, w), of clips (K, C, t, h, w), scaled as the transformer takes
    them. Every other tensor (K, ...) is an argument of the transformer's forward by its name, such
    as `encoder_hidden_states` and `pooled_projections`; `null.NAME` (1, ...) is the same of the
    empty text, for label dropout.
    """

    class_names = ()

    def __init__(self, split: str = "train", path: str | os.PathLike = "") -> None:
        check_choice(split, SPLITS, "split")
        if not path or not Path(path).is_file():
            raise ValueError(
                f"data.options.path={str(path)!r} is no file; give a safetensors file with latents"
            )
        try:
            tensors = load_file(path)  # mapped, not read
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        self.null = {
            name.removeprefix(NULL): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(NULL)
        }
        self.images = tensors.pop(LATENTS, torch.empty(0))
        count = len(self.images)
        if self.images.ndim not in (4, 5) or count < 2:
            raise ValueError(
                f"{path} has {LATENTS} of shape {tuple(self.images.shape)}; it needs two or more, "
                f"(K, C, h, w), or (K, C, t, h, w) of clips"
            )
        for name, tensor in (tensors | self.null).items():
            wanted = 1 if tensor is self.null.get(name) else count
            if len(tensor) != wanted:
                raise ValueError(
                    f"{path} has {len(tensor)} of {name}, but {wanted} are wanted, one for each of "
                    f"the {LATENTS}, and one of each {NULL}NAME"
                )
        if unknown := sorted(self.null.keys() - tensors.keys()):
            raise ValueError(f"{path} has {NULL}{unknown[0]}, but no {unknown[0]}")
        rows = torch.arange(count)
        held = rows % _HOLD_OUT == 0
        self.split, self.conditions = split, tensors
        self.rows = rows[held if split == "validation" else ~held]
        self.labels = torch.zeros(len(self.rows), dtype=torch.long)
        self.image_shape = tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        rows = self.rows[self._positions(indices)]
        conditions = {name: tensor[rows] for name, tensor in self.conditions.items()}
        return {"images": self.images[rows].float(), **conditions}
