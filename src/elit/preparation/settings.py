"""Settings of `prepare`, and which of them are allowed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from elit._choices import check_choice
from elit._files import typed_path
from elit._numbers import is_real, is_whole

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of torch
NONE = "none"  # as a column: leave it out


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of `prepare`."""

    source: str  # a folder, a file, a pattern such as "shards/*.tar", or a data set on the hub
    out: str  # folder to write
    source_config: str | None = None  # of a data set on the hub that has several
    # NAME of the source, or "train=NAME" and "validation=NAME" with any NAME, a part of it as
    # in "train[1000:]" or "train[:5%]"; none: "train", and as validation what is called so,
    # or else "test", if it is there
    splits: Sequence[str] = ()
    # autoencoder: name on the hub or folder, of it or of a pipeline; None: store pixels
    vae: str | None = DEFAULT_VAE
    resolution: Sequence[int] = (256,)  # one or several: side of a square picture, pixels
    # pictures of about resolution x resolution pixels whose sides fit the source's, instead
    # of squares
    aspect_ratios: bool = False
    multiple: int = 64  # that such sides are multiples of
    flips: bool = False  # store each picture mirrored too
    frames: int | None = None  # length of a clip; None: pictures
    fps: float | None = None  # frames a second that clips are resampled to; None: as they are
    clips_per_video: int = 1  # at most; as many as fit without overlap, evenly spread
    # of the source; None: found by type and name, as are the two others
    image_column: str | None = None
    label_column: str | None = None  # "none" leaves labels out
    caption_column: str | None = None  # likewise
    # CLIP, T5 or Qwen of transformers, or a pipeline of diffusers: name or folder
    text_encoder: str | None = None
    # tokens that encoded texts are padded to, and cut at; None: what the encoder takes, or
    # 256
    max_text_length: int | None = None
    # vision model of transformers whose features are stored too: name or folder
    features: str | None = None
    # rows of the source that are done or undone together; None: 4096, or fewer where those
    # would take more than 1 GiB
    part_size: int | None = None
    batch_size: int = 32  # pictures, or clips, that are encoded at a time
    dtype: str = "fp32"  # that the autoencoder and the text encoder compute in
    store_dtype: str = "fp16"  # of what they make
    device: str = "auto"  # "auto", "cpu", "cuda" or "mps"
    workers: int | None = None  # processes that read pictures; None: by the number of processors
    # compare the checksums of what is there already; what is damaged is made again
    verify: bool = False

    def __post_init__(self) -> None:
        for name in ("source", "out", "vae", "text_encoder", "features"):
            if isinstance(path := getattr(self, name), str | os.PathLike):
                object.__setattr__(self, name, typed_path(path))

    def check(self) -> None:
        """Raise a ValueError for what is not allowed."""
        if not self.resolution:
            raise ValueError("resolution is empty; give one or more, such as 256")
        whole = {f"resolution[{i}]": n for i, n in enumerate(self.resolution)}
        counts = ("multiple", "batch_size", "clips_per_video")
        optional = ("frames", "part_size", "max_text_length")
        for name in (*counts, *optional):
            if getattr(self, name) is not None or name in counts:
                whole[name] = getattr(self, name)
        for name, number in whole.items():
            if not is_whole(number):
                raise ValueError(
                    f"{name}={number!r} is not allowed; give a whole number, 1 or more"
                )
        if self.workers is not None and not is_whole(self.workers, 0):
            raise ValueError(f"workers={self.workers!r} is not allowed; give 0 or more")
        if len(set(self.resolution)) < len(self.resolution):
            raise ValueError(f"resolution {list(self.resolution)} names one twice")
        if self.aspect_ratios and any(n % self.multiple for n in self.resolution):
            raise ValueError(
                f"resolution {list(self.resolution)} with aspect_ratios: each must be a multiple "
                f"of {self.multiple}, as all sides are; choose others, or another multiple"
            )
        if self.fps is not None and (not is_real(self.fps) or self.fps <= 0):
            raise ValueError(f"fps={self.fps!r} is not allowed; give a number above 0")
        for name, given in (("fps", self.fps), ("clips_per_video", self.clips_per_video > 1)):
            if given and self.frames is None:
                raise ValueError(f"{name} is of clips; give frames too")
        if self.features is not None and self.frames is not None:
            raise ValueError("features are of pictures, not of clips; leave features or frames out")
        for name in ("dtype", "store_dtype"):
            check_choice(getattr(self, name), DTYPES, name)
        if self.text_encoder is not None and self.caption_column == NONE:
            raise ValueError("text_encoder needs captions; remove it or caption_column=none")
