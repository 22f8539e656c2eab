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
    check_keys,
    check_positions,
    is_elastic,
    official_shapes,
    settings_of,
    to_ours,
)
from elit.interop.pickles import read_pickle
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
    """

    model: SiT
    weights: str | None
    steps: int | None
    left_out: list[str]


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
    for name, value in (("num_heads", num_heads), ("decoder_depth", decoder_depth)):
        if value is not None and not is_whole(value):
            raise ValueError(f"{name}={value!r} is not allowed; give a positive integer")
    path = Path(path).expanduser()
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
    try:
        _check_depth(_told(content.get("args")), is_elastic(theirs), encoder_depth)
        settings = settings_of(theirs, encoder_depth, decoder_depth, num_heads)
        with torch.device("meta"):
            model = SiT(**settings)
        check_keys(theirs, official_shapes(model))
        check_positions(model, theirs[POSITIONS])
    except ValueError as error:
        raise ValueError(f"{path} cannot be converted: {error}") from error
    model.load_state_dict(to_ours(model, theirs), assign=True)
    steps = content.get("steps")
    return Official(model.eval(), chosen, int(steps) if is_whole(steps, 0) else None, left_out)


def _state_dict(path: Path, content: Any, weights: str) -> tuple[dict[str, Tensor], str | None]:
    """The chosen state dict of a file, and which that is; None of a file that is a state dict."""
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, not a checkpoint: a dictionary with 'ema' "
            f"and 'model', or with tensors by their names"
        )
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return dict(content), None
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
    return dict(chosen), weights


def _told(args: Any) -> Mapping[str, Any]:
    """The settings in a file, by name."""
    return args if isinstance(args, Mapping) else getattr(args, "__dict__", {})


def _check_depth(args: Mapping[str, Any], elastic: bool, encoder_depth: int) -> None:
    """Raise a ValueError where tensors, `encoder_depth` and the file's `args` contradict another.

    Args:
        args: that the model was trained with, as far as the file has them.
        elastic: whether its tensors are of an ELIT-SiT.
        encoder_depth: as given.
    """
    kind = "an ELIT-SiT" if elastic else "a plain SiT: none of its keys is of input_token_editor"
    told = args.get("enable_elit")
    if isinstance(told, bool) and told != elastic:
        raise ValueError(f"its args say enable_elit={told}, but its tensors are of {kind}")
    if not elastic and encoder_depth != 8:
        raise ValueError(
            f"encoder_depth={encoder_depth!r} is of an ELIT-SiT, but this is {kind}; leave "
            f"encoder_depth out"
        )
    told = args.get("encoder_depth")
    if elastic and is_whole(told) and told != encoder_depth:
        raise ValueError(
            f"encoder_depth={encoder_depth!r} contradicts the args in the file; give "
            f"encoder_depth={told}"
        )


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
