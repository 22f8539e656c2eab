"""The public SiT and ELIT-SiT checkpoints as models of ours."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from elit._numbers import is_whole
from elit.interop.checkpoint import (
    Checkpoint,
    agreed,
    as_path,
    as_whole,
    cannot_be_converted,
    read_checkpoint,
)
from elit.interop.official_format import (
    Unknowns,
    is_elastic,
    official_shapes,
    positions_of,
    settings_of,
    to_ours,
)
from elit.interop.tensors import check_keys, check_positions
from elit.models.sit import SiT

logger = logging.getLogger(__name__)


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
    )[0]  # fmt: skip


def read_official(
    path: str | os.PathLike,
    *,
    weights: str = "ema",
    encoder_depth: int = 8,
    num_heads: int | None = None,
    decoder_depth: int | None = None,
) -> tuple[SiT, Checkpoint]:
    """As `from_official_checkpoint`, with what else the file tells."""
    for name, value, least in (
        ("encoder_depth", encoder_depth, 0),
        ("num_heads", num_heads, 1),
        ("decoder_depth", decoder_depth, 0),
    ):
        if not (is_whole(value, least) or (value is None and name != "encoder_depth")):
            raise ValueError(
                f"{name}={value!r} is not allowed; give a whole number, at least {least}"
            )
    path = as_path(path)
    _refuse_diffusers(path)
    checkpoint = read_checkpoint(path, weights)
    theirs = checkpoint.tensors
    with cannot_be_converted(path):
        elastic = is_elastic(theirs)
        given = _given(checkpoint.args, elastic, encoder_depth, decoder_depth, num_heads)
        settings = settings_of(theirs, given)
        with torch.device("meta"):
            model = SiT(**settings)
        check_keys(theirs, official_shapes(model, null_class=given.num_classes is None))
        check_positions(positions_of(model), theirs)
    if given.num_classes is not None:
        logger.warning(
            "%s has no null class: the one here is zeros, so draw without CFG and cheap CFG", path
        )
    model.load_state_dict(to_ours(model, theirs), assign=True)
    return model.eval(), checkpoint


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
    heads = agreed("num_heads", num_heads, args.get("num_heads"))
    if not elastic:
        return Unknowns(num_heads=heads, num_classes=_without_null(args))
    depth = agreed("encoder_depth", encoder_depth, args.get("encoder_depth"))
    decoder_depth = agreed("decoder_depth", decoder_depth, args.get("dit_decoder_depth"))
    return Unknowns(8 if depth is None else depth, decoder_depth, heads, _without_null(args))


def _without_null(args: Mapping[str, Any]) -> int | None:
    """The number of classes of a model that was trained without a null class, else None."""
    dropout = args.get("class_dropout_prob", args.get("cfg_prob"))
    return as_whole(args.get("num_classes")) if dropout == 0 else None


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
