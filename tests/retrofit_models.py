"""Tiny random diffusers transformers and inputs for them: real classes, small numbers."""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import elit
from elit import elasticize

HEAD, TAIL = 2, 1  # of what `elastic` makes


@dataclass(frozen=True)
class Foreign:
    """A tiny transformer of six blocks: how to make it, what to give it, how to cut it."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    group: tuple[int, ...]
    grid: tuple[int, ...]
    depth: int = 6


def of_diffusers(name: str, **config: Any) -> Callable[[], nn.Module]:
    """Makes a transformer of six blocks, unless its config says otherwise."""
    usual = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 6}
    return lambda: getattr(diffusers, name)(**usual | config)


def given(
    *shape: int, levels: tuple[float, float] = (900, 300), text: int = 12, **more: Any
) -> Callable[[int], dict[str, Any]]:
    """Inputs of a batch: samples of a shape, levels, a text that wide; more by the batch's size."""

    def make_inputs(batch: int) -> dict[str, Any]:
        values: dict[str, Any] = {"hidden_states": torch.randn(batch, *shape)}
        values["timestep"] = torch.linspace(*levels, batch)
        if text:
            values["encoder_hidden_states"] = torch.randn(batch, 5, text)
        return values | {name: value(batch) for name, value in more.items()}

    return make_inputs


def whole(batch: int) -> torch.Tensor:
    """Levels as whole numbers."""
    return torch.linspace(900, 300, batch).long()


def mask(dtype: torch.dtype = torch.float32) -> Callable[[int], torch.Tensor]:
    """Two words less in the last text."""

    def make_mask(batch: int) -> torch.Tensor:
        found = torch.ones(batch, 5, dtype=dtype)
        found[-1, 3:] = 0
        return found

    return make_mask


def pooled(batch: int) -> torch.Tensor:
    return torch.randn(batch, 8)


def places(axes: int) -> Callable[[int], torch.Tensor]:
    """Rows and columns of 8x4 tokens, among so many axes."""

    def make_places(batch: int) -> torch.Tensor:
        ids = torch.zeros(8, 4, axes)
        ids[..., 1] += torch.arange(8.0)[:, None]
        ids[..., 2] += torch.arange(4.0)
        return ids.flatten(0, 1)

    return make_places


