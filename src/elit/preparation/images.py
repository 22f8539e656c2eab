"""Pictures as they lie in the wild, to RGB squares or rectangles of the wanted size."""

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Array = np.ndarray[Any, np.dtype[Any]]
WIDEST = 2.0  # ratio of the sides of a bucket, at most
SPARE = 1 / 8  # of the pixels, by which a bucket may have more or fewer
_WHITE = (255, 255, 255, 255)


def read_image(content: bytes | str) -> Image.Image:
    """An RGB image of a file's bytes or path, turned as its EXIF data says.

    What is transparent is laid on white; of 16 bits the upper 8 are kept; of an animation the
    first picture. Raises whatever PIL does with a file that it can't read, and ValueError.
    """
    if isinstance(content, str):  # read whole: what the disk says is not taken for a broken file
        content = Path(content).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken EXIF data, and of large but allowed pictures
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue, of any mode that PIL reads from pictures."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits of grey; mode I has them in 32
        numbers = np.asarray(image).astype(np.int64)
        if numbers.min() < 0 or numbers.max() > 65535:
            raise ValueError("its numbers are beyond 16 bits; convert it to 8 or 16 bits")
        return Image.fromarray((numbers >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it has floating-point numbers; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, _WHITE)
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image to cover (H, W), and cut out its middle.

    As for ADM's ImageNet, whose size is a square: halve with a box filter while it is twice too
    large, then scale with a bicubic one.
    """
    height, width = size

    def cover() -> float:
        return max(width / image.width, height / image.height)

    while cover() <= 0.5:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = cover()
    # Rounding must not make it smaller than what is cut out
    wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - width) // 2, (high - height) // 2
    return image.crop((left, top, left + width, top + height))


def buckets(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """Sizes (H, W) of about resolution x resolution pixels, the tallest first.

    Sides are multiples of `multiple`, the longer one at most WIDEST times the shorter.
    """
    found = {(resolution, resolution)}
    for short in range(multiple, resolution + 1, multiple):
        below = resolution**2 // short // multiple * multiple
        for long in (below, below + multiple):
            area = short * long / resolution**2
            if short < long <= WIDEST * short and abs(area - 1) <= SPARE:
                found |= {(short, long), (long, short)}
    return sorted(found, reverse=True)


def nearest_bucket(width: int, height: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size whose ratio of sides is nearest to an image's, in logarithms."""
    wanted = math.log(width / height)
    return min(sizes, key=lambda size: (abs(math.log(size[1] / size[0]) - wanted), size))
