"""Inception-v3 as the classic FID uses it: the graph of 2015-12-05, by its ported weights.

It departs from Inception-v3 as published (arXiv 1512.00567) in that average pools don't count
padding, the last block pools the maximum, and there are 1008 classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.networks.resize import resize_tf_bilinear
from elit.networks.weights import INCEPTION_FILES, read_weights

SIDE = 299  # pixels of the images that it looks at
_CLASSES = 1008
_SPATIAL_CHANNELS = 7  # as ADM's sFID
_NOT_NEEDED = ("AuxLogits.",), (".num_batches_tracked",)  # starts and ends of names


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int | str = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _Mixed35(nn.Module):
    """Mixed_5b to 5d, on 35x35."""

    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64)
        self.branch5x5_1 = _Conv(inputs, 48)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch1x1(x), single, double, self.branch_pool(_average(x))), dim=1)


class _Reduce17(nn.Module):
    """Mixed_6a, from 35x35 to 17x17."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)), dim=1)


class _Mixed17(nn.Module):
    """Mixed_6b to 6e, on 17x17: kernels of 7x7 as rows and columns."""

    def __init__(self, inner: int):
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = _Conv(768, 192)
        self.branch7x7_1 = _Conv(768, inner)
        self.branch7x7_2 = _Conv(inner, inner, row, padding="same")
        self.branch7x7_3 = _Conv(inner, 192, column, padding="same")
        self.branch7x7dbl_1 = _Conv(768, inner)
        self.branch7x7dbl_2 = _Conv(inner, inner, column, padding="same")
        self.branch7x7dbl_3 = _Conv(inner, inner, row, padding="same")
        self.branch7x7dbl_4 = _Conv(inner, inner, column, padding="same")
        self.branch7x7dbl_5 = _Conv(inner, 192, row, padding="same")
        self.branch_pool = _Conv(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        return self.branches(x)[0]

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output (B, 768, 17, 17), and the part of it that its 1x1 branch made."""
        plain = self.branch1x1(x)
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat((plain, single, double, self.branch_pool(_average(x))), dim=1), plain


class _Reduce8(nn.Module):
    """Mixed_7a, from 17x17 to 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(768, 192)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(768, 192)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding="same")
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding="same")
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        plain = self.branch3x3_2(self.branch3x3_1(x))
        large = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat((plain, self.branch7x7x3_4(large), F.max_pool2d(x, 3, stride=2)), dim=1)


class _Mixed8(nn.Module):
    """Mixed_7b and 7c, on 8x8: branches that fork."""

    def __init__(self, inputs: int, *, pools_maximum: bool):
        super().__init__()
        self.pools_maximum = pools_maximum
        row, column = (1, 3), (3, 1)
        self.branch1x1 = _Conv(inputs, 320)
        self.branch3x3_1 = _Conv(inputs, 384)
        self.branch3x3_2a = _Conv(384, 384, row, padding="same")
        self.branch3x3_2b = _Conv(384, 384, column, padding="same")
        self.branch3x3dbl_1 = _Conv(inputs, 448)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, row, padding="same")
        self.branch3x3dbl_3b = _Conv(384, 384, column, padding="same")
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pools_maximum else _average(x)
        parts = (
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        )
        return torch.cat(parts, dim=1)


class Inception(nn.Module):
    """Features of FID, sFID and the Inception Score; parameters are named as in public files."""

    outputs = ("pool", "spatial", "logits")

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _Mixed35(192, pooled=32)
        self.Mixed_5c = _Mixed35(256, pooled=64)
        self.Mixed_5d = _Mixed35(288, pooled=64)
        self.Mixed_6a = _Reduce17(288)
        self.Mixed_6b = _Mixed17(128)
        self.Mixed_6c = _Mixed17(160)
        self.Mixed_6d = _Mixed17(160)
        self.Mixed_6e = _Mixed17(192)
        self.Mixed_7a = _Reduce8()
        self.Mixed_7b = _Mixed8(1280, pools_maximum=False)
        self.Mixed_7c = _Mixed8(2048, pools_maximum=True)
        self.fc = nn.Linear(2048, _CLASSES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Look at images (B, 3, 299, 299), which are (x - 128) / 128 of 8-bit ones.

        Returns:
            pool (B, 2048); spatial (B, 2023), 7 channels of 17x17 places, the channel running
            fastest, as ADM's; logits (B, 1008) without the bias, as ADM's Inception Score.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = F.max_pool2d(x, 3, stride=2)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        x, plain = self.Mixed_6d.branches(x)
        spatial = plain[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 2023)
        x = self.Mixed_7a(self.Mixed_6e(x))  # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))  # (B, 2048, 8, 8)
        pool = x.mean(dim=(2, 3))  # (B, 2048)
        return {"pool": pool, "spatial": spatial, "logits": F.linear(pool, self.fc.weight)}


def prepare(images: Tensor) -> Tensor:
    """Float RGB images (B, 3, H, W) in 0..255 as Inception takes them, (B, 3, 299, 299)."""
    images = (resize_tf_bilinear(images, (SIDE, SIDE)) - 128) / 128
    return images.contiguous(memory_format=torch.channels_last)  # a fifth faster on a CPU


def load_inception(path: Path) -> Inception:
    """Inception with the weights of a .pth or .safetensors file, ready to look at images."""
    with torch.device("meta"):
        network = Inception()
    given = read_weights(path)
    starts, ends = _NOT_NEEDED
    wanted = {k: v for k, v in network.state_dict().items() if not k.endswith(ends)}
    given = {k: v for k, v in given.items() if not k.startswith(starts) and not k.endswith(ends)}
    _check_weights(path, given, wanted)
    network.load_state_dict({k: v.float() for k, v in given.items()}, strict=False, assign=True)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None  # counts in training alone
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def _check_weights(path: Path, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names the weights that don't fit Inception."""
    shared = [name for name in wanted if name in given]
    faults = {
        "lacks": [name for name in wanted if name not in given],
        "also has": [name for name in given if name not in wanted],
        "has in another shape": [
            f"{name} {tuple(given[name].shape)} for {tuple(wanted[name].shape)}"
            for name in shared
            if given[name].shape != wanted[name].shape
        ],
    }
    words = [f"{what} {_some(names)}" for what, names in faults.items() if names]
    if words:
        raise ValueError(
            f"the weights in {path} are not those of FID's Inception: the file "
            f"{', and '.join(words)}; use {INCEPTION_FILES[0]}"
        )


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names[:3])
    return listed if len(names) <= 3 else f"{listed} and {len(names) - 3} more"
