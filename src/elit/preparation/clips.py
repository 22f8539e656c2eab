"""Clips of a wanted length out of video files and animations."""

import io
import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from elit._extras import missing
from elit.preparation.images import to_rgb

_DURATION = 100  # of a picture of a GIF that doesn't say, in ms, as browsers have it
_EDGE = 1e-3  # of a frame: what a time lies before the edge of one by rounding


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
    """Its pictures and the seconds that each is shown, and of all: their number and seconds."""

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
    def shown() -> Iterator[tuple[Image.Image, float]]:
        for picture in ImageSequence.Iterator(animation):
            # PIL goes on with the same object
            yield to_rgb(picture.copy()), _duration(picture)

    durations = []
    for picture in ImageSequence.Iterator(animation):
        picture.load()  # WebP tells its duration then
        durations.append(_duration(picture))
    return _Video(shown(), len(durations), sum(durations))


def _duration(picture: Image.Image) -> float:
    return (picture.info.get("duration") or _DURATION) / 1000


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

    def shown() -> Iterator[tuple[Image.Image, float]]:
        for frame in frames:
            pixels = np.frombuffer(frame, np.uint8).reshape(height, width, 3)
            yield Image.fromarray(pixels), 1 / about["fps"]

    seconds = about["duration"] or count_frames_and_secs(path)[1]  # of a stream it isn't known
    return _Video(shown(), round(seconds * about["fps"]), seconds)


class MissingPackageError(ValueError):
    """What keeps every row from being read, not one."""