def awake(model: nn.Module) -> nn.Module:
    """A model of ours whose gates, zero at first, let every block act."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
    return model


def of_ours(kind: type) -> Callable[[], nn.Module]:
    sizes = {"sample_size": 16, "in_channels": 3, "patch_size": 2, "hidden_size": 32}
    return lambda: awake(kind(**sizes, num_heads=2, depth=6, num_classes=5))


FLUX = {"patch_size": 1, "in_channels": 16, "num_layers": 3, "num_single_layers": 3,
        "joint_attention_dim": 12}  # fmt: skip
WAN = of_diffusers(
    "WanTransformer3DModel", patch_size=(1, 2, 2), in_channels=4, out_channels=4, text_dim=12,
    freq_dim=16, ffn_dim=48, rope_max_seq_len=32,
)  # fmt: skip
OF_FLUX = {"levels": (0.9, 0.3), "guidance": lambda batch: torch.full((batch,), 3.5)}
OF_OURS = given(3, 16, 8, levels=(0.9, 0.3), text=0, class_labels=torch.arange)
IMAGE, CLIP = ((4, 4), (8, 4)), ((2, 4, 2), (4, 8, 4))  # group and grid
FOREIGN = {
    "qwen": Foreign(
        of_diffusers("QwenImageTransformer2DModel", patch_size=2, in_channels=16, out_channels=4,
                     joint_attention_dim=12, axes_dims_rope=(4, 6, 6)),
        given(32, 16, levels=(0.9, 0.3), encoder_hidden_states_mask=mask(torch.bool),
              img_shapes=lambda batch: [[(1, 8, 4)]] * batch), *IMAGE,
    ),
    "flux": Foreign(
        of_diffusers("FluxTransformer2DModel", **FLUX, pooled_projection_dim=8,
                     axes_dims_rope=(4, 6, 6), guidance_embeds=True),
        given(32, 16, **OF_FLUX, pooled_projections=pooled, img_ids=places(3),
              txt_ids=lambda batch: torch.zeros(5, 3)), *IMAGE,
    ),
    "sd3": Foreign(
        of_diffusers("SD3Transformer2DModel", sample_size=16, patch_size=2, in_channels=4,
                     joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=8,
                     out_channels=4, pos_embed_max_size=16, dual_attention_layers=(0, 2)),
        given(4, 16, 8, pooled_projections=pooled), *IMAGE,
    ),
    "dit": Foreign(
        of_diffusers("DiTTransformer2DModel", in_channels=4, out_channels=8, norm_num_groups=4,
                     sample_size=16, patch_size=2, num_embeds_ada_norm=1000,
                     activation_fn="gelu-approximate", norm_elementwise_affine=False),
        given(4, 16, 16, text=0, timestep=whole, class_labels=torch.arange), (4, 4), (8, 8),
    ),
    "pixart": Foreign(
        of_diffusers("PixArtTransformer2DModel", in_channels=4, out_channels=8,
                     cross_attention_dim=32, sample_size=16, patch_size=2, caption_channels=12,
                     use_additional_conditions=False, norm_num_groups=4, attention_bias=True),
        given(4, 16, 8, timestep=whole, encoder_attention_mask=mask(),
              added_cond_kwargs=lambda _: {"resolution": None, "aspect_ratio": None}), *IMAGE,
    ),
    "wan": Foreign(WAN, given(4, 4, 16, 8), *CLIP),
    "wan-per-token": Foreign(  # Wan 2.2 TI2V: a noise level for each token
        WAN, given(4, 4, 16, 8, timestep=lambda batch: torch.linspace(0, 900, 4)
                   .repeat_interleave(32).expand(batch, -1)), *CLIP,
    ),
    "flux2": Foreign(
        of_diffusers("Flux2Transformer2DModel", **FLUX, timestep_guidance_channels=16,
                     axes_dims_rope=(4, 4, 4, 4)),
        given(32, 16, **OF_FLUX, img_ids=places(4), txt_ids=lambda batch: torch.zeros(5, 4)),
        *IMAGE,
    ),
    "cogvideox": Foreign(
        of_diffusers("CogVideoXTransformer3DModel", in_channels=4, out_channels=4,
                     time_embed_dim=8, text_embed_dim=12, sample_width=8, sample_height=16,
                     sample_frames=13, max_text_seq_length=5,
                     use_rotary_positional_embeddings=True),
        given(4, 4, 16, 8, timestep=whole,
              image_rotary_emb=lambda _: (torch.randn(128, 16), torch.randn(128, 16))), *CLIP,
    ),
    "mochi": Foreign(
        of_diffusers("MochiTransformer3DModel", pooled_projection_dim=8, in_channels=4,
                     text_embed_dim=16, time_embed_dim=8, max_sequence_length=5),
        given(4, 4, 16, 8, text=16, encoder_attention_mask=mask(torch.bool)), *CLIP,
    ),
    "ltx": Foreign(
        of_diffusers("LTXVideoTransformer3DModel", in_channels=4, out_channels=4,
                     cross_attention_dim=32, caption_channels=12),
        given(128, 4, encoder_attention_mask=mask(), num_frames=lambda _: 4, height=lambda _: 8,
              width=lambda _: 4), *CLIP,
    ),
    "cogview4": Foreign(
        of_diffusers("CogView4Transformer2DModel", in_channels=4, out_channels=4,
                     text_embed_dim=12, time_embed_dim=8, condition_dim=4, rope_axes_dim=(16, 16)),
        given(4, 16, 8, original_size=lambda batch: torch.tensor([[128.0, 64.0]] * batch),
              target_size=lambda batch: torch.tensor([[128.0, 64.0]] * batch),
              crop_coords=lambda batch: torch.zeros(batch, 2)), *IMAGE,
    ),
    "ours": Foreign(of_ours(elit.DiT), OF_OURS, *IMAGE),
    "ours-sit": Foreign(of_ours(elit.SiT), OF_OURS, *IMAGE),
}  # fmt: skip


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


def elastic(name: str, init: str = "identity", rank: int = 2, std: float | None = None) -> Any:
    """An elastic transformer; with `std` the interface is as if it were trained: gates are open."""
    model = elasticize(make(name), HEAD, TAIL, FOREIGN[name].group, init, rank)
    if std is not None:
        randomise(model.elit, std)
    return model


def randomise(module: nn.Module, std: float = 0.2) -> None:
    """Give an interface weights as if it were trained: fresh gates hide everything."""
    torch.manual_seed(5)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


class Stack(nn.Module):
    """A model of blocks, that takes its time from what the test says."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor | None = None
    ) -> torch.Tensor:
        del timestep
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states
