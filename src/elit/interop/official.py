"""The public SiT and ELIT-SiT checkpoints as models of ours."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit._choices import check_choice
from elit._numbers import is_whole
from elit.interop.official_format import (
    POSITIONS,
    PROJECTORS,
    Unknowns,
    check_keys,
    check_positions,
    check_tensors,
    is_elastic,
    official_shapes,
    settings_of,
    to_ours,
    without_wrapping,
)
from elit.interop.pickles import check_bytes, read_pickle
from elit.models.sit import SiT

logger = logging.getLogger(__name__)

WEIGHTS = ("ema", "model")


@dataclass(frozen=True)
class Official:
    """A model out of a public checkpoint, and what is known of it.

    Attributes:
        model: with the weights.
        weights: which of the file's: "ema", "model", or None of a file that holds a state dict.
        steps: training steps, if the file tells.
        left_out: keys that are of training alone.
        stored: the types that the tensors have in the file; the model's are float32.
    """

    model: SiT
    weights: str | None
    steps: int | None
    left_out: list[str]
    stored: list[str]


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
    return read_official(
        path, weights=weights, encoder_depth=encoder_depth, num_heads=num_heads,
        decoder_depth=decoder_depth,
    ).model  # fmt: skip


def read_official(
    path: str | os.PathLike,
    *,
    weights: str = "ema",
    encoder_depth: int = 8,
    num_heads: int | None = None,
    decoder_depth: int | None = None,
) -> Official:
    """As `from_official_checkpoint`, with what else the file tells."""
    check_choice(weights, WEIGHTS, "weights")
    for name, value, least in (
        ("encoder_depth", encoder_depth, 0),
        ("num_heads", num_heads, 1),
        ("decoder_depth", decoder_depth, 0),
    ):
        if not (is_whole(value, least) or (value is None and name != "encoder_depth")):
            raise ValueError(
                f"{name}={value!r} is not allowed; give a whole number, at least {least}"
            )
    path = _as_path(path)
    _refuse_diffusers(path)
    content = read_pickle(path)
    tensors, chosen = _state_dict(path, content, weights)
    left_out = sorted(key for key in tensors if key.startswith(PROJECTORS))
    theirs = {key: value for key, value in tensors.items() if not key.startswith(PROJECTORS)}
    if left_out:
        logger.warning(
            "left out %d tensors of REPA's projectors (%s, ...): they are of training alone",
            len(left_out), left_out[0],
        )  # fmt: skip
    check_bytes(path, theirs)
    try:
        check_tensors(theirs)
        args = _told(content.get("args"))
        given = _given(args, is_elastic(theirs), encoder_depth, decoder_depth, num_heads)
        settings = settings_of(theirs, given)
        with torch.device("meta"):
            model = SiT(**settings)
        check_keys(theirs, official_shapes(model, null_class=given.num_classes is None))
        check_positions(model, theirs[POSITIONS])
    except ValueError as error:
        raise ValueError(f"{path} cannot be converted: {error}") from error
    if given.num_classes is not None:
        logger.warning(
            "%s has no null class: the one here is zeros, so draw without CFG and cheap CFG", path
        )
    model.load_state_dict(to_ours(model, theirs), assign=True)
    stored = sorted({str(value.dtype).removeprefix("torch.") for value in theirs.values()})
    return Official(model.eval(), chosen, _whole(content.get("steps")), left_out, stored)


def _as_path(path: str | os.PathLike) -> Path:
    try:
        name = os.fspath(path)
        if not isinstance(name, str):
            raise TypeError(f"a path of {type(name).__name__}")
        return Path(name).expanduser()
    except (TypeError, RuntimeError) as error:  # RuntimeError: there is no such user
        raise ValueError(f"{path!r} is no path ({error}); give a checkpoint's file") from None


def _state_dict(path: Path, content: Any, weights: str) -> tuple[dict[str, Tensor], str | None]:
    """The chosen state dict of a file, and which that is; None of a file that is a state dict."""
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, not a checkpoint: a dictionary with 'ema' "
            f"and 'model', or with tensors by their names"
        )
    if content and all(isinstance(value, Tensor) for value in content.values()):
        if weights != "ema":
            logger.warning("%s has one set of weights, which is taken: no 'ema' or 'model'", path)
        return without_wrapping(_by_name(path, content)), None
    if weights not in content:
        others = [name for name in WEIGHTS if name in content]
        advice = f"give weights={others[0]!r}" if others else "it is no checkpoint of SiT's"
        raise ValueError(
            f"{path} has no {weights!r}: it holds {', '.join(map(str, content))[:200] or 'nothing'}"
            f"; {advice}"
        )
    chosen = content[weights]
    if not isinstance(chosen, Mapping) or not all(isinstance(v, Tensor) for v in chosen.values()):
        raise ValueError(f"{weights!r} in {path} is a {type(chosen).__name__}, not tensors by name")
    return without_wrapping(_by_name(path, chosen)), weights


def _by_name(path: Path, tensors: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    for key in tensors:
        if not isinstance(key, str):
            raise ValueError(
                f"{path} has tensors by {type(key).__name__} ({key!r}), not by name: it is no "
                f"checkpoint of SiT's"
            )
    return dict(tensors)


def _told(args: Any) -> Mapping[str, Any]:
    """The settings in a file, by name."""
    return args if isinstance(args, Mapping) else getattr(args, "__dict__", {})


def _given(
    args: Mapping[str, Any],
    elastic: bool,
    encoder_depth: int,
    decoder_depth: int | None,
    num_heads: int | None,
) -> Unknowns:
    """What no tensor tells: as given, else as the file's `args` have it.

    Args:
        args: that the model was trained with, as far as the file has them.
        elastic: whether its tensors are of an ELIT-SiT.
        encoder_depth: as given, as the next two are.
        decoder_depth: None if not given.
        num_heads: None if not given.

    Raises:
        ValueError: if tensors, arguments and `args` contradict one another.
    """
    kind = "an ELIT-SiT" if elastic else "a plain SiT: none of its keys is of input_token_editor"
    told = args.get("enable_elit")
    if told in (0, 1) and bool(told) != elastic:
        raise ValueError(f"its args say enable_elit={told}, but its tensors are of {kind}")
    for name, value, default in (
        ("encoder_depth", encoder_depth, 8), ("decoder_depth", decoder_depth, None)
    ):  # fmt: skip
        if not elastic and value != default:
            raise ValueError(
                f"{name}={value!r} is of an ELIT-SiT, but this is {kind}; leave {name} out"
            )
    heads = _agreed("num_heads", num_heads, args.get("num_heads"))
    if not elastic:
        return Unknowns(num_heads=heads, num_classes=_without_null(args))
    depth = _agreed("encoder_depth", encoder_depth, args.get("encoder_depth"))
    decoder_depth = _agreed("decoder_depth", decoder_depth, args.get("dit_decoder_depth"))
    return Unknowns(8 if depth is None else depth, decoder_depth, heads, _without_null(args))


def _agreed(name: str, given: int | None, told: Any) -> int | None:
    told = _whole(told)
    if given is not None and told is not None and given != told:
        raise ValueError(f"{name}={given!r} contradicts the args in the file; give {name}={told}")
    return told if given is None else given


def _without_null(args: Mapping[str, Any]) -> int | None:
    """The number of classes of a model that was trained without a null class, else None."""
    dropout = args.get("class_dropout_prob", args.get("cfg_prob"))
    return _whole(args.get("num_classes")) if dropout == 0 else None


def _whole(value: Any) -> int | None:
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


def _refuse_diffusers(path: Path) -> None:
    """Raise a ValueError that says what to do with a folder of diffusers'."""
    for name in ("transformer/config.json", "config.json"):
        try:
            kind = json.loads((path / name).read_text(encoding="utf-8"))["_class_name"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if str(kind) in ("DiTTransformer2DModel", "Transformer2DModel"):
            raise ValueError(
                f"{path} holds a {kind} of diffusers', such as DiT-XL/2: it predicts noise and its "
                f"variance at 1000 steps, not a velocity, and can be no ElitPipeline. Load it as a "
                f"DiTPipeline, and make its transformer elastic with elasticize"
            )
        raise ValueError(
            f"{path} is a folder with a {kind}, not a public SiT's .pt file; our own folders are "
            f"loaded by ElitPipeline.from_pretrained"
        )
