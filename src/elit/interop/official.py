"""The public SiT and ELIT-SiT checkpoints as models of ours: names, shapes, settings."""

import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from elit.interface.grid import TokenGrid
from elit.interface.raster import to_groups
from elit.interop.checkpoint import (
    POSITIONS,
    Checkpoint,
    ConversionSettings,
    Shapes,
    agreed,
    as_path,
    as_whole,
    count_of,
    heads_of,
    read_model,
    sizes_of,
    tensor_of,
)
from elit.models.presets import SIT_SIZES
from elit.models.sit import SiT, sincos_positions

logger = logging.getLogger(__name__)

READ = "input_token_editor.adapters.0."
WRITE = "output_token_editor.adapters.0."
LATENT_PLACES = 4096  # rows of the table in every file, whatever the model's size

# Ours -> theirs, the first that matches.
_NAMES = (
    (r"patch_embed\.", r"x_embedder.proj."),
    (r"time_embed\.linear_in\.", r"t_embedder.mlp.0."),
    (r"time_embed\.linear_out\.", r"t_embedder.mlp.2."),
    (r"label_embed\.table\.", r"y_embedder.embedding_table."),
    (r"blocks\.(\d+)\.attention\.to_qkv\.", r"blocks.\1.attn.qkv."),
    (r"blocks\.(\d+)\.attention\.to_out\.", r"blocks.\1.attn.proj."),
    (r"blocks\.(\d+)\.attention\.", r"blocks.\1.attn."),
    (r"blocks\.(\d+)\.mlp\.0\.", r"blocks.\1.mlp.fc1."),
    (r"blocks\.(\d+)\.mlp\.2\.", r"blocks.\1.mlp.fc2."),
    (r"blocks\.(\d+)\.modulation\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"project\.linear\.", r"final_layer.linear."),
    (r"project\.modulation\.", r"final_layer.adaLN_modulation.1."),
    (r"places\.table", rf"{READ}pos_embed"),
    (r"read\.latents", rf"{READ}learned_query_embed"),
    (r"read\.latent_places", rf"{READ}latent_pos_embed"),
    (r"read\.modulation\.linear\.", rf"{READ}fit_layer.adaLN_modulation.1."),
    (r"read\.mlp\.0\.", rf"{READ}fit_layer.read_ff.0.fc1."),
    (r"read\.mlp\.2\.", rf"{READ}fit_layer.read_ff.0.fc2."),
    (r"read\.attention\.", rf"{READ}fit_layer.latents_attend_to_patches.0."),
    (r"write\.places\.table", rf"{WRITE}pos_embed"),
    (r"write\.layers\.(\d+)\.mlp\.0\.", rf"{WRITE}write_ff.\1.fc1."),
    (r"write\.layers\.(\d+)\.mlp\.2\.", rf"{WRITE}write_ff.\1.fc2."),
    (r"write\.layers\.(\d+)\.attention\.", rf"{WRITE}patches_attend_to_latents.\1."),
)
_CROSS_ATTENTION = (
    (r"\.to_q\.", ".q_proj."),
    (r"\.to_kv\.", ".kv_proj."),
    (r"\.to_out\.", ".proj."),
    (r"_norm\.weight$", "_norm.scale"),
)


def from_official_checkpoint(
    path: str | os.PathLike,
    *,
    weights: str = "ema",
    encoder_depth: int = 8,
    num_heads: int | None = None,
    decoder_depth: int | None = None,
) -> SiT:
    """Load a public SiT or ELIT-SiT checkpoint, for an `ElitPipeline`; nothing in it is run.

    Args:
        path: the .pt file, or a .safetensors file with its state dict.
        weights: "ema", the average over training, or "model".
        encoder_depth: blocks before the Read; it is 8 in all public checkpoints, and no tensor
            tells it.
        num_heads: by default that of the public model of the same width.
        decoder_depth: blocks after the Write; by default 4 of a model of more than 12 blocks, else
            2, as in the public ones.

    Raises:
        ValueError: if the file is none of these, is damaged, wants code run, or contradicts the
            arguments.
    """
    given = ConversionSettings(
        weights=weights, encoder_depth=encoder_depth, num_heads=num_heads,
        decoder_depth=decoder_depth,
    )  # fmt: skip
    return read_official(path, given)[0]


def read_official(path: str | os.PathLike, given: ConversionSettings) -> tuple[SiT, Checkpoint]:
    """Read a checkpoint, with what else its file tells."""
    return read_model(as_path(path), given, _make, to_ours)


def _make(checkpoint: Checkpoint, given: ConversionSettings) -> tuple[SiT, Shapes, Tensor]:
    args = checkpoint.args
    num_classes = _without_null(args)
    given = _agreed(args, is_elastic(checkpoint.tensors), given)
    with torch.device("meta"):
        model = SiT(**settings_of(checkpoint.tensors, given, num_classes))
    if num_classes is not None:
        logger.warning(
            "%s has no null class: the one here is zeros, so draw without CFG and cheap CFG",
            checkpoint.path,
        )
    return model, official_shapes(model, num_classes is None), positions_of(model)


def _agreed(
    args: Mapping[str, Any], elastic: bool, given: ConversionSettings
) -> ConversionSettings:
    """Settings that no tensor tells: as given or in the file's `args`, which must agree."""
    kind = "an ELIT-SiT" if elastic else "a plain SiT: none of its keys is of input_token_editor"
    told = args.get("enable_elit")
    if told in (0, 1) and bool(told) != elastic:
        raise ValueError(f"its args say enable_elit={told}, but its tensors are of {kind}")
    heads = agreed("num_heads", given.num_heads, args.get("num_heads"))
    if not elastic:
        given.check_plain(f"but this is {kind}")
        return replace(given, num_heads=heads)
    depth = agreed("encoder_depth", given.encoder_depth, args.get("encoder_depth"))
    decoder_depth = agreed("decoder_depth", given.decoder_depth, args.get("dit_decoder_depth"))
    return replace(given, encoder_depth=depth, decoder_depth=decoder_depth, num_heads=heads)


def _without_null(args: Mapping[str, Any]) -> int | None:
    """The number of classes of a model that was trained without a null class, else None."""
    dropout = args.get("class_dropout_prob", args.get("cfg_prob"))
    return as_whole(args.get("num_classes")) if dropout == 0 else None


# ---- what a state dict means ----


def official_name(name: str) -> str:
    """Key in a public file of a parameter of `SiT`."""
    pattern, theirs = next(pair for pair in _NAMES if re.match(pair[0], name))
    if name.startswith(("read.attention.", "write.")):
        for part, its in _CROSS_ATTENTION:
            name = re.sub(part, its, name)
    return re.sub(f"^{pattern}", theirs, name)


def official_shapes(model: SiT, null_class: bool = True) -> Shapes:
    """Keys and shapes of the public file that a model would come from."""
    width = model.config.hidden_size
    shapes: Shapes = {POSITIONS: (1, model.own_grid().num_tokens, width)}
    for name, parameter in model.named_parameters():
        shapes[official_name(name)] = tuple(parameter.shape)
    if not null_class:
        shapes["y_embedder.embedding_table.weight"] = (model.config.num_classes, width)
    shapes["x_embedder.proj.weight"] = (width, model.in_channels, *model.patch_size)
    if model.is_elastic:
        shapes[f"{READ}latent_pos_embed"] = (LATENT_PLACES, width)
        for part, *rest in (("weight", width), ("bias",)):  # a seventh chunk, which nobody reads
            shapes[f"{READ}fit_layer.adaLN_modulation.1.{part}"] = (7 * width, *rest)
    return shapes


def to_ours(model: SiT, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a model, of a public one of these keys and shapes.

    Tokens and places of latents come group by group, channels before places in a patch.
    """
    ours = {name: theirs[official_name(name)] for name, _ in model.named_parameters()}
    ours["patch_embed.weight"] = ours["patch_embed.weight"].flatten(1)
    labels = ours["label_embed.table.weight"]
    if len(labels) == model.config.num_classes:  # there is no null class
        ours["label_embed.table.weight"] = torch.cat((labels, torch.zeros_like(labels[:1])))
    for name in ("project.linear.weight", "project.linear.bias"):
        rows = ours[name].unflatten(0, (*model.patch_size, model.in_channels))
        ours[name] = rows.movedim(2, 0).flatten(0, 2)  # (C * p * p, ...)
    if model.is_elastic:
        grid, width = model.own_grid(), model.config.hidden_size
        raster = ours["read.latent_places"][None, : grid.num_tokens]
        ours["read.latent_places"] = to_groups(grid, raster).flatten(0, 2)
        for name in ("read.modulation.linear.weight", "read.modulation.linear.bias"):
            ours[name] = ours[name][: 6 * width]
    # Copies: what was read is a view of the file.
    return {name: v.to(torch.float32, copy=True).contiguous() for name, v in ours.items()}


def is_elastic(theirs: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict has a latent interface."""
    return any(key.startswith((READ, WRITE)) for key in theirs)


def settings_of(
    theirs: Mapping[str, Tensor], given: ConversionSettings, num_classes: int | None = None
) -> dict[str, Any]:
    """Arguments of the `SiT` that a state dict belongs to.

    Args:
        theirs: the state dict.
        given: what no tensor tells.
        num_classes: of a model without a null class; None if the last label is the null class.

    Raises:
        ValueError: if what settings are read from is missing or of an impossible shape.
    """
    sizes = sizes_of(theirs)
    channels, patch, predicted = sizes["channels"], sizes["patch"], sizes["predicted"]
    if predicted == 2 * patch * patch * channels:
        raise ValueError(
            f"final_layer.linear.weight has {predicted} rows for {channels} channels: it predicts "
            f"a variance too, as DiT and the first SiT do, whose tensors look alike. If it is a "
            f"DiT, `elit convert dit` makes a DiTPipeline of it; the first SiT is not read here"
        )
    norm = theirs.get("blocks.0.attn.q_norm.weight")
    settings: dict[str, Any] = {
        "sample_size": sizes["side"] * patch,
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": sizes["width"],
        "num_heads": heads_of(sizes["width"], norm, given.num_heads),
        "depth": sizes["depth"],
        "num_classes": num_classes or sizes["labels"] - 1,
        "mlp_ratio": sizes["hidden"] / sizes["projected"],
        "qk_norm": norm is not None,
    }
    if is_elastic(theirs):
        settings |= _interface(theirs, sizes["side"], sizes["depth"], given)
    return settings


def _interface(
    theirs: Mapping[str, Tensor], side: int, depth: int, given: ConversionSettings
) -> dict[str, Any]:
    """The arguments of an elastic model alone."""
    num_latents = len(tensor_of(theirs, f"{READ}learned_query_embed", 2))
    group = math.isqrt(num_latents)
    if group * group != num_latents:
        raise ValueError(f"{num_latents} latents of {READ}learned_query_embed are no square group")
    TokenGrid((side, side), (group, group))  # or an error
    encoder_depth, decoder_depth = given.encoder_depth, given.decoder_depth
    if decoder_depth is None:
        decoder_depth = SIT_SIZES["xl" if depth > SIT_SIZES["b"].depth else "b"].tail
    if encoder_depth + decoder_depth >= depth:
        raise ValueError(
            f"encoder_depth={encoder_depth!r} and {decoder_depth} blocks after the Write leave no "
            f"core in the {depth} blocks of this file; give the encoder_depth that it was trained "
            f"with, which its tensors do not tell (8 in all public checkpoints)"
        )
    layers = count_of(theirs, f"{WRITE}write_ff.")
    return {
        "group": group,
        "head": encoder_depth,
        "tail": decoder_depth,
        "min_latents": max(1, num_latents // 16),  # 1 of 16 at 256 px, 4 of 64 at 512
        "write_depth": max(1, layers),
    }


def positions_of(model: SiT) -> Tensor:
    """The table (N, D) of a model's own size, in raster order."""
    grid = model.own_grid()
    places = TokenGrid(grid.size, grid.size).token_places()
    return sincos_positions(places, model.config.hidden_size)
