"""The autoencoder that encodes pictures: any of diffusers', by the class that its config names."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit._hub import hub_reason, not_fetched
from elit._numbers import latent_frames
from elit._wrappers import digest_of_weights
from elit.data.manifest import LATENTS, MOMENTS, PIXELS, Autoencoder
from elit.pipelines.autoencoder import (
    autoencoder_class,
    check_round_trip,
    encode,
    has_time,
    picture_channels,
    scale_and_shift,
    spatial_scale,
    takes_opacity,
    temporal_scale,
    upcasts,
)
from elit.pipelines.folder import read_config
from elit.preparation.reading import Sizes
from elit.preparation.settings import DTYPES

logger = logging.getLogger(__name__)


@dataclass
class Encoder:
    """Makes what is stored of pictures; without a VAE these are the pictures."""

    kind: str  # of what is stored: "moments", "latents" or "images"
    about: Autoencoder | None  # of the autoencoder, for the manifest
    vae: Any  # the autoencoder
    device: torch.device  # that it computes on
    dtype: torch.dtype  # that it computes in
    store: torch.dtype  # that its numbers are stored in

    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) or (B, T, H, W, 3) uint8 -> (B, C, ...) float32 or, of pixels, uint8."""
        pictures = pictures.movedim(-1, 1)  # (B, 3, ...)
        if self.vae is None:
            return pictures
        pictures = (pictures.to(self.device).float() / 127.5 - 1).to(self.dtype)
        with torch.inference_mode():
            mean, logvar = encode(self.vae, pictures)
        return (mean if logvar is None else torch.cat((mean, logvar), dim=1)).float().cpu()

    def stored(self, encoded: Tensor) -> Tensor:
        """Convert to the type that is stored."""
        return encoded if self.vae is None else encoded.to(self.store)

    def sums(self, encoded: Tensor) -> tuple[float, float, int]:
        """Sum, sum of squares and count of the latents that training will draw."""
        if self.about is None:
            return 0.0, 0.0, 0
        channels = encoded.shape[1] // (2 if self.kind == MOMENTS else 1)
        shape = (1, -1, *(1,) * (encoded.ndim - 2))
        scale, shift = (torch.tensor(n).view(shape) for n in (self.about.scale, self.about.shift))
        mean = (encoded[:, :channels] - shift) * scale
        squares = mean**2
        if self.kind == MOMENTS:
            squares = squares + encoded[:, channels:].exp() * scale**2
        total, total_squares = (float(x.sum(dtype=torch.float64)) for x in (mean, squares))
        return total, total_squares, mean.numel()


def load_encoder(
    name: str | None, sizes: Sizes, device: torch.device, dtype: str, store: str
) -> Encoder:
    """The autoencoder of that name, tried on a black picture of the smallest size."""
    types = [getattr(torch, DTYPES[word]) for word in (dtype, store)]
    if name is None:
        return Encoder(PIXELS, None, None, device, *types)
    vae, name = load_vae(name)
    _check_sizes(vae, name, sizes)
    sha256 = weights_sha256(vae)  # before the cast: the same of any dtype
    scale, shift = scale_and_shift(vae)
    if upcasts(vae, types[0]):
        logger.warning(
            "%s is not sound in %s, as its config says: it computes in fp32", name, dtype
        )
        types[0] = torch.float32
    about = Autoencoder(name, type(vae).__name__, sha256, scale, shift)
    vae = vae.to(device).eval().requires_grad_(False)
    if types[0] != torch.float32:
        vae = vae.to(types[0])
    smallest = min(sizes.all, key=math.prod)
    black = torch.zeros(2, 3, *([sizes.frames] if sizes.frames else []), *smallest)
    has_posterior = check_round_trip(vae, name, black.to(device, types[0]) - 1)
    return Encoder(MOMENTS if has_posterior else LATENTS, about, vae, device, *types)


def load_vae(name: str) -> tuple[Any, str]:
    """An autoencoder in float32 by name on the hub or folder, and the name to store.

    The folder, on the hub or here, is its own or that of a pipeline, which has it in `vae`.
    """
    import diffusers

    path, subfolder = Path(name), None
    if path.is_dir():
        if not (path / "config.json").exists() and (path / "vae").is_dir():
            path = path / "vae"
        config, name = read_config(path / "config.json"), str(path.absolute())
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"there is no folder {name} of an autoencoder; give one, or a hub name")
    else:
        config, subfolder = _hub_config(diffusers, name)
    kind = autoencoder_class(name, config)
    try:
        vae, report = kind.from_pretrained(
            str(path) if path.is_dir() else name, subfolder=subfolder,
            dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        if config.get("encoder_type") and isinstance(error, AttributeError):
            reason += "; diffusers wants another version of transformers for its encoder"
        raise ValueError(f"the autoencoder {name} cannot be loaded: {reason}") from error
    absent = sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])})
    if absent:  # diffusers leaves what is missing random
        extra = sorted(report["unexpected_keys"])
        others = f", and has others, such as {extra[0]}" if extra else ""
        raise ValueError(f"{name} lacks {len(absent)} of its weights, such as {absent[0]}{others}")
    return vae, name


def _hub_config(diffusers: Any, name: str) -> tuple[dict[str, Any], str | None]:
    """Config of an autoencoder on the hub, and the subfolder that it is in."""
    from huggingface_hub import try_to_load_from_cache

    for subfolder in (None, "vae"):
        try:
            config = diffusers.AutoencoderKL.load_config(name, subfolder=subfolder)
        except (OSError, ValueError) as caught:
            error: Exception = caught
            fetched = try_to_load_from_cache(name, "vae/config.json")
            if hub_reason(error) is not None and not isinstance(fetched, str):
                break  # it would say the same again, after half a minute of trying
            continue
        if "_class_name" in config:
            return config, subfolder
    raise ValueError(not_fetched(f"the autoencoder {name}", error)) from error


def weights_sha256(model: Any) -> str:
    """Checksum of a model's weights and their names, however they were stored."""
    return digest_of_weights(model, lambda name, x: f"{name} {tuple(x.shape)}")


def _check_sizes(vae: Any, name: str, sizes: Sizes) -> None:
    """Raise a ValueError for pictures or clips that an autoencoder can't take."""
    channels = picture_channels(vae)
    if channels != 3 and not takes_opacity(vae):
        raise ValueError(f"{name} takes pictures of {channels} channels; give one of 3, of colours")
    scale = spatial_scale(vae)
    for height, width in sizes.all:
        if height % scale or width % scale:
            raise ValueError(
                f"pictures of {height}x{width} do not fit {name}, whose latents stand for {scale} "
                f"pixels a side; choose multiples of {scale}"
            )
    if sizes.frames is None:
        return
    if not has_time(vae):
        raise ValueError(
            f"{name} is of pictures, not of clips; give an autoencoder of clips, such as "
            f"Wan-AI/Wan2.1-T2V-1.3B-Diffusers, leave frames out, or store pixels"
        )
    latent_frames(sizes.frames, temporal_scale(vae), "frames")
