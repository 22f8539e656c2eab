"""Image data sets that need no download; importing this package loads neither torch nor sklearn."""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from elit._choices import check_choice
from elit._tables import counted

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset

    from elit.data.captioned_shapes import CaptionedShapes
    from elit.data.digits import Digits
    from elit.data.fashion_mnist import FashionMNIST
    from elit.data.manifest import Autoencoder, Features
    from elit.data.moving_shapes import MovingShapes
    from elit.data.order import Bucket
    from elit.data.prepared import Prepared
    from elit.data.shapes import Shapes
    from elit.data.tensors import Tensors

    _TorchDataset = Dataset[dict[str, Any]]
else:
    # torch knows a map-style data set by its methods; without the base this import stays quick.
    _TorchDataset = object

__all__ = [
    "DATASETS",
    "SPLITS",
    "CaptionedShapes",
    "Digits",
    "FashionMNIST",
    "ImageDataset",
    "MovingShapes",
    "Prepared",
    "Shapes",
    "Tensors",
    "WholeBatches",
    "load_dataset",
]

SPLITS = ("train", "validation")
MEMORY = "memory"  # the name of a data set that was given from Python

# name: (module, class). A new data set is one line here and one file.
DATASETS = {
    "digits": ("elit.data.digits", "Digits"),
    "shapes": ("elit.data.shapes", "Shapes"),
    "captioned-shapes": ("elit.data.captioned_shapes", "CaptionedShapes"),
    "moving-shapes": ("elit.data.moving_shapes", "MovingShapes"),
    "fashion-mnist": ("elit.data.fashion_mnist", "FashionMNIST"),
    "tensors": ("elit.data.tensors", "Tensors"),
    "prepared": ("elit.data.prepared", "Prepared"),
}


class ImageDataset(_TorchDataset):
    """Labelled images or clips in [-1, 1], all of one shape, addressed by index.

    A subclass sets the attributes and implements `batch`; an item is
    `dict(images=float32 (C, H, W), class_labels=int64 ())`, of clips (C, T, H, W).
    """

    split: str
    image_shape: tuple[int, ...]  # (C, H, W), of clips (C, T, H, W)
    class_names: tuple[str, ...]
    labels: torch.Tensor  # (N,) int64, without making the images
    has_captions: bool = False  # whether batches have `captions`, a text for each image
    aligned: bool = False  # every object stands in the same place at the same size
    buckets: tuple[Bucket, ...] | None = None  # None: one shape, and any order reads well
    fingerprint: str | None = None  # of data that may change between two runs
    in_use: str = ""  # digest of the files that are read, where damaged ones may be left out
    autoencoder: Autoencoder | None = None  # whose latents the images are
    has_posterior: bool = False  # whether each time another draw of its posterior is seen
    encodings: tuple[str, ...] = ()  # in batches: texts, by the model's argument that takes them
    null: Mapping[str, torch.Tensor] = MappingProxyType({})  # the same of the empty text, (1, ...)
    text_encoder: str | None = None  # name of what encoded them
    for_diffusers: bool = False  # made for diffusers' transformers alone
    left_out: frozenset[str] = frozenset()  # what batches need not hold
    copies: int = 1  # of each sample; the later ones are mirrored
    features: Features | None = None  # of the vision model whose features batches may hold
    with_features: bool = False  # whether they do, as `features` (B, c, h, w)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """Return `images` (B, C, H, W), `class_labels` (B,), and `captions` where there are any."""
        raise NotImplementedError

    def on_device(
        self, images: torch.Tensor, posterior: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Make what the model sees of a batch's images (B, ...), on their device.

        Where `has_posterior`, with standard normal noise (B, *seen_shape).
        """
        del posterior
        return images

    def seen_shape(self, images: torch.Tensor) -> tuple[int, ...]:
        """Shape of one sample as the model sees it, of a batch's images."""
        return tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several items at once; torch's DataLoader fetches its batches with this."""
        batch = self.batch(indices)
        items = zip(*batch.values(), strict=True)
        return [dict(zip(batch, item, strict=True)) for item in items]

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        kind = "images" if len(self.image_shape) == 3 else "clips"
        return (
            f"{type(self).__name__}(split={self.split!r}): "
            f"{len(self)} {kind} {shape}, {counted(self.num_classes, 'class')}"
        )

    def _positions(self, indices: Iterable[int]) -> list[int]:
        """Check indices and count negative ones from the end, as a list does."""
        size = len(self)
        positions = [operator.index(index) for index in indices]
        for position in positions:
            if not -size <= position < size:
                raise IndexError(
                    f"index {position} is outside {type(self).__name__} ({self.split}) "
                    f"of {size} images; use 0 to {size - 1}"
                )
        return [position % size for position in positions]


class WholeBatches(_TorchDataset):
    """A data set for torch's DataLoader whose items are batches, by their lists of indices.

    No batch is cut into samples and stacked again.
    """

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Any]:
        return self.dataset.batch(indices)


def load_dataset(name: str, split: str = "train", **options: Any) -> ImageDataset:
    """Build a data set of the table by name; `options` go to its class (see `dataset_options`)."""
    known = dataset_options(name)
    for option in options:
        check_choice(option, known, "option", f" of data set {name!r}")
    return _dataset_class(name)(split, **options)


def dataset_options(name: str) -> tuple[str, ...]:
    """Return the names of the options that `load_dataset` takes for this data set."""
    parameters = inspect.signature(_dataset_class(name)).parameters
    return tuple(parameter for parameter in parameters if parameter != "split")


def _dataset_class(name: str) -> type[Any]:
    if name == MEMORY:
        raise ValueError(
            "this was trained on a data set given from Python, which nothing else knows; name one "
            "here, or call elit.train with it"
        )
    check_choice(name, DATASETS, "data set")
    module, class_name = DATASETS[name]
    return getattr(importlib.import_module(module), class_name)


def __getattr__(attribute: str) -> Any:
    """Import the data set classes when they are first asked for."""
    for module, class_name in DATASETS.values():
        if attribute == class_name:
            return getattr(importlib.import_module(module), class_name)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
