"""Any map-style data set of torch as one to train on: nothing of it is copied or written."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from elit._numbers import is_whole
from elit.data import ImageDataset
from elit.data.tensors import check_names

logger = logging.getLogger(__name__)

_IMAGES = ("images", "image", "pixel_values")
_LABELS = ("class_labels", "labels", "label")
_CAPTIONS = ("captions", "caption", "text")
LATENTS = "latents"
MOST_CLASSES = 100_000
HOLD_OUT = 20  # one item in twenty is held out
_LOOKED_AT = 16  # images, for a guess at their range
_ALLOWED = "an image with a label or a caption, or a dict with latents"
_BY_NUMBER = (
    "give a map-style data set, with __len__ and __getitem__: training draws its items in an order "
    "of its own"
)


class Given(ImageDataset):
    """Items of a data set: pairs (image, label or caption), or dicts.

    A dict has `image` with `label` or `caption`; or, for diffusers' transformers, `latents`, scaled
    as they take them, and every other argument of their forward by its name. An image is of PIL, a
    NumPy array (H, W, C), or a tensor (C, H, W), uint8 or floats in [-1, 1].
    """

    def __init__(
        self,
        dataset: Any,
        split: str,
        rows: Sequence[int],
        class_names: Sequence[str] | None = None,
        null: Mapping[str, Tensor] | None = None,
    ):
        self.dataset, self.split, self.rows = dataset, split, rows
        first = self._item(0)
        told = [name for name in first if name != "images"]
        self.image_shape, self.class_names = tuple(first["images"].shape), ()
        self.has_captions = "captions" in told
        if self.for_diffusers:
            self.encodings, self.null = tuple(told), dict(null or {})
            self._check_null(first)
        elif null is not None:
            raise ValueError(f"null is of items with {LATENTS}; leave it out")
        self.has_labels = not self.for_diffusers and not self.has_captions
        if self.has_labels:
            names = _classes_of(dataset) if class_names is None else class_names
            self.class_names = () if names is None else _checked_names(names)
        elif class_names is not None:
            raise ValueError("class_names are of items with labels; leave them out")
        self.shapes = {name: getattr(value, "shape", ()) for name, value in first.items()}

    def about(self) -> dict[str, Any]:
        """What a run that goes on must find again."""
        about: dict[str, Any] = {"count": len(self), "shape": list(self.image_shape)}
        if self.for_diffusers:
            return about | {"arguments": {n: list(self.shapes[n]) for n in self.encodings}}
        return about | {"captions" if self.has_captions else "classes": self.num_classes or True}

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        positions = self._positions(indices)
        items = [self._item(position) for position in positions]
        for position, item in zip(positions, items, strict=True):
            shapes = {name: getattr(value, "shape", ()) for name, value in item.items()}
            if shapes != self.shapes:
                raise ValueError(
                    f"item {self.rows[position]} has {_in_words(shapes)}, but the first has "
                    f"{_in_words(self.shapes)}; make all alike: crop images, pad texts"
                )
            if self.num_classes:
                self._check_label(int(item["class_labels"]), self.rows[position])
        return {
            name: [item[name] for item in items]
            if name == "captions"
            else torch.stack([item[name] for item in items])
            for name in self.shapes
        }

    def __len__(self) -> int:
        return len(self.rows)

    def _item(self, position: int) -> dict[str, Any]:
        """What is trained on of an item, as tensors."""
        row, item = self.rows[position], self.dataset[self.rows[position]]
        if isinstance(item, Mapping) and LATENTS in item:
            self.for_diffusers = True
            check_names(item, f"item {row}")
            return {
                "images" if name == LATENTS else name: _as_tensor(value, name, row)
                for name, value in item.items()
            }
        image, told = self._read(item, row)
        if isinstance(told, str):
            return {"images": _as_image(image, row), "captions": told}
        return {"images": _as_image(image, row), "class_labels": torch.tensor(told)}

    @staticmethod
    def _read(item: Any, row: int) -> tuple[Any, int | str]:
        """The image of an item as it is, and its label or caption."""
        if isinstance(item, Mapping):
            image, *told = (
                next((item[name] for name in names if name in item), None)
                for names in (_IMAGES, _LABELS, _CAPTIONS)
            )
            told = [one for one in told if one is not None][-1:]
        else:
            image, *told = item if isinstance(item, list | tuple) and len(item) else (None,)
        if image is None or len(told) != 1:
            has = sorted(item) if isinstance(item, Mapping) else type(item).__name__
            raise ValueError(f"item {row} is {has!s:.60}; give {_ALLOWED}")
        (of_it,) = told
        if isinstance(of_it, str):
            return image, of_it
        is_one = isinstance(of_it, Tensor | np.ndarray) and math.prod(of_it.shape) == 1
        label = of_it.item() if is_one else of_it
        if not is_whole(label, 0):
            raise ValueError(
                f"item {row} has label {label!r:.60}; give a whole number from 0, or a caption"
            )
        return image, int(label)

    def check_labels(self) -> None:
        """Raise a ValueError for an item of no class, where all lie in memory."""
        if isinstance(self.dataset, list | tuple | TensorDataset):
            for row in self.rows:
                self._check_label(self._read(self.dataset[row], row)[1], row)

    def _check_label(self, label: int | str, row: int) -> None:
        if label not in range(self.num_classes):
            raise ValueError(
                f"item {row} has label {label!r:.60}, but the classes are 0 to "
                f"{self.num_classes - 1}"
            )

    def largest_label(self) -> int:
        """Of all items, every one of which is read."""
        labels = (int(self._item(position)["class_labels"]) for position in range(len(self)))
        label, position = max(zip(labels, range(len(self)), strict=True))
        if label >= MOST_CLASSES:
            raise ValueError(
                f"item {self.rows[position]} has label {label}, as if there were as many classes; "
                f"number them from 0, at most {MOST_CLASSES}"
            )
        return label

    def _check_null(self, first: Mapping[str, Tensor]) -> None:
        for name, value in self.null.items():
            if name not in self.encodings or value.shape != (1, *first[name].shape):
                shape = (1, *first[name].shape) if name in self.encodings else "no such argument"
                raise ValueError(
                    f"null has {name} of shape {tuple(value.shape)}, the items {shape}; give what "
                    f"the empty text has, with a batch of 1"
                )


def _classes_of(dataset: Any) -> Sequence[str] | None:
    """Names as torchvision's data sets have them, also below a Subset."""
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    return names if isinstance(names, list | tuple) else None  # others may have their number


