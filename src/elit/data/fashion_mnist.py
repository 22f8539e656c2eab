"""Fashion-MNIST: 70,000 small grey pictures of clothes, read from its own idx files."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from elit._choices import check_choice
from elit._files import typed_path
from elit.data import SPLITS, ImageDataset
from elit.data.idx import FILES, is_idx_folder, read_split
from elit.data.shapes import whole_number

CLASS_NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
)  # fmt: skip
_SIZE = 28  # of the pictures in the files
_MARGIN = 2  # 32 can be cut into patches and groups


class FashionMNIST(ImageDataset):
    """The pictures of a folder of idx files, with a black margin: (1, 32, 32) in [-1, 1].

    The validation split is the 10,000 pictures of t10k, the others are for training. MNIST's
    successors of the same format are read as well; their classes have other names.
    """

    image_shape = (1, _SIZE + 2 * _MARGIN, _SIZE + 2 * _MARGIN)
    class_names = CLASS_NAMES
    # Centred and scaled alike: of 2000 of t10k the kernel machine tells 87 %, the network 79 %.
    aligned = True

    def __init__(
        self, split: str = "train", path: str | os.PathLike | None = None, count: int | None = None
    ) -> None:
        """Read the files of one split.

        Args:
            split: "train" or "validation".
            path: folder of the files, each plain or packed as .gz.
            count: of images that are taken, the first ones, at most; None takes all.
        """
        check_choice(split, SPLITS, "split")
        if count is not None:
            count = whole_number("count", count, 1, "images", sys.maxsize)
        path = typed_path(path) if isinstance(path, str | os.PathLike) else path
        if not isinstance(path, str) or not is_idx_folder(path):
            given = path if path is None else repr(str(path))
            raise ValueError(
                f"data.options.path={given} is no folder of Fashion-MNIST's files; give "
                f"data.options.path=FOLDER with {', '.join(FILES)} in it, plain or as .gz, such as "
                f"those of Debian's package dataset-fashion-mnist; or fetch it from the hub by "
                f"`elit prepare zalando-datasets/fashion_mnist prepared --pixels --resolution 32` "
                f"and give data.name=prepared"
            )
        images, labels = read_split(path, split, len(CLASS_NAMES))
        if images.shape[1:] != (_SIZE, _SIZE):
            height, width = images.shape[1:]
            raise ValueError(
                f"the images in {path} have {height}x{width} pixels, Fashion-MNIST's have "
                f"{_SIZE}x{_SIZE}; prepare others with `elit prepare {path} prepared --pixels "
                f"--resolution N`, and give data.name=prepared"
            )
        self.split = split
        self.fingerprint = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        self.pixels = torch.from_numpy(images[:count].copy()).unsqueeze(1)  # (N, 1, 28, 28) uint8
        self.labels = torch.from_numpy(labels[:count].astype("int64"))  # (N,)

    def batch(self, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        positions = torch.tensor(self._positions(indices), dtype=torch.int64)
        pixels = F.pad(self.pixels[positions], (_MARGIN,) * 4)  # (B, 1, 32, 32)
        return {"images": pixels.float() / 127.5 - 1, "class_labels": self.labels[positions]}
