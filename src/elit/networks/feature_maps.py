"""Networks whose features say what is where in a picture: targets of representation alignment."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elit._numbers import is_whole
from elit._transformers import load_frozen, loading
from elit.data import ImageDataset
from elit.data.manifest import Features
from elit.networks.classifier import fit_network, spatial_part
from elit.networks.resize import resize_pil
from elit.networks.weights import checksum_of

CLASSIFIER = "classifier"  # fitted on the data set itself
USUAL = "facebook/dinov2-base"


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """A frozen network from pictures (B, C, H, W) in [-1, 1] to maps of features (B, c, h, w)."""

    about: Features
    module: nn.Module

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.module(images)


def load_feature_maps(
    name: str, device: torch.device, dataset: ImageDataset | None = None
) -> FeatureMaps:
    """The classifier of a data set, or a vision model of transformers by hub name or folder."""
    if name == CLASSIFIER:
        if dataset is None:
            raise ValueError(
                f"the {CLASSIFIER} is fitted on the pictures that are trained on: set "
                f"alignment.encoder={CLASSIFIER} in training, or name a vision model here"
            )
        network = fit_network(dataset, keep=True)
        channels, *size = dataset.image_shape
        return _tried(name, "classifier", spatial_part(network), (channels, *size), device)
    name = os.path.abspath(name) if os.path.isdir(name) else name
    advice = f"give a folder, or a name on the hub such as {USUAL}"
    with loading("the vision model", f" from {name!r}", advice) as transformers:
        model = load_frozen(transformers.AutoModel, name)
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        module = _VisionModel(getattr(model, "vision_model", model), processor)
        side = module.side
        return _tried(name, type(model).__name__, module, (3, side, side), device)


def _tried(
    name: str, class_name: str, module: nn.Module, shape: tuple[int, ...], device: torch.device
) -> FeatureMaps:
    """The network on its device, tried on a grey picture of a shape."""
    module = module.eval().requires_grad_(False).to(device)
    try:
        with torch.no_grad():
            maps = module(torch.zeros(1, *shape, device=device))
    except (AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"pictures alone give no last_hidden_state of it: {reason}") from error
    if maps.ndim != 4 or not maps.isfinite().all():
        raise ValueError(f"its features of a grey picture are no finite map: {tuple(maps.shape)}")
    about = Features(name, class_name, checksum_of(module), tuple(maps.shape[1:]))
    return FeatureMaps(about, module)


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    if not (value is None or is_whole(value)):
        raise ValueError(f"its {name} is {value!r:.60}, but only whole numbers are understood")
    return value


class _VisionModel(nn.Module):
    """The last hidden state of a vision model, of pictures as its processor prepares them.

    They are stretched to the square that its processor cuts out: what is at the edge counts too.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, processor: Any):
        super().__init__()
        self.model, config = model, model.config
        size = dict(getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {})
        side = size.get("height") or size.get("shortest_edge")
        side, self.patch = side or _number(config, "image_size"), _number(config, "patch_size")
        if side is None:
            raise ValueError("neither its processor nor its config says the size of its pictures")
        self.side = side - side % (self.patch or 1)
        for key, neutral in (("mean", 0.0), ("std", 1.0)):
            numbers = getattr(processor, f"image_{key}", None)
            if not getattr(processor, "do_normalize", True):
                numbers = [neutral] * 3
            if not isinstance(numbers, list | tuple) or len(numbers) != 3:
                raise ValueError(f"its processor's image_{key} is {numbers!r:.60}, not 3 numbers")
            self.register_buffer(key, torch.tensor(numbers).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        images = resize_pil(images.float(), (self.side, self.side)).clamp(-1, 1)
        pixels = ((images / 2 + 0.5 - self.mean) / self.std).to(self.model.dtype)
        hidden = self.model(pixel_values=pixels).last_hidden_state
        if hidden.ndim == 4:  # of a convolutional network
            return hidden
        across = self.side // (self.patch or self.side)
        if hidden.shape[1] < across**2 or not self.patch:
            raise ValueError(
                f"its hidden state {tuple(hidden.shape)} has no token for each patch of "
                f"{self.patch} pixels of {self.side}x{self.side}"
            )
        patches = hidden[:, -(across**2) :]  # behind the token of the whole, and registers
        return patches.unflatten(1, (across, across)).movedim(-1, 1)
