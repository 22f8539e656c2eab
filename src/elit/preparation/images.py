"""Pictures, videos and animations as they lie in the wild, to RGB of the size that is asked for."""

import io
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, ImageSequence, UnidentifiedImageError

from elit._extras import missing

Array = np.ndarray[Any, np.dtype[Any]]
WIDEST = 2.0  # ratio of the sides of a bucket, at most
SPARE = 1 / 8  # of the pixels, by which a bucket may have more or fewer
LONGEST = 8  # times the length that is cut out: what is scaled at most
READING = 2  # another number whenever the pixels of `read_image` and `fit` change
_STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # names of formats that PIL doesn't read itself
_DURATION = 100  # of a picture of a GIF that doesn't say, in ms, as browsers have it
_EDGE = 1e-3  # of a frame: what a time lies before the edge of one by rounding
_WHITE = (255, 255, 255, 255)


@cache
def picture_suffixes() -> frozenset[str]:
    """Endings of all files that PIL reads."""
    known = Image.registered_extensions()
    return frozenset(s for s, f in known.items() if f in Image.OPEN and f not in _STUBS)


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
        try:
            opened = Image.open(io.BytesIO(content))
        except UnidentifiedImageError:  # which says where it lay in memory
            raise UnidentifiedImageError("cannot identify image file") from None
        with opened as image:
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
    """A transform of a mode's colours to sRGB; None where nothing is to be done.

    As in viewers, a broken profile, or one of another kind of colours, has no effect.
    """
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if given.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        transform = ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), mode, "RGB")
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

    def cover() -> float:
        return max(width / image.width, height / image.height)

    spare = [
        max(0, math.ceil(side - LONGEST * goal / cover())) // 2
        for side, goal in ((image.width, width), (image.height, height))
    ]
    if any(spare):
        image = ImageOps.crop(image, (*spare, *spare))
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
    sizes = {(resolution, resolution)}
    for short in range(multiple, resolution + 1, multiple):
        below = resolution**2 // short // multiple * multiple
        for long in (below, below + multiple):
            area = short * long / resolution**2
            if short < long <= WIDEST * short and abs(area - 1) <= SPARE:
                sizes |= {(short, long), (long, short)}
    return sorted(sizes, reverse=True)


def nearest_bucket(width: int, height: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size whose ratio of sides is nearest to an image's, in logarithms."""
    ratio = math.log(width / height)
    return min(sizes, key=lambda size: (abs(math.log(size[1] / size[0]) - ratio), size))


# ---- clips ----


def read_clips(
    content: bytes | str, frames: int, fps: float | None, count: int = 1
) -> list[list[Image.Image]]:
    """Clips of a video's bytes or path, evenly spread, or a ValueError if it is too short.

    Args:
        content: MP4 and what else ffmpeg reads, or GIF, WebP and what else PIL reads.
        frames: of a clip.
        fps: how many a second: at each of their times the picture that is shown then is taken;
            None takes the pictures as they come.
        count: clips at most; as many as fit without overlap. A single one is of the middle.
    """
    with ExitStack() as stack:
        try:
            opened = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
            video = _by_pil(stack.enter_context(opened))
        except UnidentifiedImageError:
            video = _by_ffmpeg(content, stack)
        return _pick(video, frames, fps, count)


@dataclass
class _Video:
    """Pictures with the seconds that each is shown; the number and seconds of all."""

    shown: Iterator[tuple[Image.Image, float]]
    pictures: int
    seconds: float


def _pick(video: _Video, frames: int, fps: float | None, count: int) -> list[list[Image.Image]]:
    length = video.pictures  # in frames of ours
    if fps is not None:
        last = video.seconds / max(1, video.pictures)
        length = math.ceil((video.seconds - _EDGE * last) * fps)
    count = max(1, min(count, length // frames))
    # Each stands in the middle of its share
    starts = [max(0, ((2 * i + 1) * length - count * frames) // (2 * count)) for i in range(count)]
    clips: list[list[Image.Image]] = [[]]
    number, seconds = 0, 0.0
    for image, duration in video.shown:
        seconds += duration
        while fps is None or number / fps < seconds - _EDGE * duration:
            if number >= starts[len(clips) - 1]:
                clips[-1].append(image)
            number += 1
            if len(clips[-1]) == frames:
                if len(clips) == count:
                    return clips
                clips.append([])
            if fps is None:
                break
    if len(clips) > 1:  # it is a little shorter than it says
        return clips[:-1]
    rate = "" if fps is None else f" at {fps:g} a second"
    raise ValueError(f"it has {number} frames{rate}, {frames} are wanted")


def _by_pil(animation: Image.Image) -> _Video:
    durations = []
    for picture in ImageSequence.Iterator(animation):
        picture.load()  # WebP tells its duration then
        durations.append((picture.info.get("duration") or _DURATION) / 1000)
    # PIL goes on with the same object
    shown = (to_rgb(picture.copy()) for picture in ImageSequence.Iterator(animation))
    return _Video(zip(shown, durations, strict=True), len(durations), sum(durations))


def _by_ffmpeg(content: bytes | str, stack: ExitStack) -> _Video:
    try:
        from imageio_ffmpeg import count_frames_and_secs, read_frames
    except ImportError as error:
        raise MissingPackageError(missing("videos need imageio-ffmpeg", "video")) from error
    path = content
    if isinstance(content, bytes):
        path = str(Path(stack.enter_context(tempfile.TemporaryDirectory()), "clip"))
        Path(path).write_bytes(content)
    frames: Any = read_frames(path, pix_fmt="rgb24")
    stack.callback(frames.close)
    about = next(frames)
    width, height = about["size"]

    shown = (
        (
            Image.fromarray(np.frombuffer(frame, np.uint8).reshape(height, width, 3)),
            1 / about["fps"],
        )
        for frame in frames
    )
    seconds = about["duration"] or count_frames_and_secs(path)[1]  # of a stream it isn't known
    return _Video(shown, round(seconds * about["fps"]), seconds)


class MissingPackageError(ValueError):
    """A missing package, which keeps every row from being read, not one."""
