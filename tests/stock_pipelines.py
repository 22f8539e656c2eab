"""Stock diffusers pipelines around tiny random transformers: real classes, no text encoders."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from retrofit_models import make


@dataclass(frozen=True)
class Stock:
    """A stock pipeline."""

    transformer: str  # its name in `FOREIGN`
    build: Callable[[Any], Any]  # makes the pipeline of a transformer
    inputs: Callable[[], dict[str, Any]]  # its arguments without guidance
    guided: Callable[[], dict[str, Any]]  # those that switch guidance on
    unguided: dict[str, Any]  # those that switch it off
    calls: tuple[str, ...] = ("both",)  # of a guided step: "cond", "uncond", or both in one batch
    text_in_core: int = 0  # tokens of the text that the core's blocks get in one tensor
    extra: dict[str, Any] = field(default_factory=dict)  # more arguments


def text(seed: int = 1, width: int = 12) -> torch.Tensor:
    """Embeddings (1, 5, width) of a text."""
    return torch.randn(1, 5, width, generator=torch.Generator().manual_seed(seed))


def pooled(seed: int) -> torch.Tensor:
    """A pooled embedding (1, 8) of a text."""
    return torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))


def _euler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _without(kind: Any, scheduler: Any, *absent: str) -> Callable[[Any], Any]:
    names = ("vae", "text_encoder", "tokenizer", *absent)
    return lambda model: kind(transformer=model, scheduler=scheduler(), **dict.fromkeys(names))


def tiny_vae() -> Any:
    """An autoencoder of images that divides the side by 8."""
    torch.manual_seed(3)
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip


MASK, CLIP = torch.ones(1, 5, dtype=torch.long), {"num_frames": 13, "height": 128, "width": 64}
IMAGE, OFF = {"height": 128, "width": 64}, {"guidance_scale": 1.0}
APART = {"calls": ("cond", "uncond")}


def prompt(dim: int = 12, mask: torch.Tensor | None = None, **more: Any) -> Callable[[], dict]:
    """Arguments of a text, and more."""
    masks = {} if mask is None else {"prompt_attention_mask": mask}
    return lambda: {"prompt_embeds": text(1, dim)} | masks | more


def away(
    dim: int = 12, mask: torch.Tensor | None = None, scale: str = "guidance_scale", **more: Any
) -> Callable[[], dict]:
    """Arguments of guidance away from another text, and more."""
    masks = {} if mask is None else {"negative_prompt_attention_mask": mask}
    return lambda: {"negative_prompt_embeds": text(2, dim), scale: 3.0} | masks | more


POOLED = {"pooled_prompt_embeds": pooled(1)}
AWAY_POOLED = {"negative_pooled_prompt_embeds": pooled(2)}
STOCK = {
    "qwen": Stock(
        "qwen", _without(diffusers.QwenImagePipeline, _euler), prompt(**IMAGE),
        away(scale="true_cfg_scale"), {}, **APART,
    ),
    "flux": Stock(
        "flux", _without(diffusers.FluxPipeline, _euler, "text_encoder_2", "tokenizer_2"),
        prompt(**POOLED, **IMAGE), away(scale="true_cfg_scale", **AWAY_POOLED), {}, **APART,
    ),
    "wan": Stock(
        "wan", _without(diffusers.WanPipeline, _euler), prompt(**CLIP), away(), OFF, **APART
    ),
    "sd3": Stock(
        "sd3",
        _without(
            diffusers.StableDiffusion3Pipeline, _euler,
            "text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3",
        ),
        prompt(**POOLED, **IMAGE), away(**AWAY_POOLED), OFF,
    ),
    "dit": Stock(
        "dit",
        lambda model: diffusers.DiTPipeline(model, tiny_vae(), diffusers.DDIMScheduler()),
        lambda: {"class_labels": [3]}, lambda: {"guidance_scale": 3.0}, OFF,
        extra={"output_type": "np"},
    ),
    "pixart": Stock(
        "pixart", _without(diffusers.PixArtAlphaPipeline, diffusers.DDIMScheduler),
        prompt(mask=MASK, negative_prompt=None, **IMAGE, use_resolution_binning=False),
        away(mask=MASK), OFF,
    ),
}  # fmt: skip

MORE = {
    "ltx": Stock(
        "ltx", _without(diffusers.LTXPipeline, _euler),
        prompt(mask=MASK.bool(), num_frames=25, height=256, width=128), away(mask=MASK.bool()), OFF,
    ),
    "cogvideox": Stock(
        "cogvideox", _without(diffusers.CogVideoXPipeline, diffusers.CogVideoXDDIMScheduler),
        prompt(**CLIP), away(), OFF,
    ),
    "mochi": Stock(
        "mochi", _without(diffusers.MochiPipeline, _euler),
        prompt(16, MASK.bool(), **CLIP | {"num_frames": 19}), away(16, MASK.bool()), OFF,
    ),
    "cogview4": Stock(
        "cogview4", _without(diffusers.CogView4Pipeline, _euler), prompt(**IMAGE), away(), OFF,
        **APART,
    ),
}  # fmt: skip
ALL = STOCK | MORE


def build(name: str, transformer: Any = None) -> Any:
    """The pipeline, quiet."""
    stock = ALL[name]
    pipe = stock.build(make(stock.transformer) if transformer is None else transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(
    pipe: Any,
    name: str,
    guided: bool = True,
    steps: int = 2,
    batch: int = 1,
    only: int = 0,
    **kwargs: Any,
) -> torch.Tensor:
    """What it draws: latents, or a picture where it can't give them.

    Args:
        batch: how many prompts, the same one with another noise each.
        only: which of them to draw, where the batch is 1.
    """
    stock = ALL[name]
    arguments = stock.inputs() | (stock.guided() if guided else stock.unguided)
    arguments |= {"output_type": "latent"} | stock.extra | kwargs
    if batch > 1:
        arguments = {name: _repeat(value, batch) for name, value in arguments.items()}
    seeds = range(batch) if batch > 1 else (only,)
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = pipe(**arguments, num_inference_steps=steps, generator=generator)[0]
    return torch.as_tensor(output)


def _repeat(value: Any, batch: int) -> Any:
    if isinstance(value, list):
        return value * batch
    return value.repeat_interleave(batch, 0) if isinstance(value, torch.Tensor) else value
