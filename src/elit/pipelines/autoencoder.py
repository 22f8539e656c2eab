"""What pipelines and `elit prepare` need to know of diffusers' autoencoders of images and clips."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from elit._choices import nearest
from elit._extras import missing
from elit._numbers import latent_frames

# Classes that encode, but not in a way that latents of images or clips are decoded from alone
UNFIT = {
    "AutoencoderKLAllegro": "it works in tiles alone",
    "AutoencoderKLHunyuanImageRefiner": "it is made for refining pictures, not for clips",
    "AutoencoderKLMiniMaxH3": "it cuts clips into overlapping pieces of a length of its own",
    "AutoencoderKLTemporalDecoder": "it makes clips from the latents of pictures",
    "AutoencoderVidTok": "its clips come back shorter",
    "RFD4ProteinaAutoencoder": "it is of proteins",
    "UniDiffuserTextDecoder": "it is of texts",
    **dict.fromkeys((
        "AutoencoderKLKVAEAudio", "AutoencoderKLLTX2Audio", "AutoencoderKLMiniMaxH3Audio",
        "AutoencoderOobleck", "AutoencoderSAME", "Cosmos3AVAEAudioTokenizer",
        "LongCatAudioDiTVae", "MMAudioVAE",
    ), "it is of sound"),
}  # fmt: skip


class SamplesDivergedError(ValueError):
    """Sampling or decoding ended in numbers that are not finite."""


def check_usable(kind: str, config: Any) -> None:
    """Raise a ValueError for a class, or a config of it, that latents can't go through."""
    reason = UNFIT.get(kind)
    if config.get("timestep_conditioning"):
        reason = "its decoder takes a time step, which pipelines here don't give it"
    if reason is not None:
        raise ValueError(f"a {kind} cannot be used here: {reason}; give another autoencoder")


def autoencoder_class(name: Any, config: Any) -> Any:
    """The class that an autoencoder's config names, or a ValueError with the name of its folder."""
    import diffusers

    kind = str(config.get("_class_name"))
    found = getattr(diffusers, kind, None)
    if not hasattr(found, "encode"):
        near = nearest(kind, (n for n in dir(diffusers) if n.startswith("Autoencoder")))
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(
            f"{name} holds a {kind}, which is no autoencoder of diffusers{hint}; give the folder "
            f"of one, or of a pipeline"
        )
    check_usable(kind, config)
    if kind == "AutoencoderRAE" and find_spec("transformers") is None:
        raise ValueError(missing(f"the encoder of {name} needs transformers", "text"))
    return found


def spatial_scale(vae: Any) -> int:
    """Pixels per element of the VAE latents along each axis; 1 without a VAE."""
    if vae is None:
        return 1
    config = vae.config
    if _is_rae(vae):
        return config.patch_size
    found = _told(vae, "scale_factor_spatial", "spatial_compression_ratio")
    if not found:
        levels = config.get("block_out_channels") or config.get("ch_mult")
        if not levels:
            raise ValueError(
                f"a {type(vae).__name__} does not say how many pixels its latents stand for; give "
                f"another autoencoder"
            )
        found = 2 ** (len(levels) - 1)
    return found * _packed(vae)


def picture_channels(vae: Any) -> int:
    """Channels of the pictures that an autoencoder makes."""
    config = vae.config
    names = ("out_channels", "out_ch", "input_channels")
    found = next(filter(None, map(config.get, names)), 3)
    if type(vae).__name__ in ("AutoencoderKLWan", "AutoencoderKLQwenImage21"):
        found //= (config.patch_size or 1) ** 2  # of squares of pixels, as of Wan 2.2
    return found


def takes_opacity(vae: Any) -> bool:
    """Whether pictures have opacity as a fourth channel, as Qwen-Image 2.1's and Layered's do."""
    return "QwenImage" in type(vae).__name__ and picture_channels(vae) == 4


def has_time(vae: Any) -> bool:
    """Whether an autoencoder takes clips: it has weights or scales of space and time."""
    if vae.config.get("temperal_downsample"):  # of Wan and Qwen-Image, as diffusers spells it
        return True
    return any(parameter.ndim == 5 for parameter in vae.parameters())


def temporal_scale(vae: Any) -> int:
    """Frames per element of the VAE latents in time, the first frame having one of its own."""
    if vae is None:
        return 1
    names = ("scale_factor_temporal", "temporal_compression_ratio", "temporal_compress_times")
    return _told(vae, *names) or 2 ** sum(vae.config.get("temperal_downsample") or ())


def _told(vae: Any, *names: str) -> int | None:
    """What an autoencoder's config says or, as of LTX and AutoencoderDC, an attribute."""
    found = (vae.config.get(name) or vars(vae).get(name) for name in names)
    return next(filter(None, found), None)


