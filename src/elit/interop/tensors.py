"""Tensors by name, as public checkpoints have them: what is read from them, and checks."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from elit.models.presets import SIT_SIZES, SIZES

POSITIONS = "pos_embed"  # a table that is computed here
PROJECTORS = "projectors."  # of REPA: they are of training alone
STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def count_of(theirs: Mapping[str, Tensor], prefix: str) -> int:
    """Count the modules of a list by the keys of what is in them."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    numbers = {int(match[1]) for key in theirs if (match := pattern.match(key))}
    absent = set(range(len(numbers))) - numbers
    if absent:
        raise ValueError(f"it has {prefix}{max(numbers)}, but no {prefix}{min(absent)}")
    return len(numbers)


def tensor_of(theirs: Mapping[str, Tensor], key: str, axes: int) -> Tensor:
    """A tensor that settings are read from."""
    if key not in theirs:
        raise ValueError(
            f"it has no {key}, which every DiT, SiT and ELIT-SiT has: it is another model"
        )
    if not theirs[key].numel():
        raise ValueError(f"{key} of shape {tuple(theirs[key].shape)} is empty")
    if theirs[key].ndim != axes:
        raise ValueError(f"{key} of shape {tuple(theirs[key].shape)} should have {axes} axes")
    return theirs[key]


def side_of(theirs: Mapping[str, Tensor]) -> int:
    """Tokens along each axis of the square images that a model is for."""
    tokens = tensor_of(theirs, POSITIONS, 3).shape[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{POSITIONS} of {tokens} tokens is of no square image")
    return side


def heads_of(width: int, norm: Tensor | None, given: int | None) -> int:
    """Attention heads: as given, else of the queries' `norm`, else of the public model."""
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


def check_tensors(theirs: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless all are floating-point numbers that the file really holds."""
    if POSITIONS not in theirs:
        named = [key for key in theirs if key.endswith(f".{POSITIONS}")]
        named = [key for key in named if key.count(".") == min(k.count(".") for k in named)]
        if named:
            raise ValueError(
                f"it has {_some(named)} instead of {POSITIONS}: another model is around "
                f"or beside the one that is wanted; save the state dict of that one alone"
            )
        keys = _some(theirs) or "no key at all"
        raise ValueError(
            f"it has no {POSITIONS}, which every DiT, SiT and ELIT-SiT has: it is another model, "
            f"with {keys}"
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


def check_positions(computed: Tensor, theirs: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless the stored table (1, N, D) is the one that is computed here."""
    table = theirs[POSITIONS]
    difference = (computed - table.float()).abs().max()
    rounding = torch.finfo(table.dtype).eps if table.dtype.itemsize < 4 else 1e-5
    if not difference <= rounding:
        raise ValueError(
            f"{POSITIONS} is up to {difference:.2g} off the sines and cosines of the public "
            f"checkpoints: this model was made with other positions"
        )


def _some(words: Any) -> str:
    words = sorted(words)
    return ", ".join(map(_short, words[:3])) + (", ..." if len(words) > 3 else "")


def _short(word: str) -> str:
    """A key as it may stand on a terminal, whatever a file calls it."""
    word = "".join(c if c.isprintable() else "?" for c in word)
    return word if len(word) <= 160 else f"{word[:160]}..."
