"""Checks of what a forward is given, once, at its first lines."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elit._devices import wide


def check_samples(samples: Tensor, model: Any) -> None:
    """Raise a ValueError unless the samples are a tensor of the model's dtype and device."""
    if not isinstance(samples, Tensor) or not samples.ndim:
        raise ValueError(f"hidden_states {samples!r:.60} are no tensor (batch, channels, ...)")
    embed, name = model.patch_embed, type(model).__name__
    weight = embed.weight
    if type(weight) not in (nn.Parameter, Tensor) or weight.element_size() == 1:
        return  # sharded or quantised: what it becomes is not known here
    moves = any(hasattr(m, h) for m in (model, embed) for h in ("_hf_hook", "_diffusers_hook"))
    if samples.device != weight.device and not (moves or weight.is_meta):
        raise ValueError(
            f"hidden_states on {samples.device}, but this {name} is on {weight.device}; "
            f"move one: hidden_states.to({str(weight.device)!r})"
        )
    casts = not samples.is_meta and torch.is_autocast_enabled(samples.device.type)
    can_be_cast = samples.is_floating_point() and samples.element_size() <= 4
    if samples.dtype != weight.dtype and not (casts and can_be_cast):
        raise ValueError(
            f"hidden_states of {samples.dtype}, but this {name} is of {weight.dtype}; "
            f"convert one: hidden_states.to({weight.dtype}), or model.to(...)"
        )


def noise_levels(timestep: Tensor | float, samples: Tensor) -> Tensor:
    """Noise levels (B,) of samples (B, ...), from one for each or one for all."""
    levels = _per_sample(timestep, "timestep", samples)
    if levels.dtype == torch.bool or levels.is_complex():
        raise ValueError(f"timestep of {levels.dtype}; give noise levels from 0 to 1, floats")
    advice = "it is the noise level sigma, of which diffusers' timestep is 1000 times"
    _check_range(levels, 0, 1 + 1e-3, "timestep", advice)
    return levels


def labels_of(labels: Tensor | int, num_classes: int, samples: Tensor) -> Tensor:
    """Class labels (B,) of samples (B, ...), from one for each or one for all."""
    labels = _per_sample(labels, "class_labels", samples)
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"class_labels of {labels.dtype}; give whole numbers in 0..{num_classes}, the last of "
            f"which means no class"
        )
    _check_range(labels, 0, num_classes, "class label", f"{num_classes} means no class")
    return labels


def check_indices(indices: Any, num_latents: int, max_latents: int) -> None:
    """Raise a ValueError unless a tensor names so many latents, each once."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"latent_indices {indices!r:.60} are no tensor of whole numbers, int32 or int64"
        )
    if indices.shape != (num_latents,):
        raise ValueError(
            f"latent_indices of shape {tuple(indices.shape)} do not name num_latents = "
            f"{num_latents} latents; pass num_latents=len(latent_indices)"
        )
    if not _can_look(indices):
        return
    named = indices.tolist()
    if any(not -max_latents <= i < max_latents for i in named):
        raise ValueError(
            f"latent_indices {named!s:.60} are outside 0 ... {max_latents - 1}, the latents of a "
            f"group"
        )
    if len({i % max_latents for i in named}) < len(named):  # -1 is the last
        raise ValueError(f"latent_indices {named!s:.60} name a latent twice; give each once")


def check_text(
    text: Any, mask: Any, pooled: Any, config: Mapping[str, Any], samples: Tensor
) -> Tensor:
    """The text, or a ValueError if it is not one that an MM-DiT of this config takes."""
    width, longest, batch = config["text_dim"], config["max_text_length"], samples.shape[0]
    if text is None:
        raise ValueError(
            "an MMDiT takes encoder_hidden_states, not class_labels; give it a text, as "
            "ElitTextPipeline.encode_prompt makes it"
        )
    allowed = f"({batch}, up to {longest}" + (")" if width is None else f", {width})")
    names = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
    for name, value in zip(names, (text, mask, pooled), strict=True):
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} {value!r:.60} are no tensor; a text is {allowed}")
        if value is not None and value.device != samples.device:
            raise ValueError(
                f"{name} on {value.device}, but the samples are on {samples.device}; move one"
            )
    shape, num_axes = tuple(text.shape), 2 if width is None else 3
    if len(shape) != num_axes or shape[0] != batch or (width is not None and shape[2] != width):
        raise ValueError(f"a text of shape {shape} does not fit; this model takes {allowed}")
    if shape[1] > longest:
        raise ValueError(
            f"a text of {shape[1]} tokens is too long; this model takes {longest} at most"
        )
    if width is None and text.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"a text of {text.dtype}; this model takes numbers of words, int64")
    if width is None:
        _check_range(text, 0, config["vocab_size"] - 1, "word", "see the tokenizer's size")
    elif not text.is_floating_point():
        raise ValueError(f"a text of {text.dtype}; this model takes states of an encoder, floats")
    if mask is not None and (mask.shape != shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"encoder_attention_mask of {tuple(mask.shape)} {mask.dtype} does not fit a text "
            f"of {shape}; give {shape[:2]} bool, False for padding"
        )
    size = None if config["pooled_dim"] is None else (batch, config["pooled_dim"])
    pooled_size = None if pooled is None else tuple(pooled.shape)
    if pooled_size != size:
        raise ValueError(
            f"pooled_projections of shape {pooled_size} do not fit; this model takes "
            f"{'none' if size is None else size}"
        )
    return text


def _per_sample(value: Any, name: str, samples: Tensor) -> Tensor:
    """Numbers (B,) of samples (B, ...), from one for each or one for all."""
    if value is None:
        raise ValueError(f"{name} is None; give one number for each sample, or one for all")
    try:
        value = torch.as_tensor(value, device=samples.device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name} {value!r:.60} is no number; give one for each sample, or one for all"
        ) from None
    batch = samples.shape[0]
    if tuple(value.shape) not in ((), (1,), (batch,)):
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} does not fit a batch of {batch}; "
            f"give one number for each sample"
        )
    return value.expand(batch)


def _check_range(value: Tensor, low: float, high: float, name: str, advice: str) -> None:
    """Raise a ValueError if a number is outside, or none, where it can be looked at."""
    if not _can_look(value) or not value.numel():
        return
    numbers = value.detach().to(**wide(value.device)).numpy()
    least, most = numbers.min(), numbers.max()
    if not (low <= least and most <= high):  # nor NaN
        wrong = least if not low <= least else most
        raise ValueError(f"{name} {wrong:g} is outside {low:g} ... {high:g}; {advice}")


def _can_look(value: Tensor) -> bool:
    """Say whether looking at values neither makes a device wait nor cuts a compiled graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    is_plain = type(value) is Tensor and not torch._C._functorch.is_batchedtensor(value)
    return is_plain and value.device.type == "cpu"
