"""Public checkpoints: what is in their files, checked, and a model with their weights."""

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from elit._choices import check_choice
from elit._files import typed_path
from elit._numbers import is_whole
from elit._pickles import check_bytes, read_pickle
from elit._wrappers import HOLDERS, without_wrapping
from elit.interop import WEIGHTS
from elit.models.presets import SIT_SIZES, SIZES

logger = logging.getLogger(__name__)

POSITIONS = "pos_embed"  # a table that is computed here
PROJECTORS = "projectors."  # of REPA: they are of training alone
STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Model = TypeVar("Model", bound=nn.Module)
Given = TypeVar("Given", int, int | None)
Shapes = dict[str, tuple[int, ...]]  # by the file's names


@dataclass(frozen=True)
class ConversionSettings:
    """Settings by which a public checkpoint becomes a folder."""

    format: str = "official"  # "official", of the SiT and ELIT-SiT, or "dit"
    weights: str = "ema"  # "ema" or "model"
    encoder_depth: int = 8  # blocks before the Read
    num_heads: int | None = None  # by default that of the public model of the same width
    decoder_depth: int | None = None  # blocks after the Write; by default the public models'
    # autoencoder to put into the folder, a folder or a name on the hub; None leaves it out
    vae: str | None = None

    def check_plain(self, kind: str) -> None:
        """Raise a ValueError for what is given of a latent interface."""
        for name in ("encoder_depth", "decoder_depth"):
            value = getattr(self, name)
            if value != getattr(ConversionSettings, name):
                raise ValueError(f"{name}={value!r} is of an ELIT-SiT, {kind}; leave {name} out")


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint's file."""

    path: Path
    tensors: dict[str, Tensor]  # by the file's names, views of it
    # which of the file's: "ema", "model", or None of a file that holds a state dict
    weights: str | None
    args: Mapping[str, Any]  # settings that the model was trained with, as far as the file has them
    steps: int | None  # of training, if the file tells
    left_out: list[str]  # keys that are of training alone

    @property
    def stored(self) -> list[str]:
        """The types that the tensors have in the file; a model's are float32."""
        return sorted({str(value.dtype).removeprefix("torch.") for value in self.tensors.values()})


def read_model(
    path: Path,
    given: ConversionSettings,
    make: Callable[[Checkpoint, ConversionSettings], tuple[Model, Shapes, Tensor]],
    to_ours: Callable[[Model, Mapping[str, Tensor]], dict[str, Tensor]],
) -> tuple[Model, Checkpoint]:
    """Read a checkpoint, with what else its file tells; nothing in it is run.

    `make` gives a model without weights, shapes of the public file that it would come from, and its
    table of positions; `to_ours` the model's state dict.
    """
    for name, least in (("encoder_depth", 0), ("num_heads", 1), ("decoder_depth", 0)):
        value = getattr(given, name)
        if not (is_whole(value, least) or (value is None and name != "encoder_depth")):
            raise ValueError(
                f"{name}={value!r} is not allowed; give a whole number, at least {least}"
            )
    check_choice(given.weights, WEIGHTS, "weights")
    content = read_pickle(path)
    tensors, weights = _state_dict(path, content, given.weights)
    left_out = sorted(key for key in tensors if key.startswith(PROJECTORS))
    tensors = {key: value for key, value in tensors.items() if not key.startswith(PROJECTORS)}
    if left_out:
        logger.warning(
            "left out %d tensors of REPA's projectors (%s, ...): they are of training alone",
            len(left_out), left_out[0],
        )  # fmt: skip
    check_bytes(path, tensors)
    args = content.get("args")
    args = args if isinstance(args, Mapping) else getattr(args, "__dict__", {})
    steps = as_whole(content.get("steps"))
    checkpoint = Checkpoint(path, tensors, weights, args, steps, left_out)
    with _cannot_be_converted(path):
        check_tensors(tensors)
        model, expected, positions = make(checkpoint, given)
        check_keys(tensors, expected)
        check_positions(positions, tensors)
    model.load_state_dict(to_ours(model, tensors), assign=True)
    return model.eval(), checkpoint


