"""Facebook's DiT checkpoints as the `DiTTransformer2DModel` of diffusers.

That class is what diffusers documents of them: a noise predictor at 1000 discrete steps, with a
variance beside the noise. Its steps have no velocity, so it goes into a `DiTPipeline`.
"""

import os
import re
from collections.abc import Mapping

import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel
from torch import Tensor

from elit.interop.checkpoint import (
    POSITIONS,
    Checkpoint,
    ConversionSettings,
    Shapes,
    agreed,
    as_path,
    heads_of,
    read_model,
    sizes_of,
)
from elit.interop.official import is_elastic

NUM_CLASSES = 1000  # ImageNet's: a DiTPipeline knows no other number

# diffusers' -> theirs, the first that matches; each block has its own copy of the embeddings.
_BLOCK = r"transformer_blocks\.(\d+)\."
_NAMES = (
    (r"pos_embed\.proj\.", "x_embedder.proj."),
    (rf"{_BLOCK}norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (rf"{_BLOCK}norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (rf"{_BLOCK}norm1\.emb\.class_embedder\.", "y_embedder."),
    (rf"{_BLOCK}norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (rf"{_BLOCK}attn1\.to_[qkv]\.", r"blocks.\1.attn.qkv."),
    (rf"{_BLOCK}attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (rf"{_BLOCK}ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (rf"{_BLOCK}ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"proj_out_2\.", "final_layer.linear."),
)


def read_dit(
    path: str | os.PathLike, given: ConversionSettings
) -> tuple[DiTTransformer2DModel, Checkpoint]:
    """Read a public DiT checkpoint, of a state dict or of "ema" and "model"; nothing in it is run.

    Raises:
        ValueError: if the file is no DiT, is damaged, wants code run, or contradicts the settings.
    """
    return read_model(as_path(path), given, _make, _to_ours)


def _make(
    checkpoint: Checkpoint, given: ConversionSettings
) -> tuple[DiTTransformer2DModel, Shapes, Tensor]:
    given.check_plain("not of a DiT")
    heads = agreed("num_heads", given.num_heads, checkpoint.args.get("num_heads"))
    # Its positions are computed, so only parameters are without memory at first.
    with init_empty_weights(include_buffers=False):
        model = DiTTransformer2DModel(**_settings_of(checkpoint.tensors, heads))
    positions = model.get_buffer("pos_embed.pos_embed")
    shapes: Shapes = {POSITIONS: tuple(positions.shape)}
    for name, parameter in model.named_parameters():
        rows, *rest = parameter.shape
        key = _key_of(name)
        shapes[key] = (3 * rows if ".attn.qkv." in key else rows, *rest)
    return model, shapes, positions


def _to_ours(model: DiTTransformer2DModel, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a model: copies, for what was read is a view, and blocks share embeddings."""
    names = (name for name, _ in model.named_parameters())
    return {name: _part(theirs, name).to(torch.float32, copy=True) for name in names}


def _key_of(name: str) -> str:
    """Key in a public file of a parameter of diffusers'."""
    return next(re.sub(f"^{ours}", theirs, name) for ours, theirs in _NAMES if re.match(ours, name))


def _part(theirs: Mapping[str, Tensor], name: str) -> Tensor:
    """A parameter of diffusers', out of a public file: queries, keys and values are one there."""
    value = theirs[_key_of(name)]
    part = re.search(r"\.to_([qkv])\.", name)
    return value if part is None else value.chunk(3)["qkv".index(part[1])]


def _settings_of(theirs: Mapping[str, Tensor], num_heads: int | None) -> dict[str, int | float]:
    """Arguments of the `DiTTransformer2DModel` that a state dict belongs to."""
    if is_elastic(theirs):
        raise ValueError("it is an ELIT-SiT; use `elit convert official`")
    sizes = sizes_of(theirs)
    width, channels, patch = sizes["width"], sizes["channels"], sizes["patch"]
    rows, wanted = sizes["predicted"], 2 * patch * patch * channels
    if rows != wanted:
        raise ValueError(
            f"final_layer.linear.weight has {rows} rows for {channels} channels, but a DiT "
            f"predicts noise and its variance, in {wanted}; if it is a SiT, "
            f"use `elit convert official`"
        )
    heads = heads_of(width, None, num_heads)
    if width % heads:
        raise ValueError(f"a width of {width} cannot be divided into {heads} heads; give num_heads")
    if width % 4:
        raise ValueError(f"a width of {width} is no multiple of 4, which its positions need")
    table = (1, sizes["side"] ** 2, width)
    if theirs[POSITIONS].shape != table:  # before one of this size is made
        raise ValueError(f"{POSITIONS} is {tuple(theirs[POSITIONS].shape)}, not {table}")
    if sizes["labels"] != NUM_CLASSES + 1:
        raise ValueError(
            f"its table of labels has {sizes['labels']} rows, but a DiTPipeline takes label "
            f"{NUM_CLASSES} as that of no class: only DiTs of {NUM_CLASSES} classes can be "
            f"converted"
        )
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": 2 * channels,
        "num_layers": sizes["depth"],
        "sample_size": sizes["side"] * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": NUM_CLASSES,
        "norm_eps": 1e-6,  # the default is for other models
    }
