"""Pictures as they lie in the wild, to RGB squares or rectangles of the wanted size."""

import io
import math
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

Array = np.ndarray[Any, np.dtype[Any]]
WIDEST = 2.0  # ratio of the sides of a bucket, at most
SPARE = 1 / 8  # of the pixels, by which a bucket may have more or fewer
LONGEST = 8  # times the length that is cut out: what is scaled at most
READING = 2  # another number whenever the pixels of `read_image` and `fit` change
_WHITE = (255, 255, 255, 255)


def read_image(content: bytes | str) -> Image.Image:
    """An RGB image of a file's bytes or path, turned as its EXIF data says.

    Colours are those of sRGB, by the profile that the file brings along. What is transparent is
    laid on white; of 16 bits the upper 8 are kept; of an animation the first picture. Raises
    whatever PIL does with a file that it can't read, and ValueError.
    """
    if isinstance(content, str):  # read whole: what the disk says is not taken for a broken file
        content = Path(content).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken EXIF data, and of large but allowed pictures
        with Image.open(io.BytesIO(content)) as image:
            layout = image.tile[0][3] if image.tile else None
            image.load()
            value = image.info.get("transparency")
            if isinstance(layout, str) and value is not None:  # PIL leaves it as the file has it
                if layout in ("L;2", "L;4"):
                    image.info["transparency"] = value * 255 // (2 ** int(layout[-1]) - 1)
                elif layout.startswith("RGB;16"):
                    image.info["transparency"] = tuple(part >> 8 for part in value)
            return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue in sRGB, of any mode that PIL reads from pictures."""
    if image.mode == "F":
        raise ValueError("it has floating-point numbers; convert it to 8 or 16 bits")
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode.startswith("I"):  # 16 bits of grey; mode I has them in 32
        numbers = np.asarray(image)
        if numbers.min() < 0 or numbers.max() > 65535:
            raise ValueError("its numbers are beyond 16 bits; convert it to 8 or 16 bits")
        value = image.info.get("transparency")
        image = Image.fromarray((numbers >> 8).astype(np.uint8))
        if value is not None:
            alpha = Image.fromarray((numbers != value).astype(np.uint8) * 255)
    elif image.has_transparency_data:
        is_grey = image.mode in ("L", "LA", "La")
        with_alpha = image.convert("RGBA")
        alpha = with_alpha.getchannel("A")
        image = with_alpha.getchannel("R") if is_grey else with_alpha.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    transform = _to_srgb(profile, image.mode) if profile else None
    image = image.convert("RGB") if transform is None else transform.apply(image)
    if alpha is None:
        return image
    image.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")


@lru_cache(16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What makes sRGB of a mode's colours; None where nothing is to be done.

    As in viewers, a broken profile, or one of another kind of colours, has no effect.
    """
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if found.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        transform = ImageCms.buildTransform(found, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
    some = Image.fromarray(levels[None] if mode == "L" else colours)
    change = np.asarray(transform.apply(some), np.int16) - np.asarray(some.convert("RGB"))
    return None if np.abs(change).max() <= 1 else transform  # it is sRGB itself


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image to cover (H, W), and cut out its middle.

    As for ADM's ImageNet, whose size is a square: halve with a box filter while it is twice too
    large, then scale with a bicubic one. What would be over LONGEST times as long as it is cut to
    is cut to that first.
    """
    height, width = size
    scale = max(width / image.width, height / image.height)
    spare = [
        max(0, math.ceil(side - LONGEST * wanted / scale)) // 2
        for side, wanted in ((image.width, width), (image.height, height))
    ]
    if any(spare):
        image = ImageOps.crop(image, (*spare, *spare))

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
