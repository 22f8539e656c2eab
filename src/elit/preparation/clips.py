"""Clips of a wanted length out of video files and animations."""

import io
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from elit.preparation.images import to_rgb

_DURATION = 100  # of a picture of a GIF that doesn't say, in ms, as browsers have it
_EDGE = 1e-3  # of a frame: what a time lies before the edge of one by rounding


def read_clip(content: bytes | str, frames: int, fps: float | None) -> list[Image.Image]:
    """The first frames of a video's bytes or path, or a ValueError if it is too short.

    Args:
        content: MP4 and what else ffmpeg reads, or GIF, WebP and what else PIL reads.
        frames: how many.
        fps: how many a second: at each of their times the picture that is shown then is taken;
            None takes the pictures as they come.
    """
    found: list[Image.Image] = []
    seconds = 0.0
    for image, duration in _shown(content):
        seconds += duration
        while len(found) < frames:
            if fps is not None and len(found) / fps >= seconds - _EDGE * duration:
                break
            found.append(image)
            if fps is None:
                break
        if len(found) == frames:
            return found
    rate = "" if fps is None else f" at {fps:g} a second"
    raise ValueError(f"it has {len(found)} frames{rate}, {frames} are wanted")


def _shown(content: bytes | str) -> Iterator[tuple[Image.Image, float]]:
    """Pictures of a video, and the seconds that each is shown."""
    try:
        animation = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
    except UnidentifiedImageError:
        yield from _shown_by_ffmpeg(content)
        return
    with animation:
        for picture in ImageSequence.Iterator(animation):
            duration = picture.info.get("duration") or _DURATION
            # PIL goes on with the same object
            yield to_rgb(picture.convert("RGBA")), duration / 1000


def _shown_by_ffmpeg(content: bytes | str) -> Iterator[tuple[Image.Image, float]]:
    try:
        from imageio_ffmpeg import read_frames
    except ImportError as error:
        raise MissingPackageError(
            "videos need imageio-ffmpeg; pip install 'elit-diffusion[video]'"
        ) from error
    with ExitStack() as stack:
        path = content
        if isinstance(content, bytes):
            path = str(Path(stack.enter_context(tempfile.TemporaryDirectory()), "clip"))
            Path(path).write_bytes(content)
        frames: Any = read_frames(path, pix_fmt="rgb24")
        stack.callback(frames.close)
        about = next(frames)
        width, height = about["size"]
        for frame in frames:
            pixels = np.frombuffer(frame, np.uint8).reshape(height, width, 3)
            yield Image.fromarray(pixels), 1 / about["fps"]


class MissingPackageError(ValueError):
    """What keeps every row from being read, not one."""
