"""The file of a public checkpoint: one of its state dicts, and its settings."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from elit._choices import check_choice
from elit._files import typed_path
from elit._numbers import is_whole
from elit._pickles import check_bytes, read_pickle
from elit._wrappers import HOLDERS, without_wrapping
from elit.interop import WEIGHTS
from elit.interop.tensors import PROJECTORS, check_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint's file."""

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


def read_checkpoint(path: Path, weights: str) -> Checkpoint:
    """Read a .pt or .safetensors file without running anything in it.

    Raises:
        ValueError: if it is damaged, wants code run, or is no checkpoint of tensors by name.
    """
    check_choice(weights, WEIGHTS, "weights")
    content = read_pickle(path)
    tensors, chosen = _state_dict(path, content, weights)
    left_out = sorted(key for key in tensors if key.startswith(PROJECTORS))
    tensors = {key: value for key, value in tensors.items() if not key.startswith(PROJECTORS)}
    if left_out:
        logger.warning(
            "left out %d tensors of REPA's projectors (%s, ...): they are of training alone",
            len(left_out), left_out[0],
        )  # fmt: skip
    check_bytes(path, tensors)
    with cannot_be_converted(path):
        check_tensors(tensors)
    args = content.get("args")
    args = args if isinstance(args, Mapping) else getattr(args, "__dict__", {})
    return Checkpoint(tensors, chosen, args, as_whole(content.get("steps")), left_out)


@contextmanager
def cannot_be_converted(path: Path) -> Iterator[None]:
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
    if content and all(isinstance(value, Tensor) for value in content.values()):
        if weights != "ema":
            logger.warning("%s has one set of weights, which is taken: no 'ema' or 'model'", path)
        return _bare(path, content), None
    if weights not in content:
        others = [name for name in WEIGHTS if name in content]
        advice = f"give weights={others[0]!r}" if others else "it is no checkpoint of a DiT or SiT"
        raise ValueError(
            f"{path} has no {weights!r}: it holds {', '.join(map(str, content))[:200] or 'nothing'}"
            f"; {advice}"
        )
    chosen = content[weights]
    if not isinstance(chosen, Mapping) or not all(isinstance(v, Tensor) for v in chosen.values()):
        raise ValueError(f"{weights!r} in {path} is a {type(chosen).__name__}, not tensors by name")
    return _bare(path, chosen), weights


def _bare(path: Path, tensors: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    for key in tensors:
        if not isinstance(key, str):
            raise ValueError(
                f"{path} has tensors by {type(key).__name__} ({key!r}), not by name: it is no "
                f"checkpoint of a DiT or SiT"
            )
    with cannot_be_converted(path):
        return without_wrapping(tensors)


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


def agreed(name: str, given: int | None, told: Any) -> int | None:
    """A setting as given, else as the file's `args` tell it; a ValueError if they contradict."""
    told = as_whole(told)
    if given is not None and told is not None and given != told:
        raise ValueError(f"{name}={given!r} contradicts the args in the file; give {name}={told}")
    return told if given is None else given
