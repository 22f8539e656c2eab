"""Resizing as the references of the scores do it, where the images are: Pillow has no batches.

What comes in was checked by `FeatureNetwork.features`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_tf_bilinear(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize float images (B, C, H, W) as TensorFlow 1's ResizeBilinear, as the classic FID does.

    A pixel's corner, not its centre, keeps its place, and nothing is averaged where the image
    becomes smaller.
    """
    for axis, side in zip((-2, -1), size, strict=True):
        images = _interpolate(images, axis, side)
    return images


def _interpolate(images: Tensor, axis: int, size: int) -> Tensor:
    """One axis of `resize_tf_bilinear`."""
    given = images.shape[axis]
    if given == size:
        return images
    # float32, as TensorFlow counts: its rounding decides which pixel is below.
    place = torch.arange(size, dtype=torch.float32) * (torch.tensor(given) / size)
    below = place.long()
    above = (below + 1).clamp(max=given - 1)
    weight = (place - below).to(images)
    weight = weight if axis == -1 else weight[:, None]
    low = images.index_select(axis, below.to(images.device))
    return torch.lerp(low, images.index_select(axis, above.to(images.device)), weight)


def resize_pil(
    images: Tensor, size: tuple[int, int], mode: str = "bicubic", *, eight_bit: bool = False
) -> Tensor:
    """Resize float images (B, C, H, W) as Pillow, which averages where the image becomes smaller.

    Equal to its resize of floating point channels (mode "F") to 0.02 of 255; bicubic overshoots
    at edges, and that stays. With `eight_bit` numbers are rounded to 0..255 after the width and
    after the height, as Pillow does with 8-bit images; equal but for a few pixels one level off.
    (New versions take a height that shrinks first where the width grows.)
    """
    height, width = size
    steps = [(images.shape[-2], width), (height, width)] if eight_bit else [(height, width)]
    for step in steps:
        if tuple(images.shape[-2:]) != step:
            images = F.interpolate(images, size=step, mode=mode, antialias=True)
            images = (images + 0.5).floor().clamp(0, 255) if eight_bit else images
    return images


def shorter_side(images: Tensor, size: int) -> tuple[int, int]:
    """Height and width at which the shorter side of images (..., H, W) is `size`."""
    height, width = images.shape[-2:]
    shorter = min(height, width)
    # Rounded down, as CLIP's reference does
    return height * size // shorter, width * size // shorter


def centre_crop(images: Tensor, size: int) -> Tensor:
    """Square of `size` pixels from the middle of images (..., H, W), none smaller than that."""
    height, width = images.shape[-2:]
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]