def decode(vae: Any, samples: Tensor, finite: bool = True) -> Tensor:
    """Pictures in [-1, 1] of samples (B, C, h, w), or clips of (B, C, t, h, w).

    As in diffusers' pipelines, by the numbers of `scale_and_shift`.

    Raises:
        ValueError: if the autoencoder can't take them, or makes another size of them.
        SamplesDivergedError: if the pictures are to be `finite` and are not.
    """
    name = type(vae).__name__
    *time, height, width = samples.shape[2:]
    size, length = spatial_scale(vae), temporal_scale(vae)
    wanted = [*((t - 1) * length + 1 for t in time), height * size, width * size]
    alone = _goes_in_alone(vae, samples, *wanted[-2:])
    scale, shift = (_of_channels(n, samples, name) for n in scale_and_shift(vae))
    latents = samples / scale + shift
    if _packed(vae) > 1:
        latents = pixel_shuffle(latents, _packed(vae))  # (B, C, h, w)
    with _computing(vae) as dtype:
        found = vae.decode((latents[:, :, None] if alone else latents).to(dtype))
    decoded = getattr(found, "sample", found)
    decoded = decoded[:, :, 0] if alone else decoded
    if takes_opacity(vae):
        decoded = decoded[:, :3]
    if _is_rae(vae):  # its pictures are in [0, 1]
        decoded = decoded * 2 - 1
    _check_shape(name, "decodes latents", samples, decoded, wanted)
    if finite and not decoded.isfinite().all():
        helps = "look at its weights" if dtype == torch.float32 else "load it in float32"
        word = str(dtype).removeprefix("torch.")
        raise SamplesDivergedError(
            f"the {name} makes pictures that are not finite in {word}; {helps}"
        )
    return decoded


