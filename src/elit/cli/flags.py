"""Flags: the parser, types of values, and the flags that several commands share, once each."""

import argparse
import math
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from elit._choices import check_choice, hint_at
from elit._files import typed_path
from elit._numbers import as_number
from elit.flow.shift import DIMENSION, Shift, check_shift
from elit.flow.words import DEFAULT_SCALE, DEFAULT_STEPS, GUIDANCES, SAMPLERS
from elit.interface.budget import read_budget

# As a budget: what `elit sweep` found best within a cap, what `elit schedule` plans within it.
AUTO, SCHEDULE = "auto", "schedule"
Kind = Callable[[str], Any]  # of a value: makes it of what was typed, or raises a ValueError


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Says a flag's default behind its help, where the help doesn't."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is None or default is False or default in (argparse.SUPPRESS, (), []):
            return text
        if "default:" in text:
            return text
        several = default if isinstance(default, list | tuple) else [default]
        shown = " ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in several)
        return f"{text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ValueErrors, and which names the flag that was meant.

    Attributes:
        open_flags: beginnings of flags that may go on as they like, such as "--data.options.".
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**{"formatter_class": _Formatter, **kwargs}, allow_abbrev=False)
        self.open_flags: tuple[str, ...] = ()

    @property
    def flags(self) -> list[str]:
        """All flags, such as "--budget"."""
        return [flag for action in self._actions for flag in action.option_strings]

    def add(
        self,
        names: str,
        about: str = "",
        kind: Kind | None = None,
        metavar: Any = None,
        **more: Any,
    ) -> None:
        """Add flags, or arguments, whose names are in capitals: as in FLAGS but for what is given.

        Words to choose from stand in for a {} of the help.
        """
        for name in names.split():
            given = {**FLAGS.get(name, {}), **_flag(about, kind, metavar, **more)}
            parse = given.pop("type", str)
            if isinstance(parse, OneOf):
                given["help"] = given["help"].format(", ".join(parse.words))
            usual = "N" if isinstance(parse, WholeNumber) else "NAME"
            given.setdefault("metavar", name if name.isupper() else usual)
            word = given.pop("word", name.lower()) if name.isupper() else f"--{name}"
            self.add_argument(word, type=_told(parse), **given)

    def switch(self, name: str, about: str) -> None:
        """Add a flag without a value."""
        self.add_argument(f"--{name}", action="store_true", help=about)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        self._check_flags(args)
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return parsed

    def _check_flags(self, args: Sequence[str]) -> None:
        """Look for unknown flags first: argparse would complain of what follows from them."""
        for word in args:
            if word == "--":  # what follows are no flags
                return
            flag = word.partition("=")[0]
            if not flag.startswith("-") or flag in self.flags or not math.isnan(as_number(word)):
                continue
            if flag.startswith(self.open_flags) and flag not in self.open_flags:
                self.add_argument(flag, dest=flag[2:], default=argparse.SUPPRESS)
                continue
            known = [one for one in self.flags if flag.startswith("--") and one.startswith("--")]
            hint = hint_at(flag, known, f"`{self.prog} --help` lists all")
            raise ValueError(f"unknown flag {flag}: {hint}")

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving the process."""
        raise ValueError(f"{message.removeprefix('argument ')}; see `{self.prog} --help`")


# ---- kinds of values ----


def _told(kind: Kind) -> Kind:
    """A kind as argparse wants it: of other errors than its own it says nothing."""

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


@dataclass(frozen=True)
class WholeNumber:
    """A whole number within limits."""

    least: int = 1
    most: float = math.inf

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = self.least - 1
        if not self.least <= value <= self.most:
            most = "" if self.most == math.inf else f" and at most {self.most}"
            raise ValueError(
                f"{text!r} is not allowed; give a whole number, at least {self.least}{most}"
            )
        return value


@dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    words: Collection[str]
    what: str  # they are

    def __call__(self, text: str) -> str:
        check_choice(text, self.words, self.what)
        return text


def number(text: str) -> float:
    """A finite number."""
    value = math.nan if text[-1:] == "%" or "/" in text else as_number(text)
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not allowed; give a number, such as 1.5")
    return value


def label(text: str) -> int | str:
    """The number of a class, or its name."""
    return text if math.isnan(as_number(text)) else WholeNumber(0)(text)


def shift(text: str) -> Shift:
    """A number, or the word of what it follows from."""
    value: Shift = DIMENSION if text == DIMENSION else as_number(text)
    check_shift(value)
    return value


# ---- flags that several commands share ----


def _flag(about: str, kind: Kind | None = None, metavar: Any = None, **more: Any) -> dict[str, Any]:
    given = {"help": about, "type": kind, "metavar": metavar}
    return {**{key: value for key, value in given.items() if value}, **more}


_MADE_FOR = "(default: what the model was made for)"
OWN_STEPS = "(default: {}, or the few that the model was trained for)"
FLAGS: dict[str, dict[str, Any]] = {
    "RUN": _flag("folder of a pipeline, or its name on the hub", typed_path),
    "NAME_OR_PATH": _flag("preset, or folder of a pipeline or a model", typed_path, word="model"),
    "variant": _flag("variant of the files of weights, such as fp16 (default: none)"),
    "labels": _flag(
        "classes to draw, by number or name (default: all, up to 10)", label, "L", nargs="+"
    ),
    "prompts": _flag("texts to draw, with a model that draws texts", metavar="TEXT", nargs="+"),
    "budget": _flag("fraction of the latents to keep", read_budget, "B", default=1.0),
    "budgets": _flag(
        "fractions of the latents to keep, such as 1 3/4 0.5 (default: 1 and halves of it)",
        read_budget, "B", nargs="+",
    ),
    "steps": _flag(f"steps of the sampler {OWN_STEPS.format(DEFAULT_STEPS)}", WholeNumber()),
    "guidance": _flag("kind of guidance: {}", OneOf(GUIDANCES, "guidance"), default="none"),
    "scale": _flag(f"scale of the guidance (default: {DEFAULT_SCALE:g})", number, "S"),
    "guide-budget": _flag(
        "budget of the guide, for ag and ccfg (default: the lowest trained)", read_budget, "B"
    ),
    "interval": _flag(
        "noise levels between which guidance acts (default: 0 1)", number, ("LOW", "HIGH"), nargs=2
    ),
    "sampler": _flag("sampler: {} (default: the one saved in RUN)", OneOf(SAMPLERS, "sampler")),
    "shift": _flag(
        "shift of the sampler's noise levels, a number or dimension: sqrt(m / 4096) of m numbers "
        "(default: the one saved in RUN)", shift, "S",
    ),
    "seed": _flag("seed of the first image", WholeNumber(0, 2**63 - 1), default=0),
    "size": _flag(f"height and width in pixels {_MADE_FOR}", WholeNumber(), ("H", "W"), nargs=2),
    "frames": _flag(f"frames of a clip {_MADE_FOR}", WholeNumber()),
    "resolution": _flag("pixels of an image's side", WholeNumber()),
    "batch-size": _flag("images drawn at a time", WholeNumber(), default=32),
    "device": _flag("device: auto, cpu, cuda or mps", default="auto"),
    "dtype": _flag(
        "data type to compute in: {}", OneOf(("fp32", "bf16"), "dtype"), default="fp32"
    ),
    "out": _flag("folder to write into", typed_path, "DIR"),
}  # fmt: skip
