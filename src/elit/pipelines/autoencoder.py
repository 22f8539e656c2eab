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


def decode(vae: Any, samples: Tensor) -> Tensor:
    """Pictures in [-1, 1] of samples (B, C, h, w), or clips of (B, C, t, h, w)."""
    config = vae.config
    mean = getattr(config, "latents_mean", None)
    if mean is not None:  # a mean and a scale for each channel
        shape = (1, -1, *(1,) * (samples.ndim - 2))
        std = torch.tensor(config.latents_std, device=samples.device, dtype=samples.dtype)
        mean = torch.tensor(mean, device=samples.device, dtype=samples.dtype)
        samples = samples * std.view(shape) + mean.view(shape)
    else:
        samples = samples / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    return vae.decode(samples.to(vae.dtype), return_dict=False)[0]
