"""The layouts of the transformers that `elasticize` knows by name, an entry each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from elit._choices import nearest
from elit.interface.fit import format_size
from elit.models.dit import DiT
from elit.models.elastic import ElasticMixin
from elit.models.sit import SiT
from elit.retrofit.layout import Arguments, Layout, PerToken

_CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples")
_BOTH_KINDS = ("transformer_blocks", "single_transformer_blocks")
_ROTARY = {"image_rotary_emb": PerToken(0)}


def _patches(model: Any, arguments: Arguments) -> tuple[int, ...]:
    """Grid of a model that cuts (B, C, *space) into patches."""
    space, patch = arguments["hidden_states"].shape[2:], model.config.patch_size
    patch = patch if isinstance(patch, Sequence) else (patch,) * len(space)
    return tuple(n // p for n, p in zip(space, patch, strict=True))


def _patches_in_time(model: Any, arguments: Arguments) -> tuple[int, ...]:
    """Grid of a model with one patch size in space, and none, or another, in time."""
    shape, space = arguments["hidden_states"].shape, model.config.patch_size
    frames_first = "CogVideoX" in type(model).__name__  # (B, T, C, H, W), not (B, C, T, H, W)
    frames = shape[1 if frames_first else 2] // (model.config.get("patch_size_t") or 1)
    return frames, shape[3] // space, shape[4] // space


def _qwen_grid(_: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    """Grid of Qwen-Image from `img_shapes`, a (frames, height, width) for each sample."""
    given = arguments.get("img_shapes") or []
    shapes = {tuple(map(tuple, s)) if isinstance(s[0], Sequence) else (tuple(s),) for s in given}
    images = [image for sample in shapes for image in sample]
    if len(images) != 1 or images[0][0] != 1:
        raise ValueError(
            f"img_shapes {given} are not one image of one size for all samples: an elastic "
            f"Qwen-Image takes no more images beside it; use the original, or unelasticize"
        )
    return images[0][1:]


_flux_grids: Any = WeakIdKeyDictionary()  # a pipeline gives the same ids at all steps


def _flux_grid(_: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    """Grid of Flux from `img_ids`, (N, 3 or 4) of (frame, row, column, ...)."""
    ids = arguments["img_ids"]
    if ids not in _flux_grids:
        places = (ids[0] if ids.ndim == 3 else ids).long()  # they may be in bfloat16
        size = [int(n) + 1 for n in (places.max(0).values - places.min(0).values).tolist()]
        height, width = size[1:3]
        rows = (places[:, 1] - places[:, 1].min()) * width + places[:, 2] - places[:, 2].min()
        raster = torch.arange(len(places), device=places.device)
        if size[0] != 1 or len(places) != height * width or not torch.equal(rows, raster):
            raise ValueError(
                f"img_ids of {len(places)} tokens over {format_size(size[:3])} are not one image "
                f"row by row: an elastic Flux takes no more images beside it; use the original"
            )
        _flux_grids[ids] = height, width
    return _flux_grids[ids]


def _elit_grid(model: Any, arguments: Arguments) -> tuple[int, ...]:
    """Grid of a plain model of ours."""
    return model.token_grid(arguments["hidden_states"]).size


def _ltx_grid(_: nn.Module, arguments: Arguments) -> tuple[int, ...]:
    """Grid of LTX, which gets its size beside the packed tokens."""
    size = tuple(arguments.get(name) or 0 for name in ("num_frames", "height", "width"))
    if 0 in size:
        raise ValueError(
            f"num_frames, height, width are {size}; an elastic LTX has to get all three"
        )
    return size


# By the name of the class, so that no model has to be imported.
LAYOUTS: Mapping[str, Layout] = {
    "QwenImageTransformer2DModel": Layout(
        grid=_qwen_grid, time_scale=1, not_elastic=_CONTROLNET,
        per_token={"image_rotary_emb": PerToken(0, item=0), "modulate_index": PerToken(1)},
    ),
    "FluxTransformer2DModel": Layout(
        _BOTH_KINDS, _flux_grid, per_token=_ROTARY, time_scale=1, not_elastic=_CONTROLNET
    ),
    "Flux2Transformer2DModel": Layout(
        _BOTH_KINDS, _flux_grid, per_token=_ROTARY, time_scale=1, with_text=True
    ),
    "SD3Transformer2DModel": Layout(
        grid=_patches, not_elastic=("block_controlnet_hidden_states",), guide_half="first"
    ),
    "DiTTransformer2DModel": Layout(grid=_patches, guide_half="second"),
    "PixArtTransformer2DModel": Layout(
        grid=_patches, per_token={"attention_mask": PerToken(-1)}, guide_half="first"
    ),
    "WanTransformer3DModel": Layout(
        "blocks", _patches, num_axes=3,
        per_token={"rotary_emb": PerToken(1), "temb": PerToken(1, ndim=4)},
    ),
    "CogVideoXTransformer3DModel": Layout(grid=_patches_in_time, per_token=_ROTARY, num_axes=3),
    "MochiTransformer3DModel": Layout(grid=_patches_in_time, per_token=_ROTARY, num_axes=3),
    "LTXVideoTransformer3DModel": Layout(
        grid=_ltx_grid, per_token=dict.fromkeys(("image_rotary_emb", "temb"), PerToken(1)),
        num_axes=3,
    ),
    "CogView4Transformer2DModel": Layout(grid=_patches, per_token=_ROTARY),
}  # fmt: skip
_OURS = {
    DiT: Layout(blocks="blocks", grid=_elit_grid, per_token={"rotary": PerToken(0)}, time_scale=1),
    SiT: Layout(blocks="blocks", grid=_elit_grid, time_scale=1),  # places come with the tokens
}


def find_layout(model: nn.Module) -> Layout:
    """The layout of a model by its class, or by a class that a foreign one derives from."""
    kind = getattr(type(model), "original_class", type(model))
    if isinstance(model, ElasticMixin):
        # The exact class: a U-ViT is a DiT, whose forward no layout of a DiT describes.
        if kind in _OURS:
            return replace(_OURS[kind], num_axes=len(model.sample_size))
        raise ValueError(
            f"this {kind.__name__} cannot be elasticized: of elit's models a DiT or a SiT can; "
            f"create_model('elit-{kind.__name__.lower()}-...') makes one elastic from scratch"
        )
    for base in kind.__mro__:
        if base.__name__ in LAYOUTS:
            return LAYOUTS[base.__name__]
    name = kind.__name__
    near = nearest(name, LAYOUTS)
    raise ValueError(
        f"{name} is not among the transformers known by name"
        + (f" (did you mean {near}?)" if near else "")
        + f": {', '.join(LAYOUTS)}. Say how it is laid out: layout=Layout(blocks='blocks', ...)"
    )


# Those that predict noise - data, as ours do: scale of the timestep, and how (B, C, h, w) becomes
# tokens: None is left to the model.
FLOW_TRANSFORMERS = {
    "SD3Transformer2DModel": (1000.0, None),
    "WanTransformer3DModel": (1000.0, None),
    "CogView4Transformer2DModel": (1000.0, None),
    "FluxTransformer2DModel": (1.0, "flux"),
    "QwenImageTransformer2DModel": (1.0, "qwen"),
}


def is_foreign(model: Any) -> bool:
    """Whether a model is one of diffusers', also after it was made elastic."""
    return any(kind.__name__ in FLOW_TRANSFORMERS for kind in type(model).__mro__)
