"""What a state dict of the public SiT and ELIT-SiT checkpoints means: names, shapes, settings."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elit.interface.grid import TokenGrid
from elit.models.presets import SIT_SIZES, SIZES
from elit.models.sit import SiT, sincos_positions

READ = "input_token_editor.adapters.0."
WRITE = "output_token_editor.adapters.0."
LATENT_PLACES = 4096  # rows of the table in every file, whatever the model's size
POSITIONS = "pos_embed"  # a table that is computed here
PROJECTORS = "projectors."  # of REPA: they are of training alone
WRAPPINGS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

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


@dataclass(frozen=True)
class Unknowns:
    """Settings that no tensor tells.

    Attributes:
        encoder_depth: blocks before Read.
        decoder_depth: blocks after Write; None takes the public models' number at this depth.
        num_heads: attention heads; None takes the public models' number at this width.
        num_classes: of a model without a null class; None if the last label is the null class.
    """

    encoder_depth: int = 8
    decoder_depth: int | None = None
    num_heads: int | None = None
    num_classes: int | None = None


def without_wrapping(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what wrapped modules put before every key."""
    for prefix in WRAPPINGS:
        if theirs and all(key.startswith(prefix) for key in theirs):
            return without_wrapping({key[len(prefix) :]: v for key, v in theirs.items()})
    return theirs


def official_name(name: str) -> str:
    """Key in a public file of a parameter of `SiT`."""
    pattern, theirs = next(pair for pair in _NAMES if re.match(pair[0], name))
    if name.startswith(("read.attention.", "write.")):
        for part, its in _CROSS_ATTENTION:
            name = re.sub(part, its, name)
    return re.sub(f"^{pattern}", theirs, name)


def official_shapes(model: SiT, null_class: bool = True) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the public file that a model would come from."""
    width = model.config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    shapes[POSITIONS] = (1, model.own_grid().num_tokens, width)
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
        ours["read.latent_places"] = grid.to_groups(raster).flatten(0, 2)
        for name in ("read.modulation.linear.weight", "read.modulation.linear.bias"):
            ours[name] = ours[name][: 6 * width]
    # Copies: what was read is a view of the file.
    return {name: v.to(torch.float32, copy=True).contiguous() for name, v in ours.items()}


def is_elastic(theirs: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has a latent interface."""
    return any(key.startswith((READ, WRITE)) for key in theirs)


def settings_of(
    theirs: Mapping[str, Tensor],
    unknowns: Unknowns,
) -> dict[str, Any]:
    """Arguments of the `SiT` that a state dict belongs to.

    Raises:
        ValueError: if what settings are read from is missing or of an impossible shape.
    """
    positions = _tensor(theirs, POSITIONS, 3)
    patches = _tensor(theirs, "x_embedder.proj.weight", 4)
    width, channels, patch = patches.shape[:3]
    side = math.isqrt(positions.shape[1])
    if side * side != positions.shape[1]:
        raise ValueError(f"{POSITIONS} of {positions.shape[1]} tokens is of no square image")
    hidden, projected = _tensor(theirs, "blocks.0.mlp.fc1.weight", 2).shape
    last = _tensor(theirs, "final_layer.linear.weight", 2)
    if len(last) == 2 * patch * patch * channels:
        raise ValueError(
            f"final_layer.linear.weight has {len(last)} rows for {channels} channels: it predicts "
            f"a variance too, as the DiT and the first SiT checkpoints do. Those are of other "
            f"conventions and not read here; DiT runs in diffusers' DiTPipeline, and `elasticize` "
            f"makes its transformer elastic"
        )
    depth = _numbers(theirs, "blocks.")
    rows = len(_tensor(theirs, "y_embedder.embedding_table.weight", 2))
    norm = theirs.get("blocks.0.attn.q_norm.weight")
    settings: dict[str, Any] = {
        "sample_size": side * patch,
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": width,
        "num_heads": _heads(width, norm, unknowns.num_heads),
        "depth": depth,
        "num_classes": unknowns.num_classes or rows - 1,
        "mlp_ratio": hidden / projected,
        "qk_norm": norm is not None,
    }
    if is_elastic(theirs):
        settings |= _interface(theirs, side, depth, unknowns)
    return settings