def _checked_names(names: Any) -> tuple[str, ...]:
    without_order = isinstance(names, str | Set | Mapping) or not isinstance(names, Iterable)
    if without_order or not (given := list(names)):
        raise ValueError(
            f"class names {names!r:.60} are not allowed; give a list, a name for each label from 0"
        )
    return tuple(map(str, given))


def split_given(
    dataset: Any,
    validation: Any = None,
    class_names: Sequence[str] | None = None,
    null: Mapping[str, Tensor] | None = None,
) -> tuple[Given, Given]:
    """What is trained on, and what is held out: another data set, or one item in twenty."""
    rows = list(range(_length(dataset)))
    kept, held = rows, list(range(_length(validation))) if validation is not None else []
    if validation is None:
        kept, held = [row for row in rows if row % HOLD_OUT], rows[::HOLD_OUT]
    elif not held:
        raise ValueError("validation has no items; give some, or leave it out")
    if not (kept and held):
        raise ValueError(f"a data set of {len(rows)} items is too small; two or more are needed")
    train = Given(dataset, "train", kept, class_names, null)
    some = train.batch(range(min(_LOOKED_AT, len(train))))["images"]
    if train.image_shape[0] in (1, 3) and some.min() >= 0:
        logger.warning(
            "no value below 0 in %d images: are they of 0..1? Those of -1..1 are meant, x * 2 - 1",
            len(some),
        )
    others = dataset if validation is None else validation
    held_out = Given(others, "validation", held, null=null)
    if held_out.shapes != train.shapes:
        raise ValueError(
            f"the held-out items have {_in_words(held_out.shapes)}, those of training "
            f"{_in_words(train.shapes)}; make all alike"
        )
    is_named = bool(train.class_names)
    if train.has_labels and not is_named:
        most = max(train.largest_label(), held_out.largest_label())
        train.class_names = tuple(map(str, range(most + 1)))
    held_out.class_names = train.class_names
    for one in (train, held_out) if is_named else ():
        one.check_labels()
    return train, held_out


def _length(dataset: Any) -> int:
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"a {kind} of {', '.join(map(str, dataset)):.60} is no data set; give one of "
            f"these, and another one as validation"
        )
    if isinstance(dataset, IterableDataset | DataLoader):
        raise ValueError(f"a {kind} has no items by number; {_BY_NUMBER}")
    try:
        return len(dataset)
    except TypeError:
        raise ValueError(f"a {kind} has no length; {_BY_NUMBER}") from None


def _as_image(image: Any, row: int) -> Tensor:
    """A picture (C, H, W) or a clip (C, T, H, W) in [-1, 1]."""
    if isinstance(image, Image.Image):
        image = np.asarray(_eight_bit(image, row))
    if isinstance(image, np.ndarray):  # as PIL has them
        if image.ndim == 3 and image.shape[0] != image.shape[1] == image.shape[2]:
            raise ValueError(
                f"item {row} has an array {image.shape}, (C, H, W) as it seems; arrays of NumPy "
                f"are read as (H, W, C): give torch.from_numpy of it"
            )
        image = torch.from_numpy(np.atleast_3d(image).copy()).permute(2, 0, 1)
    is_one = isinstance(image, Tensor) and image.ndim in (3, 4) and not image.is_complex()
    if not is_one or not image.numel():
        is_tensor = isinstance(image, Tensor)
        what = f"{tuple(image.shape)} of {image.dtype}" if is_tensor else type(image).__name__
        raise ValueError(f"item {row} has an image {what}; give PIL, (H, W, C) or (C, H, W)")
    if image.dtype == torch.uint8:
        return image.float() / 127.5 - 1
    image = _as_tensor(image, "image", row)
    numbers = image if image.is_floating_point() else image.double()  # torch has no min of uint16
    low, high = numbers.min().item(), numbers.max().item()
    is_scaled = len(image) not in (1, 3) or -1.001 <= low <= high <= 1.001  # others are no pixels
    if not (image.is_floating_point() and is_scaled):
        raise ValueError(
            f"item {row} has an image of {image.dtype} from {low:g} to {high:g}; give uint8, or "
            f"floats in [-1, 1]: x / 127.5 - 1 makes them of 0..255, x * 2 - 1 of 0..1"
        )
    return image


def _eight_bit(image: Image.Image, row: int) -> Image.Image:
    """Grey or RGB; what is transparent is laid on white, as `elit prepare` does."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"item {row} has a PIL image of mode {image.mode}, whose range is unknown; scale it to "
            f"0..255 and convert it to L or RGB"
        )
    is_grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("L" if is_grey else "RGB")


def _as_tensor(value: Any, name: str, row: int) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"item {row} has {name} {value!r:.60}, which is no tensor") from None
    if tensor.is_floating_point():
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise ValueError(f"item {row} has numbers that are not finite: {name}")
    return tensor


def _in_words(shapes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {tuple(shape) or ''}".strip() for name, shape in shapes.items())
