"""DINOv2 and CLIP of transformers as networks that look at images."""

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit._transformers import load_frozen, loading
from elit.networks.resize import resize_pil

logger = logging.getLogger(__name__)

DINOV2 = "facebook/dinov2-large"  # ViT-L/14, as in the papers that report FDD
CLIP = "openai/clip-vit-large-patch14"

_DINOV2_SIDE = 224
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Prepare = Callable[[Tensor], Tensor]  # float RGB (B, 3, H, W) in 0..255 -> what a module takes


class DinoFeatures(nn.Module):
    """The first token of DINOv2, after its last norm."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Look at normalised images (B, 3, 224, 224); returns (B, 1024) of the large model."""
        return self.model(pixel_values=images).last_hidden_state[:, 0]


class ClipFeatures(nn.Module):
    """CLIP's projections of images, and of texts."""

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.longest = model.config.text_config.max_position_embeddings

    def forward(self, images: Tensor) -> Tensor:
        """Look at normalised images (B, 3, 224, 224); returns (B, 768) of the large model."""
        pooled = self.model.vision_model(pixel_values=images).pooler_output
        return self.model.visual_projection(pooled)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Read B texts; returns (B, 768) of the large model. What is too long is cut off."""
        if max(map(len, self.tokenizer(list(texts))["input_ids"])) > self.longest:
            _warn_of_cut(self.longest)
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.longest,
            return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        ids, mask = batch["input_ids"], batch["attention_mask"]
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return self.model.text_projection(pooled)


@functools.cache  # once: every batch would say so
def _warn_of_cut(longest: int) -> None:
    logger.warning("CLIP reads no more than %d tokens of a text: longer ones are cut off", longest)


def load_dinov2(name: str) -> tuple[DinoFeatures, Prepare, str]:
    """DINOv2 by its name on the hub or a folder; the module, how images are prepared, in words."""
    with _loading(name, "dinov2", DINOV2) as transformers:
        model = _model(transformers.Dinov2Model, name)
        patch = model.config.patch_size
        if _DINOV2_SIDE % patch:
            raise ValueError(f"patches of {patch} pixels don't tile {_DINOV2_SIDE}x{_DINOV2_SIDE}")
    _fix_positions(model, _DINOV2_SIDE // patch)

    def prepare(images: Tensor) -> Tensor:
        images = resize_pil(images, (_DINOV2_SIDE, _DINOV2_SIDE))
        return _normalise(images, _IMAGENET_MEAN, _IMAGENET_STD)

    words = "Pillow bicubic to 224x224 without rounding, ImageNet mean and deviation"
    return DinoFeatures(model), prepare, words


def _fix_positions(model: Any, grid: int) -> None:
    """Interpolate the learned positions once, as the code that DINOv2 came with does.

    Its factor is a tenth of a patch too large, (grid + 0.1) / side, and FDD is measured with that;
    transformers' own, grid / side, gives slightly other features.
    """
    embeddings = model.embeddings
    positions = embeddings.position_embeddings.detach()  # (1, 1 + side * side, d)
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return
    places = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, d, side, side)
    factor = (grid + 0.1) / side
    places = F.interpolate(places, scale_factor=(factor, factor), mode="bicubic")
    places = places[..., :grid, :grid].permute(0, 2, 3, 1).flatten(1, 2)  # (1, grid * grid, d)
    table = torch.cat((positions[:, :1], places), dim=1)
    embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)


def load_clip(name: str) -> tuple[ClipFeatures, Prepare, str]:
    """CLIP by its name on the hub or a folder; the module, how images are prepared, in words."""
    with _loading(name, "clip", CLIP) as transformers:
        model = _model(transformers.CLIPModel, name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    side = model.config.vision_config.image_size

    def prepare(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        shorter = min(height, width)
        height, width = height * side // shorter, width * side // shorter  # rounded down
        images = resize_pil(images, (height, width), eight_bit=True)
        top, left = (height - side) // 2, (width - side) // 2
        middle = images[..., top : top + side, left : left + side]
        return _normalise(middle, _CLIP_MEAN, _CLIP_STD)

    words = f"Pillow bicubic to {side} at the shorter side, centre crop, CLIP's mean and deviation"
    return ClipFeatures(model, tokenizer), prepare, words


def _normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Images (B, 3, H, W) in 0..255 to those of a mean and a deviation, given for 0..1."""
    centre, scale = images.new_tensor(mean)[:, None, None], images.new_tensor(std)[:, None, None]
    return (images / 255 - centre) / scale


def _model(kind: Any, name: str) -> Any:
    """A frozen float32 model of transformers with all its weights."""
    expected = kind.config_class.model_type
    given = kind.config_class.get_config_dict(name)[0].get("model_type")
    if given != expected:
        raise ValueError(f"its model type {given!r} is not {expected!r}")
    return load_frozen(kind, name)


def _loading(name: str, network: str, usual: str) -> AbstractContextManager[Any]:
    advice = f"give a folder as its weights, or a name on the hub such as {usual}"
    return loading(f"the feature network {network!r}", f" from {name!r}", advice)