def encode(vae: Any, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and log-variance of pictures (B, C, H, W), or clips (B, C, T, H, W), in [-1, 1].

    The log-variance is None where an autoencoder has no posterior. What `decode` takes is
    (draw - shift) * scale, with the numbers of `scale_and_shift`.
    """
    *time, height, width = pictures.shape[2:]
    size, length = spatial_scale(vae), temporal_scale(vae)
    alone = _goes_in_alone(vae, pictures, height, width)
    given = pictures / 2 + 0.5 if _is_rae(vae) else pictures
    if takes_opacity(vae):
        given = torch.cat((given, torch.ones_like(given[:, :1])), dim=1)
    with _computing(vae) as dtype:
        encoded = vae.encode((given[:, :, None] if alone else given).to(dtype))
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:
        found = [encoded[0]]
    elif hasattr(posterior, "logvar"):
        found = [posterior.mean, posterior.logvar]
    else:
        found = [posterior.mode()]  # Cosmos's is one point
    if alone:
        found = [x[:, :, 0] for x in found]
    if _packed(vae) > 1:
        found = [pixel_unshuffle(x, _packed(vae)) for x in found]
    wanted = [*(latent_frames(t, length, "frames") for t in time), height // size, width // size]
    _check_shape(type(vae).__name__, "encodes pictures", pictures, found[0], wanted)
    return found[0], found[1] if len(found) > 1 else None


def check_round_trip(vae: Any, name: str, pictures: Tensor) -> bool:
    """Whether an autoencoder has a posterior; a ValueError if it can't do what is asked of it.

    Args:
        vae: that is tried.
        name: of its folder.
        pictures: as `encode` takes them; decoded is a corner of their latents.
    """
    try:
        with torch.inference_mode():
            mean, logvar = encode(vae, pictures)
            corner = mean if _is_rae(vae) else mean[..., :4, :4]
            decode(vae, torch.zeros_like(corner).float(), finite=False)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the autoencoder {name} cannot be used: {reason}") from error
    return logvar is not None


def scale_and_shift(vae: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Numbers, one or one for each channel, that make latents of draws: (draw - shift) * scale.

    From the config or, as LTX and Flux 2 have them, from buffers.
    """
    config = vae.config
    if _is_rae(vae):  # it scales by itself
        return (1.0,), (0.0,)
    factor, shift = config.get("scaling_factor"), config.get("shift_factor")
    factor = 1.0 if factor is None else factor
    if type(vae).__name__ == "AutoencoderKLFlux2":
        mean = vae.bn.running_mean
        std = (vae.bn.running_var.float() + config.batch_norm_eps).sqrt()
    else:
        buffers = dict(vae.named_buffers(recurse=False))
        mean, std = (
            buffers.get(name) if config.get(name) is None else torch.tensor(config[name])
            for name in ("latents_mean", "latents_std")
        )
    scales, shifts = (factor,), (shift or 0.0,)
    if mean is not None and std is not None:
        scales, shifts = (tuple(x.flatten().tolist()) for x in (factor / std.float(), mean))
    if not all(math.isfinite(x) for x in (*scales, *shifts)) or 0 in scales:
        raise ValueError(
            f"the {type(vae).__name__} scales its latents by {min(scales)} to {max(scales)}, which "
            f"can't be undone; look at scaling_factor, latents_mean and latents_std in its config"
        )
    return scales, shifts


def decoding_in_words(vae: Any) -> str:
    """What a program must do to samples that are to be decoded as by `decode`."""
    words = "it decodes samples / scale + shift"
    if _packed(vae) > 1:
        words += f", after torch's pixel_shuffle by {_packed(vae)}"
    return words + (", to pictures in [0, 1]" if _is_rae(vae) else "")


def check_same_latents(vae: Any, about: Any, name: str) -> None:
    """Raise a ValueError unless an autoencoder scales its latents as when data were encoded.

    Args:
        vae: that is to decode them, or whose latents a model draws.
        about: what the manifest says of the one that encoded them; None of pixels.
        name: of the data.
    """
    if vae is None or about is None:
        return
    pairs = zip(scale_and_shift(vae), (about.scale, about.shift), strict=True)
    if not all(  # within what the statistics lose in bfloat16
        len(own) == len(given)
        and all(math.isclose(*x, rel_tol=0.01) for x in zip(own, given, strict=True))
        for own, given in pairs
    ):
        raise ValueError(
            f"the {type(vae).__name__} does not scale latents as the {about.class_name} "
            f"{about.name} did when {name} was encoded: use that one, prepare the data anew, or "
            f"look at scaling_factor, shift_factor, latents_mean and latents_std in its config"
        )


def upcasts(vae: Any, dtype: torch.dtype) -> bool:
    """Whether an autoencoder is known to fail in a dtype, so that it computes in float32.

    By its config; and diffusers numbers the patches of an AutoencoderRAE's MAE in the dtype of the
    pictures, which must hold each number.
    """
    if _is_rae(vae) and vae.config.encoder_type == "mae":
        return vae.num_patches > 2 / torch.finfo(dtype).eps + 1
    return dtype == torch.float16 and bool(vae.config.get("force_upcast"))


@contextmanager
def _computing(vae: Any) -> Iterator[torch.dtype]:
    """The dtype that an autoencoder computes in meanwhile."""
    before = vae.dtype
    if type(vae).__name__ == "AutoencoderKLHunyuanVideo15":  # fails on more than one at once
        vae.enable_slicing()
    if not upcasts(vae, before):
        yield before
        return
    vae.to(torch.float32)
    try:
        yield torch.float32
    finally:
        vae.to(before)


def _is_rae(vae: Any) -> bool:
    return type(vae).__name__ == "AutoencoderRAE"


def check_picture_size(vae: Any, height: int, width: int) -> None:
    """Raise a ValueError for pictures of a size that an autoencoder neither takes nor makes.

    An AutoencoderRAE scales whatever it is given to its own size, and gives that back.
    """
    if _is_rae(vae) and (height, width) != (vae.decoder_image_size,) * 2:
        side = vae.decoder_image_size
        raise ValueError(
            f"this AutoencoderRAE is of pictures of {side}x{side} alone, not of {height}x{width}"
        )


def _goes_in_alone(vae: Any, given: Tensor, height: int, width: int) -> bool:
    """Whether pictures go in as clips of one frame, or a ValueError if they can't at all."""
    check_usable(type(vae).__name__, vae.config)
    check_picture_size(vae, height, width)
    return given.ndim == 4 and has_time(vae)  # Qwen-Image's is of clips


def _packed(vae: Any) -> int:
    """Side of the squares of latents that are one, as Flux 2's transformer takes them."""
    return vae.config.patch_size[0] if type(vae).__name__ == "AutoencoderKLFlux2" else 1


def _of_channels(numbers: Sequence[float], like: Tensor, name: str) -> Tensor:
    """A number for each channel, (1, C, 1, 1...)."""
    if len(numbers) not in (1, like.shape[1]):
        raise ValueError(
            f"the {name} scales {len(numbers)} channels, but the latents have {like.shape[1]}; "
            f"look at latents_mean and latents_std in its config, or give another autoencoder"
        )
    column = torch.tensor(numbers, device=like.device, dtype=like.dtype)
    return column.view(1, -1, *(1,) * (like.ndim - 2))


def _check_shape(name: str, does: str, given: Tensor, found: Tensor, wanted: list[int]) -> None:
    if list(found.shape[2:]) != wanted:
        sizes = ("x".join(map(str, x)) for x in (given.shape[2:], found.shape[2:], wanted))
        raise ValueError(
            "the {} {} of {} to {}, not to {}; give another size or autoencoder".format(
                name, does, *sizes
            )
        )
