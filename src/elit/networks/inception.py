"""Inception-v3 as the classic FID uses it: the graph of 2015-12-05, by its ported weights.

It departs from Inception-v3 as published (arXiv 1512.00567) in that average pools don't count
padding, the last block pools the maximum, and there are 1008 classes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


_ROW, _COLUMN = (1, 7), (7, 1)  # 7x7 in two steps
_FORK = "fork"  # 3x3 as a row and a column side by side
Chain = Sequence[tuple[Any, ...]]  # (channels, kernel, stride) of convolutions one after another


class _Mixed(nn.Module):
    """Chains of convolutions and a pool side by side; their outputs stand one after another.

    Convolutions are named as in public files: those of a chain of several end in _1, _2 and so on.
    """

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor], **chains: Chain):
        super().__init__()
        self.pool = pool
        self.own_pool = "branch_pool" not in chains  # beside the chains, not in front of one
        self.chains: list[list[tuple[str, ...]]] = []  # names of each step's convolutions
        for chain_name, chain in chains.items():
            width, steps = inputs, []
            for number, (channels, kernel, *stride) in enumerate(chain, 1):
                name = f"{chain_name}_{number}" if len(chain) > 1 else chain_name
                forked = {f"{name}a": (1, 3), f"{name}b": (3, 1)}
                shapes = forked if kernel == _FORK else {name: kernel}
                for end, shape in shapes.items():
                    step, padding = (stride[0], 0) if stride else (1, "same")
                    self.add_module(end, _Conv(width, channels, shape, step, padding))
                steps.append(tuple(shapes))
                width = channels
            self.chains.append(steps)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.branches(x), dim=1)

    def branches(self, x: Tensor) -> list[Tensor]:
        """Output of each chain, of both ends of a fork, and of the pool if it has no chain."""
        outputs = []
        for steps in self.chains:
            ends = [self.pool(x) if steps[0] == ("branch_pool",) else x]
            for names in steps:
                ends = [self.get_submodule(name)(ends[0]) for name in names]
            outputs += ends
        return [*outputs, self.pool(x)] if self.own_pool else outputs


def _mixed35(inputs: int, pooled: int) -> _Mixed:
    """Mixed_5b to 5d, on 35x35."""
    return _Mixed(
        inputs, _average, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pooled, 1)],
    )  # fmt: skip


def _mixed17(inner: int) -> _Mixed:
    """Mixed_6b to 6e, on 17x17."""
    double = [(inner, 1), (inner, _COLUMN), (inner, _ROW), (inner, _COLUMN), (192, _ROW)]
    return _Mixed(
        768, _average, branch1x1=[(192, 1)], branch7x7=[(inner, 1), (inner, _ROW), (192, _COLUMN)],
        branch7x7dbl=double, branch_pool=[(192, 1)],
    )  # fmt: skip


def _mixed8(inputs: int, pool: Callable[[Tensor], Tensor]) -> _Mixed:
    """Mixed_7b and 7c, on 8x8."""
    return _Mixed(
        inputs, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, _FORK)],
        branch3x3dbl=[(448, 1), (384, 3), (384, _FORK)], branch_pool=[(192, 1)],
    )  # fmt: skip


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
        self.Mixed_5b = _mixed35(192, pooled=32)
        self.Mixed_5c = _mixed35(256, pooled=64)
        self.Mixed_5d = _mixed35(288, pooled=64)
        self.Mixed_6a = _Mixed(  # from 35x35 to 17x17
            288, _halve, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)]
        )
        self.Mixed_6b = _mixed17(128)
        self.Mixed_6c = _mixed17(160)
        self.Mixed_6d = _mixed17(160)
        self.Mixed_6e = _mixed17(192)
        self.Mixed_7a = _Mixed(  # from 17x17 to 8x8
            768, _halve, branch3x3=[(192, 1), (320, 3, 2)],
            branch7x7x3=[(192, 1), (192, _ROW), (192, _COLUMN), (192, 3, 2)],
        )  # fmt: skip
        self.Mixed_7b = _mixed8(1280, _average)
        self.Mixed_7c = _mixed8(2048, nn.MaxPool2d(3, stride=1, padding=1))
        self.fc = nn.Linear(2048, _CLASSES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Look at images (B, 3, 299, 299), which are (x - 128) / 128 of 8-bit ones.

        Returns:
            pool (B, 2048); spatial (B, 2023), 7 channels of 17x17 places, the channel running
            fastest, as ADM's; logits (B, 1008) without the bias, as ADM's Inception Score.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = _halve(x)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = _halve(x)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        branches = self.Mixed_6d.branches(x)
        spatial = branches[0][:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 2023)
        x = self.Mixed_7a(self.Mixed_6e(torch.cat(branches, dim=1)))  # (B, 1280, 8, 8)
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
    starts, ends = _NOT_NEEDED
    expected = {k: v for k, v in network.state_dict().items() if not k.endswith(ends)}
    weights = {k: v for k, v in read_weights(path).items() if not k.startswith(starts)}
    weights = {k: v for k, v in weights.items() if not k.endswith(ends)}
    _check_weights(path, weights, expected)
    network.load_state_dict(
        {k: v.to(torch.float32, copy=True) for k, v in weights.items()}, strict=False, assign=True
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None  # counts in training alone
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def _check_weights(
    path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Raise a ValueError that names the weights that don't fit Inception."""
    shapes = [
        (k, tuple(weights[k].shape), tuple(expected[k].shape)) for k in expected if k in weights
    ]
    faults = {
        "lacks": [name for name in expected if name not in weights],
        "also has": [name for name in weights if name not in expected],
        "has in another shape": [f"{name} {a} for {b}" for name, a, b in shapes if a != b],
    }
    if words := [f"{what} {_some(names)}" for what, names in faults.items() if names]:
        raise ValueError(
            f"the weights in {path} are not those of FID's Inception: the file "
            f"{', and '.join(words)}; use {INCEPTION_FILES[0]}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
