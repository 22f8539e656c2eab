"""Representation alignment: hidden states drawn towards a vision model's features of the pictures.

REPA (arXiv 2410.06940), and its spatial form iREPA (arXiv 2512.10794): a convolutional projector,
and features whose mean and deviation over the picture are taken out. In training alone: neither the
model's forward nor what is saved of it changes.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from elit._random import generator
from elit.data import ImageDataset
from elit.interface.grid import TokenGrid
from elit.models.elastic import ElasticMixin
from elit.networks.feature_maps import CLASSIFIER, FeatureMaps, load_feature_maps
from elit.training.config import PREPARED, AlignmentConfig, TrainConfig
from elit.training.distributed import Parallel, World

_EARLY = 8 / 28  # of the blocks, which REPA found best in an XL


class Alignment:
    """The projector, what it is compared with, and the hook that sees the hidden states.

    loss = 1 - the mean over cells of cos(projected hidden state, feature of the clean picture)

    A cell is a token. Of latents it is a group: their place is its centre, and what each is for
    they share out as they like; so the mean of their projections, for any number of latents, is
    compared with the group's mean feature.
    """

    def __init__(self, model: Any, dataset: ImageDataset, config: TrainConfig, world: World):
        self.model, self.options = model, config.alignment
        name = self.options.encoder
        self.maps: FeatureMaps | None = None
        if name != PREPARED:
            self.maps = load_feature_maps(name, world.device, dataset)
        about = self.maps.about if self.maps else dataset.features
        assert about is not None  # `check_alignment` has looked
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(config.seed, "weights", 1).initial_seed())
            kind, width = self.options.kind, model.config.hidden_size
            projector = Projector(width, about.shape[0], is_spatial=kind == "irepa")
        self.parallel = Parallel(projector, config.train, world)
        self._hidden: Tensor | None = None
        self._losses: list[Tensor] = []
        block = model.blocks[aligned_depth(model, self.options) - 1]
        self._hook = block.register_forward_hook(self._see)

    def _see(self, _: nn.Module, __: Any, hidden: Any) -> None:
        if torch.is_grad_enabled():
            self._hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # of text streams

    def features(self, images: Tensor, batch: dict[str, Any]) -> Tensor:
        """Maps of features (B, c, h, w) of clean pictures (B, C, H, W), or those of the batch."""
        if self.maps is not None:
            return self.maps(images)
        return batch["features"].to(images.device, non_blocking=True)

    def loss(self, x: Tensor, features: Tensor) -> Tensor:
        """Losses (B,) of the model's last call, which was on x (B, C, H, W)."""
        assert self._hidden is not None
        grid, hidden = self.model.token_grid(x), self._hidden
        count = 1
        if self.options.where == "latents":
            size = tuple(n // g for n, g in zip(grid.size, grid.group, strict=True))
            count, grid = hidden.shape[1] // grid.num_groups, TokenGrid(size, size)
        # (B, cells * n, D): the n of a place are a picture of their own
        hidden = rearrange(hidden, "b (cells n) d -> (b n) cells d", n=count)
        projected = self.parallel.module(hidden, grid).float()
        projected = projected.unflatten(0, (-1, count)).mean(1)  # (B, cells, c)
        target = self._target(features.float(), grid)
        return 1 - F.cosine_similarity(projected, target, dim=-1).mean(1)

    def _target(self, features: Tensor, grid: TokenGrid) -> Tensor:
        """Features (B, c, h, w) of a grid's cells, (B, cells, c)."""
        maps = F.interpolate(features, size=grid.size, mode="bilinear", antialias=True)
        cells = grid.patchify(maps, (1, 1))
        if self.options.kind == "irepa":
            cells = (cells - cells.mean(1, keepdim=True)) / (cells.std(1, keepdim=True) + 1e-6)
        return cells

    def weighted(self, losses: Tensor) -> Tensor:
        """What the losses (B,) of a micro-batch add to its loss, ()."""
        self._losses.append(losses.detach().mean())
        return self.options.weight * losses.mean()

    def of_step(self) -> Tensor:
        """Mean loss () of this process since the last call."""
        mean = torch.stack(self._losses).mean()
        self._losses.clear()
        self._hidden = None  # a checkpointed block was called again in the backward pass
        return mean

    @property
    def checksum(self) -> str | None:
        """Of a vision model that may change behind its name; other features follow from the data.

        The classifier's weights do too, but for rounding.
        """
        if self.maps is None or self.options.encoder == CLASSIFIER:
            return None
        return self.maps.about.sha256

    def check_same(self, checksum: str | None, path: Path) -> None:
        """Raise a ValueError if a checkpoint was trained on the features of another model."""
        if checksum is not None and self.checksum not in (None, checksum):
            raise ValueError(
                f"checkpoint {path} was trained on the features of another model: the weights of "
                f"alignment.encoder={self.options.encoder} have changed since; put those back, or "
                f"choose another output_dir"
            )

    def close(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()
        self.parallel.close()


class Projector(nn.Module):
    """From hidden states to features: an MLP of three layers, or a convolution over the cells.

    Paper: hidden layers of 2048 for all sizes; here: twice the model's width, as a small model
    would spend most of its time in them.
    """

    def __init__(self, width: int, channels: int, is_spatial: bool):
        super().__init__()
        self.is_spatial = is_spatial
        hidden = 2 * width
        self.layers: nn.Module = nn.Conv2d(width, channels, 3, padding=1)
        if not is_spatial:
            self.layers = nn.Sequential(
                nn.Linear(width, hidden), nn.SiLU(),
                nn.Linear(hidden, hidden), nn.SiLU(),
                nn.Linear(hidden, channels),
            )  # fmt: skip

    def forward(self, hidden: Tensor, grid: TokenGrid) -> Tensor:
        """(B, cells, D) -> (B, cells, c)."""
        if not self.is_spatial:
            return self.layers(hidden)
        return grid.patchify(self.layers(grid.unpatchify(hidden, (1, 1))), (1, 1))


def check_alignment(model: Any, dataset: ImageDataset, options: AlignmentConfig) -> None:
    """Raise a ValueError if a model's hidden states can't be compared with features of the data."""
    if not isinstance(model, ElasticMixin) or len(model.patch_size) != 2:
        raise ValueError(
            f"alignment.weight={options.weight} compares models of ours with features of pictures, "
            f"not a {type(model).__name__} with {dataset}; set it to 0"
        )
    aligned_depth(model, options)
    grid = model.geometry.grid(model.sample_size)
    cells = grid.num_groups if options.where == "latents" else grid.num_tokens
    if options.kind == "irepa" and cells == 1:
        raise ValueError(
            f"alignment.kind=irepa compares what is where, but alignment.where={options.where} has "
            f"one place on a grid of {grid.size}; use kind=repa, or smaller groups"
        )
    name = options.encoder
    if name == PREPARED:
        if dataset.features is None:
            raise ValueError(
                f"alignment.encoder={PREPARED} reads features that were made beforehand, and the "
                f"data set has none; run `elit prepare` with --features"
            )
    elif dataset.autoencoder is not None:
        raise ValueError(
            f"alignment.encoder={name} looks at pictures, but the data are VAE latents; run "
            f"`elit prepare` with --features, and set alignment.encoder={PREPARED}"
        )
    elif name == CLASSIFIER and dataset.num_classes < 2:
        raise ValueError(
            f"alignment.encoder={name} is fitted on two classes or more, and the data set has "
            f"{dataset.num_classes}; name a vision model"
        )


def aligned_depth(model: ElasticMixin, options: AlignmentConfig) -> int:
    """Blocks before the place, or a ValueError if the model has no such place."""
    (head, core, _), total = model.split, len(model.blocks)
    name, early = type(model).__name__, max(1, math.ceil(_EARLY * total))
    if options.where == "latents":
        if not model.is_elastic:
            raise ValueError(
                f"alignment.where=latents has no place in the plain model {name}; use tokens"
            )
        low, high = head + 1, head + core
    elif not model.is_elastic:  # of an hourglass the blocks that see all tokens
        low, high = (head + 1, head + core) if model.always_split else (1, total)
    else:
        if not head or model.always_split:
            reason = "no head" if not head else "a head that only sees neighbours"
            raise ValueError(
                f"alignment.where=tokens is before Read, but this {name} has {reason}; use "
                f"alignment.where=latents"
            )
        low, high, early = 1, head, head
    depth = min(max(low, early), high) if options.depth is None else options.depth
    if not low <= depth <= high:
        raise ValueError(
            f"alignment.depth={depth} is no place of {options.where} in this {name}, whose are "
            f"behind block {low} to {high}"
        )
    return depth
