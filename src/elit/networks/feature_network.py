"""Networks by whose features images are compared: Inception, DINOv2, CLIP, I3D, or one's own."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elit._choices import check_choice
from elit._files import sha256_of, typed_path
from elit.data import ImageDataset
from elit.networks import NETWORKS, inception
from elit.networks.classifier import ClassifierFeatures, fit_network
from elit.networks.encoders import CLIP, DINOV2, ClipFeatures, load_clip, load_dinov2
from elit.networks.resize import resize_tf_bilinear
from elit.networks.weights import (
    checksum_of,
    find_file,
    find_inception,
    folder_checksum,
    read_exported,
    read_scripted,
)

_OF_FILES = (".pt", ".ts", ".pth", ".pt2")
_I3D_FILE = "i3d_torchscript.pt"
_I3D_SIDE = 224
_I3D_FRAMES = 10  # fewer leave nothing after its strides in time


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A frozen network and how pictures are prepared for it."""

    # "inception", "dinov2", "clip", "i3d", "classifier", the class of a given module, or the
    # name of a file
    name: str
    # it takes what `prepare` makes, and returns a tensor (B, d) or a dictionary of them
    module: nn.Module
    # names of what `features` returns: "pool" is what a Frechet distance compares, "logits",
    # where there are any, are for the Inception Score, "spatial" is for sFID
    outputs: tuple[str, ...]
    checksum: str  # SHA-256 of its weights, of the file where they are one
    preprocessing: str  # in words
    takes: str  # "images", "clips", or "texts" where it takes texts and images
    device: torch.device  # where it is
    # makes of float pictures (B, C, H, W), clips (B, C, T, H, W), in 0..255 what the module
    # takes
    prepare: Callable[[Tensor], Tensor] = field(repr=False)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Features of uint8 images (B, C, H, W), each (B, d) in float32 on its device.

        A network of clips takes (B, C, T, H, W); C is 1 or 3.
        """
        what, axes = ("clips", 5) if self.takes == "clips" else ("images", 4)
        if images.ndim != axes or images.numel() == 0 or images.shape[1] not in (1, 3):
            order = "(B, C, T, H, W)" if axes == 5 else "(B, C, H, W)"
            raise ValueError(
                f"{what} of shape {tuple(images.shape)} for {self.name}: use {order} with "
                f"1 or 3 channels, none of them 0"
            )
        if images.dtype != torch.uint8:
            raise ValueError(f"{what} of {images.dtype} for {self.name}: use uint8, 0 to 255")
        with _full_precision(self.device):
            output = self.module(self.prepare(images.to(self.device).float()))
        if isinstance(output, Tensor):
            output = {self.outputs[0]: output} if len(self.outputs) == 1 else {}
        if not isinstance(output, dict) or set(output) != set(self.outputs):
            given = sorted(map(str, output)) if isinstance(output, dict) else type(output).__name__
            raise ValueError(
                f"{self.name} returned {given or 'one tensor'}, not {', '.join(self.outputs)}; a "
                f"module returns a tensor (B, d), or a dictionary of such tensors whose names are "
                f"in its attribute `outputs`"
            )
        for name, tensor in output.items():
            if not isinstance(tensor, Tensor) or tensor.ndim != 2 or len(tensor) != len(images):
                shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(
                    f"{self.name} returned {name} {shape} for {len(images)} samples: features are "
                    f"(B, d); pool or flatten them in the module"
                )
        return {name: output[name].float() for name in self.outputs}

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Features of texts, of a network that reads them: (B, d) in float32 on its device."""
        if not isinstance(self.module, ClipFeatures):
            raise ValueError(f"{self.name} reads no texts; use clip")
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts {texts!r}: use a list of at least one text")
        with _full_precision(self.device):
            return self.module.texts(texts).float()


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, and float32 throughout: a score must not hang on what goes on around it."""
    parts: list[Any] = []
    if device.type == "cuda":  # where convolutions have 10 bits unless told otherwise
        cudnn: Any = torch.backends.cudnn  # whose types don't tell of it
        parts = [cudnn.conv, torch.backends.cuda.matmul]
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def load_network(
    network: str | nn.Module,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    dataset: ImageDataset | None = None,
) -> FeatureNetwork:
    """A feature network by its name, or one's own.

    Args:
        network: one of NETWORKS; the path of a TorchScript file (.pt, .ts) or an exported program
            (.pt2), which may run code of its own; or a module, which is moved to the device and
            set to eval. One's own takes RGB (B, 3, H, W) in [-1, 1].
        weights: of inception and i3d a file, here or "user/repository/file" on the hub; of dinov2
            and clip a folder or a name on the hub. By default inception's are looked for and
            fetched, those of dinov2 and clip are the papers', i3d's are named by the environment.
        device: where to look at images.
        dataset: training split, which "classifier", and it alone, is fitted on within seconds.
    """
    device = torch.device(device)
    name = network if isinstance(network, str) else type(network).__name__
    if dataset is not None and network != "classifier":
        raise ValueError(f"dataset has no effect on {name}: only the classifier is fitted; drop it")
    if weights is not None and (network == "classifier" or network not in NETWORKS):
        raise ValueError(f"weights have no effect on {name}, which brings its own; drop them")
    if isinstance(network, nn.Module):
        # A name of NETWORKS would make its scores look like theirs.
        name = f"own-{name}" if name in NETWORKS else name
        network.eval()
        return _own(name, network, checksum_of(network), device)
    if network not in NETWORKS and Path(network).suffix in _OF_FILES:
        path = Path(typed_path(network))
        if not path.is_file():
            raise ValueError(
                f"no file {path} with a feature network; give one, or a name of NETWORKS"
            )
        module = read_exported(path) if path.suffix == ".pt2" else read_scripted(path, device)
        return _own(path.name, module, sha256_of(path), device)
    check_choice(network, NETWORKS, "feature network", ", which is no .pt, .ts or .pt2 file either")
    return _LOADERS[network](weights, device, dataset)


_Loader = Callable[[Any, torch.device, Any], FeatureNetwork]  # of weights, device and data set


def _inception(weights: str | Path | None, device: torch.device, _: Any) -> FeatureNetwork:
    path = find_inception(weights)
    module = inception.load_inception(path).to(device)
    return FeatureNetwork(
        "inception", module, module.outputs, sha256_of(path),
        "TensorFlow 1 bilinear to 299x299, (x - 128) / 128", "images", device,
        lambda images: inception.prepare(_rgb(images)),
    )  # fmt: skip


def _pooled(name: str, default: str, load: Callable[[str], Any], of: str) -> _Loader:
    """Loader of a vision model of transformers, by its pooled features."""

    def open_network(weights: str | Path | None, device: torch.device, _: Any) -> FeatureNetwork:
        source = typed_path(weights or default)
        module, prepare, words = load(source)
        checksum = folder_checksum(source, module)
        return FeatureNetwork(
            name, module.to(device), ("pool",), checksum, words, of, device,
            lambda images: prepare(_rgb(images)),
        )  # fmt: skip

    return open_network


class _I3D(nn.Module):
    """I3D of a TorchScript file, asked for its 400 features."""

    def __init__(self, scripted: Any):
        super().__init__()
        self.scripted = scripted

    def forward(self, clips: Tensor) -> Tensor:
        return self.scripted(clips, rescale=False, resize=False, return_features=True)


def _prepare_clips(clips: Tensor) -> Tensor:
    """Float clips (B, C, T, H, W) in 0..255 to RGB ones (B, 3, T, 224, 224) in [-1, 1]."""
    batch, _, frames = clips.shape[:3]
    if frames < _I3D_FRAMES:
        raise ValueError(
            f"clips of {frames} frames: i3d takes {_I3D_FRAMES} or more; draw longer clips"
        )
    images = _rgb(clips.transpose(1, 2).flatten(0, 1))  # (B * T, 3, H, W)
    images = resize_tf_bilinear(images, (_I3D_SIDE, _I3D_SIDE)) / 127.5 - 1
    return images.unflatten(0, (batch, frames)).transpose(1, 2).contiguous()


def _i3d(weights: str | Path | None, device: torch.device, _: Any) -> FeatureNetwork:
    weights = weights or os.environ.get("ELIT_I3D_WEIGHTS")
    if not weights:
        raise ValueError(
            f"i3d needs the file {_I3D_FILE}, which public code of FVD comes with: give its path "
            f"as the weights, or in ELIT_I3D_WEIGHTS"
        )
    path = find_file(weights, "i3d")
    scripted = read_scripted(path, device)
    needed = {"rescale", "resize", "return_features"}
    if not needed <= {argument.name for argument in scripted.forward.schema.arguments}:
        raise ValueError(
            f"{path} is not the I3D of FVD: its forward doesn't take {', '.join(sorted(needed))}; "
            f"use {_I3D_FILE}, or give the file as a network of its own"
        )
    return FeatureNetwork(
        "i3d", _I3D(scripted), ("pool",), sha256_of(path),
        "TensorFlow 1 bilinear to 224x224, [-1, 1]", "clips", device, _prepare_clips,
    )  # fmt: skip


def _classifier(_: Any, device: torch.device, dataset: ImageDataset | None) -> FeatureNetwork:
    if dataset is None:
        raise ValueError("the classifier is fitted on real images: give a training split, dataset=")
    if dataset.num_classes < 2 or dataset.autoencoder is not None:
        raise ValueError(
            f"the classifier tells two classes or more of images apart, not those of {dataset!r}"
            f"{', which are VAE latents' if dataset.autoencoder else ''}; use another network"
        )
    module = ClassifierFeatures(fit_network(dataset, keep=True))
    channels, *size = dataset.image_shape[0], *dataset.image_shape[-2:]

    def prepare(images: Tensor) -> Tensor:
        if list(images.shape[2:]) != size:
            given = "x".join(map(str, images.shape[2:]))
            raise ValueError(
                f"images of {given} for a classifier fitted on {'x'.join(map(str, size))}; draw "
                f"them at that size, or fit it on images of {given}"
            )
        images = images.mean(dim=1, keepdim=True) if channels == 1 else _rgb(images)
        return images / 127.5 - 1

    words = f"{'grey' if channels == 1 else 'RGB'} in [-1, 1], at most 32 pixels a side"
    return FeatureNetwork(
        "classifier", module.to(device), module.outputs, checksum_of(module), words, "images",
        device, prepare,
    )  # fmt: skip


_LOADERS: dict[str, _Loader] = {
    "inception": _inception,
    "dinov2": _pooled("dinov2", DINOV2, load_dinov2, "images"),
    "clip": _pooled("clip", CLIP, load_clip, "texts"),
    "i3d": _i3d,
    "classifier": _classifier,
}


def _own(name: str, module: nn.Module, checksum: str, device: torch.device) -> FeatureNetwork:
    outputs = getattr(module, "outputs", ("pool",))
    named = isinstance(outputs, list | tuple) and all(isinstance(x, str) and x for x in outputs)
    if not named or not outputs or len(set(outputs)) < len(outputs):
        raise ValueError(f"outputs {outputs!r} of {name}: use a list of different names")
    return FeatureNetwork(
        name, module.to(device), tuple(outputs), checksum, "RGB in [-1, 1], at its own size",
        "images", device, lambda images: _rgb(images) / 127.5 - 1,
    )  # fmt: skip


def _rgb(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) with three channels."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
