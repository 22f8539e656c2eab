"""Tiny random diffusers transformers and inputs for them: real classes, small numbers."""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import elit


@dataclass(frozen=True)
class Foreign:
    """A tiny transformer of six blocks: how to make it, what to give it, how to cut it."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    group: tuple[int, ...]
    grid: tuple[int, ...]
    depth: int = 6


def qwen() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=6, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def qwen_inputs(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[-1, 3:] = False
    return {
        "hidden_states": torch.randn(batch, 32, 16),
        "timestep": torch.linspace(0.9, 0.3, batch),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, 8, 4)]] * batch,
    }


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=3, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip


def flux_inputs(batch: int) -> dict[str, Any]:
    ids = torch.zeros(8, 4, 3)
    ids[..., 1] += torch.arange(8.0)[:, None]
    ids[..., 2] += torch.arange(4.0)
    return {
        "hidden_states": torch.randn(batch, 32, 16),
        "timestep": torch.linspace(0.9, 0.3, batch),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "pooled_projections": torch.randn(batch, 8),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=6, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=32,
        pooled_projection_dim=8, out_channels=4, pos_embed_max_size=16,
        dual_attention_layers=(0, 2),
    )  # fmt: skip


def sd3_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 16, 8),
        "timestep": torch.linspace(900, 300, batch),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "pooled_projections": torch.randn(batch, 8),
    }


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=6,
        norm_num_groups=4, sample_size=16, patch_size=2, num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate", norm_elementwise_affine=False,
    )  # fmt: skip


def dit_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 16, 16),
        "timestep": torch.linspace(900, 300, batch).long(),
        "class_labels": torch.arange(batch),
    }


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=6,
        cross_attention_dim=32, sample_size=16, patch_size=2, caption_channels=12,
        use_additional_conditions=False, norm_num_groups=4, attention_bias=True,
    )  # fmt: skip


def pixart_inputs(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 5)
    mask[-1, 3:] = 0
    return {
        "hidden_states": torch.randn(batch, 4, 16, 8),
        "timestep": torch.linspace(900, 300, batch).long(),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, text_dim=12, freq_dim=16, ffn_dim=48, num_layers=6, rope_max_seq_len=32,
    )  # fmt: skip


def wan_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 4, 16, 8),
        "timestep": torch.linspace(900, 300, batch),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
    }


def wan_per_token_inputs(batch: int) -> dict[str, Any]:
    """Wan 2.2 TI2V: a noise level for each token."""
    levels = torch.linspace(0, 900, 4).repeat_interleave(32).expand(batch, -1)
    return wan_inputs(batch) | {"timestep": levels}


def flux2() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=3, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def flux2_inputs(batch: int) -> dict[str, Any]:
    given = flux_inputs(batch)
    del given["pooled_projections"]
    ids = torch.zeros(32, 4)
    ids[:, 1:3] = given["img_ids"][:, 1:]
    return given | {"img_ids": ids, "txt_ids": torch.zeros(5, 4)}


def cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=12, num_layers=6, sample_width=8, sample_height=16,
        sample_frames=13, max_text_seq_length=5, use_rotary_positional_embeddings=True,
    )  # fmt: skip


def cogvideox_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 4, 16, 8),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "timestep": torch.linspace(900, 300, batch).long(),
        "image_rotary_emb": (torch.randn(128, 16), torch.randn(128, 16)),
    }


def mochi() -> nn.Module:
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=6, pooled_projection_dim=8,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=5,
    )  # fmt: skip


def mochi_inputs(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[-1, 3:] = False
    text = torch.randn(batch, 5, 16)
    return wan_inputs(batch) | {"encoder_hidden_states": text, "encoder_attention_mask": mask}


def ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=6, caption_channels=12,
    )  # fmt: skip


def ltx_inputs(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 5)
    mask[-1, 3:] = 0
    return {
        "hidden_states": torch.randn(batch, 128, 4),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "timestep": torch.linspace(900, 300, batch),
        "encoder_attention_mask": mask,
        "num_frames": 4, "height": 8, "width": 4,
    }  # fmt: skip


def cogview4() -> nn.Module:
    return diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=6, attention_head_dim=16, num_attention_heads=2,
        text_embed_dim=12, time_embed_dim=8, condition_dim=4, rope_axes_dim=(16, 16),
    )  # fmt: skip


def cogview4_inputs(batch: int) -> dict[str, Any]:
    size = torch.tensor([[128.0, 64.0]] * batch)
    return {
        "hidden_states": torch.randn(batch, 4, 16, 8),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "timestep": torch.linspace(900, 300, batch),
        "original_size": size, "target_size": size, "crop_coords": torch.zeros(batch, 2),
    }  # fmt: skip


def ours() -> nn.Module:
    model = elit.DiT(
        sample_size=16, in_channels=3, patch_size=2, hidden_size=32, num_heads=2, depth=6,
        num_classes=5,
    )  # fmt: skip
    return awake(model)


def awake(model: nn.Module) -> nn.Module:
    """A model of ours whose gates, zero at first, let every block act."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
    return model