def _interface(
    theirs: Mapping[str, Tensor],
    side: int,
    depth: int,
    unknowns: Unknowns,
) -> dict[str, Any]:
    """The arguments of an elastic model alone."""
    num_latents = len(_tensor(theirs, f"{READ}learned_query_embed", 2))
    group = math.isqrt(num_latents)
    if group * group != num_latents:
        raise ValueError(f"{num_latents} latents of {READ}learned_query_embed are no square group")
    TokenGrid((side, side), (group, group))  # or an error
    encoder_depth, decoder_depth = unknowns.encoder_depth, unknowns.decoder_depth
    if decoder_depth is None:
        decoder_depth = SIT_SIZES["xl" if depth > SIT_SIZES["b"].depth else "b"].tail
    if encoder_depth + decoder_depth >= depth:
        raise ValueError(
            f"encoder_depth={encoder_depth!r} and {decoder_depth} blocks after the Write leave no "
            f"core in the {depth} blocks of this file; give the encoder_depth that it was trained "
            f"with, which its tensors do not tell (8 in all public checkpoints)"
        )
    layers = _numbers(theirs, f"{WRITE}write_ff.")
    return {
        "group": group,
        "head": encoder_depth,
        "tail": decoder_depth,
        "min_latents": max(1, num_latents // 16),  # 1 of 16 at 256 px, 4 of 64 at 512
        "write_depth": max(1, layers),
    }


def _numbers(theirs: Mapping[str, Tensor], prefix: str) -> int:
    """How many modules a list has, from the keys of what is in them."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    numbers = {int(found[1]) for key in theirs if (found := pattern.match(key))}
    absent = set(range(len(numbers))) - numbers
    if absent:
        raise ValueError(f"it has {prefix}{max(numbers)}, but no {prefix}{min(absent)}")
    return len(numbers)


def _tensor(theirs: Mapping[str, Tensor], key: str, axes: int) -> Tensor:
    """A tensor that settings are read from."""
    if key not in theirs:
        raise ValueError(f"it has no {key}, which every SiT and ELIT-SiT has: it is another model")
    if theirs[key].ndim != axes or not theirs[key].numel():
        raise ValueError(f"{key} of shape {tuple(theirs[key].shape)} should have {axes} axes")
    return theirs[key]


def _heads(width: int, norm: Tensor | None, given: int | None) -> int:
    public = {size.hidden_size: size.num_heads for size in map(SIZES.get, SIT_SIZES) if size}
    told = width // len(norm) if norm is not None and norm.numel() else None
    if given is not None and told is not None and given != told:
        raise ValueError(
            f"num_heads={given} contradicts the file, whose q_norm is of other "
            f"heads: give num_heads={told}, or leave it out"
        )
    heads = given or told or public.get(width)
    if heads is None:
        raise ValueError(
            f"the tensors do not tell how many heads a model of width {width} has, and no public "
            f"one has that width ({', '.join(map(str, public))}); give num_heads"
        )
    return heads


def check_positions(model: SiT, table: Tensor) -> None:
    """Raise a ValueError unless a stored table (1, N, D) is the sines and cosines of the format."""
    grid = model.own_grid()
    places = TokenGrid(grid.size, grid.size).token_places()  # in raster order
    difference = (sincos_positions(places, table.shape[-1]) - table[0].float()).abs().max()
    rounding = torch.finfo(table.dtype).eps if table.dtype.itemsize < 4 else 1e-5
    if not difference <= rounding:
        raise ValueError(
            f"{POSITIONS} is up to {difference:.2g} off the sines and cosines of the public "
            f"checkpoints: this model was made with other positions"
        )


def check_tensors(theirs: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless all are floating-point numbers that the file really holds."""
    if POSITIONS not in theirs:
        found = _some(theirs) or "no key at all"
        raise ValueError(
            f"it has no {POSITIONS}, which every SiT and ELIT-SiT has: it is another model, with "
            f"{found}"
        )
    for key, value in theirs.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "without data" if value.is_meta else "sparse or quantized"
            raise ValueError(f"{_short(key)} is {kind}; save the checkpoint with plain tensors")
        if value.dtype not in STORED:
            raise ValueError(
                f"{_short(key)} is of {value.dtype}, not one of "
                f"{', '.join(str(dtype) for dtype in STORED)}"
            )
        held = value.untyped_storage().nbytes()
        if value.numel() * value.dtype.itemsize > held:
            raise ValueError(
                f"{_short(key)} claims the shape {tuple(value.shape)}, but the file holds {held} "
                f"bytes of it"
            )


def check_keys(theirs: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a ValueError that names keys which are missing, too many, misshapen or not finite."""
    problems = []
    missing, extra = expected.keys() - theirs.keys(), theirs.keys() - expected.keys()
    for kind, keys in (("missing", missing), ("unknown", extra)):
        if keys:
            problems.append(f"{len(keys)} {kind} keys ({_some(keys)})")
    shared = sorted(expected.keys() & theirs.keys())
    shapes = [f"{k} is {tuple(theirs[k].shape)}, not {expected[k]}" for k in shared
              if tuple(theirs[k].shape) != expected[k]]  # fmt: skip
    if shapes:
        problems.append(f"{len(shapes)} keys of another shape ({_some(shapes)})")
    # As float32, which the model's are: float64 holds numbers beyond it.
    wrong = [k for k in shared if not torch.isfinite(theirs[k].float()).all()]
    if wrong:
        problems.append(f"{len(wrong)} keys without finite float32 numbers ({_some(wrong)})")
    if problems:
        raise ValueError("; ".join(problems))


def _some(words: Any) -> str:
    words = sorted(words)
    return ", ".join(map(_short, words[:3])) + (", ..." if len(words) > 3 else "")


def _short(word: str) -> str:
    """A key as it may stand on a terminal, whatever a file calls it."""
    word = "".join(c if c.isprintable() else "?" for c in word)
    return word if len(word) <= 160 else f"{word[:160]}..."
