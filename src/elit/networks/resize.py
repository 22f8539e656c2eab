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
        given = images.shape[axis]
        if given == side:
            continue
        # float32, as TensorFlow counts: its rounding decides which pixel is below.
        place = torch.arange(side, dtype=torch.float32) * (torch.tensor(given) / side)
        below = place.long().to(images.device)
        above = (below + 1).clamp(max=given - 1)
        weight = place.frac().to(images)
        weight = weight if axis == -1 else weight[:, None]
        low, high = images.index_select(axis, below), images.index_select(axis, above)
        images = torch.lerp(low, high, weight)
    return images


def resize_pil(images: Tensor, size: tuple[int, int], *, eight_bit: bool = False) -> Tensor:
    """Resize float images (B, C, H, W) as Pillow's bicubic, which averages where they shrink.

    Equal to its resize of floating point channels (mode "F") to 0.02 of 255; bicubic overshoots
    at edges, and that stays. With `eight_bit` numbers are rounded to 0..255 after the width and
    after the height, as Pillow does with 8-bit images; equal but for a few pixels one level off.
    (New versions take a height that shrinks first where the width grows.)
    """
    height, width = size
    steps = [(images.shape[-2], width), (height, width)] if eight_bit else [(height, width)]
    for step in steps:
        if tuple(images.shape[-2:]) != step:
            images = F.interpolate(images, size=step, mode="bicubic", antialias=True)
            images = (images + 0.5).floor().clamp(0, 255) if eight_bit else images
    return images