def ours_sit() -> nn.Module:
    return awake(elit.SiT(sample_size=16, in_channels=3, patch_size=2, hidden_size=32, num_heads=2,
                          depth=6, num_classes=5))  # fmt: skip


def ours_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 3, 16, 8),
        "timestep": torch.linspace(0.9, 0.3, batch),
        "class_labels": torch.arange(batch),
    }


FOREIGN = {
    "qwen": Foreign(qwen, qwen_inputs, (4, 4), (8, 4)),
    "flux": Foreign(flux, flux_inputs, (4, 4), (8, 4)),
    "sd3": Foreign(sd3, sd3_inputs, (4, 4), (8, 4)),
    "dit": Foreign(dit, dit_inputs, (4, 4), (8, 8)),
    "pixart": Foreign(pixart, pixart_inputs, (4, 4), (8, 4)),
    "wan": Foreign(wan, wan_inputs, (2, 4, 2), (4, 8, 4)),
    "wan-per-token": Foreign(wan, wan_per_token_inputs, (2, 4, 2), (4, 8, 4)),
    "flux2": Foreign(flux2, flux2_inputs, (4, 4), (8, 4)),
    "cogvideox": Foreign(cogvideox, cogvideox_inputs, (2, 4, 2), (4, 8, 4)),
    "mochi": Foreign(mochi, mochi_inputs, (2, 4, 2), (4, 8, 4)),
    "ltx": Foreign(ltx, ltx_inputs, (2, 4, 2), (4, 8, 4)),
    "cogview4": Foreign(cogview4, cogview4_inputs, (4, 4), (8, 4)),
    "ours": Foreign(ours, ours_inputs, (4, 4), (8, 4)),
    "ours-sit": Foreign(ours_sit, ours_inputs, (4, 4), (8, 4)),
}


# Those that the default tests run on; the rest are `slow`.
QUICK = ("qwen", "flux", "sd3", "dit", "wan", "ours")


def some(names: Iterable[str], quick: Container[str] = QUICK) -> list[Any]:
    """Names as parameters of a test, all but the quick ones marked slow."""
    slow = pytest.mark.slow
    return [name if name in quick else pytest.param(name, marks=slow) for name in names]


def make(name: str) -> nn.Module:
    """A transformer with weights that depend on its name alone, ready to compare."""
    torch.manual_seed(sum(map(ord, name)))
    return FOREIGN[name].make().eval()


def inputs(name: str, batch: int = 2) -> dict[str, Any]:
    """Inputs for it."""
    torch.manual_seed(1)
    return FOREIGN[name].inputs(batch)


def double(values: Any) -> Any:
    """The same in float64."""
    if isinstance(values, dict):
        return {key: double(value) for key, value in values.items()}
    is_float = isinstance(values, torch.Tensor) and values.is_floating_point()
    return values.double() if is_float else values