@contextmanager
def _cannot_be_converted(path: Path) -> Iterator[None]:
    """Name the file in the errors of what it holds."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} cannot be converted: {error}") from error


def as_path(path: str | os.PathLike) -> Path:
    """A path as it may be typed, or a ValueError."""
    try:
        name = os.fspath(path)
        if not isinstance(name, str):
            raise TypeError(f"a path of {type(name).__name__}")
        return Path(typed_path(name))
    except TypeError as error:
        raise ValueError(f"{path!r} is no path ({error}); give a checkpoint's file") from None


def _state_dict(path: Path, content: Any, weights: str) -> tuple[dict[str, Tensor], str | None]:
    """The chosen state dict of a file, and which that is; None of a file that is a state dict."""
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, not a checkpoint: a dictionary with 'ema' "
            f"and 'model', or with tensors by their names"
        )
    holder = next((name for name in HOLDERS if isinstance(content.get(name), Mapping)), None)
    if holder is not None and weights not in content:
        content = content[holder]
    chosen: Any = content.get(weights)
    which: str | None = weights
    if content and all(isinstance(value, Tensor) for value in content.values()):
        if weights != "ema":
            logger.warning("%s has one set of weights, which is taken: no 'ema' or 'model'", path)
        chosen, which = content, None
    elif weights not in content:
        others = [name for name in WEIGHTS if name in content]
        advice = f"give weights={others[0]!r}" if others else "it is no checkpoint of a DiT or SiT"
        raise ValueError(
            f"{path} has no {weights!r}: it holds {', '.join(map(str, content))[:200] or 'nothing'}"
            f"; {advice}"
        )
    if not isinstance(chosen, Mapping) or not all(isinstance(v, Tensor) for v in chosen.values()):
        raise ValueError(f"{weights!r} in {path} is a {type(chosen).__name__}, not tensors by name")
    for key in chosen:
        if not isinstance(key, str):
            raise ValueError(
                f"{path} has tensors by {type(key).__name__} ({key!r}), not by name: it is no "
                f"checkpoint of a DiT or SiT"
            )
    with _cannot_be_converted(path):
        return without_wrapping(chosen), which


# ---- what tensors and arguments tell ----


def as_whole(value: Any) -> int | None:
    """A whole number, however it was written: 8, 8.0, "8" or a tensor of it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() and is_whole(int(number), 0) else None


def agreed(name: str, given: Given, told: Any) -> Given | int:
    """A setting as given, else as the file's `args` tell it; a ValueError if they contradict."""
    told = as_whole(told)
    if given is not None and told is not None and given != told:
        raise ValueError(f"{name}={given!r} contradicts the args in the file; give {name}={told}")
    return given if told is None else told


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


def sizes_of(theirs: Mapping[str, Tensor]) -> dict[str, int]:
    """What the shapes of a DiT, SiT or ELIT-SiT tell; a ValueError where one is impossible."""
    width, channels, patch = tensor_of(theirs, "x_embedder.proj.weight", 4).shape[:3]
    tokens = tensor_of(theirs, POSITIONS, 3).shape[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{POSITIONS} of {tokens} tokens is of no square image")
    hidden, projected = tensor_of(theirs, "blocks.0.mlp.fc1.weight", 2).shape
    return {
        "width": width,
        "channels": channels,
        "patch": patch,
        "side": side,  # tokens along each axis
        "hidden": hidden,
        "projected": projected,
        "predicted": len(tensor_of(theirs, "final_layer.linear.weight", 2)),
        "labels": len(tensor_of(theirs, "y_embedder.embedding_table.weight", 2)),
        "depth": count_of(theirs, "blocks."),
    }


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
