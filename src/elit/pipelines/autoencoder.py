"""What pipelines need to know of diffusers' autoencoders, of images and of clips."""

from typing import Any

import torch
from torch import Tensor


def spatial_scale(vae: Any) -> int:
    """Pixels per element of the VAE latents along each axis; 1 without a VAE."""
    if vae is None:
        return 1
    # AutoencoderDC and those of clips have it
    compression = getattr(vae, "spatial_compression_ratio", None)
    return compression or 2 ** (len(vae.config.block_out_channels) - 1)


def has_time(vae: Any) -> bool:
    """Whether an autoencoder is of clips: its weights have three axes of space and time."""
    return any(parameter.ndim == 5 for parameter in vae.parameters())


def temporal_scale(vae: Any) -> int:
    """Frames per element of the VAE latents in time, the first frame having one of its own."""
    if vae is None:
        return 1
    found = getattr(vae, "temporal_compression_ratio", None)  # of LTX and Hunyuan
    found = found or getattr(vae.config, "scale_factor_temporal", None)  # of Wan
    return found or getattr(vae.config, "temporal_compression_ratio", None) or 1


def latent_frames(frames: int, scale: int, name: str = "num_frames") -> int:
    """Length in time of the VAE latents of a clip, or a ValueError if no length is its own."""
    if (frames - 1) % scale:
        nearest = (frames - 1) // scale * scale + 1
        raise ValueError(
            f"{name}={frames} is not a multiple of {scale}, the VAE's scale in time, and "
            f"one more; use {nearest} or {nearest + scale}"
        )
    return (frames - 1) // scale + 1


def decode(vae: Any, samples: Tensor) -> Tensor:
    """Pictures in [-1, 1] of samples (B, C, h, w), or clips of (B, C, t, h, w).

    As in diffusers' pipelines: latents / scaling_factor + shift_factor, or, where the autoencoder
    knows a mean and a scale of each channel, latents * std / scaling_factor + mean.
    """
    samples = samples / (getattr(vae.config, "scaling_factor", None) or 1.0)
    mean, std = (_of_channels(vae, name, samples) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        samples = samples * std + mean
    else:
        samples = samples + (getattr(vae.config, "shift_factor", None) or 0.0)
    return vae.decode(samples.to(vae.dtype), return_dict=False)[0]


def _of_channels(vae: Any, name: str, like: Tensor) -> Tensor | None:
    """A number for each channel, (1, C, 1, 1...), from the config or, as LTX has it, a buffer."""
    numbers = getattr(vae.config, name, None)
    if numbers is None:
        numbers = dict(vae.named_buffers()).get(name)
    if numbers is None:
        return None
    numbers = torch.as_tensor(numbers, device=like.device, dtype=like.dtype)
    return numbers.view(1, -1, *(1,) * (like.ndim - 2))


def encode(vae: Any, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and log-variance of pictures (B, C, H, W), or clips (B, C, T, H, W), in [-1, 1].

    The log-variance is None where an autoencoder has no posterior. What `decode` takes is
    (draw - shift) * scale, with the numbers of `scale_and_shift`.
    """
    of_pictures = has_time(vae) and pictures.ndim == 4  # Qwen-Image's is of clips
    encoded = vae.encode(pictures[:, :, None] if of_pictures else pictures)
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is not None:
        mean, logvar = posterior.mean, posterior.logvar
    else:
        mean, logvar = encoded[0], None
    if of_pictures:
        mean, logvar = mean[:, :, 0], None if logvar is None else logvar[:, :, 0]
    return mean, logvar


def scale_and_shift(vae: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Numbers, one or one for each channel, that make latents of draws: (draw - shift) * scale."""
    factor = getattr(vae.config, "scaling_factor", None) or 1.0
    like = torch.empty(1, 1, 1)
    mean, std = (_of_channels(vae, name, like) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        return tuple((factor / std).flatten().tolist()), tuple(mean.flatten().tolist())
    return (factor,), (getattr(vae.config, "shift_factor", None) or 0.0,)
