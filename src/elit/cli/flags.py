"""Flags: the parser, types of values, and the flags that several commands share, once each."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, NoReturn

from elit._choices import check_choice, nearest
from elit._files import typed_path
from elit.flow.words import DEFAULT_SCALE, GUIDANCES, SAMPLERS

AUTO = "auto"  # as a budget: what `elit sweep` found best within a cap


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Says a flag's default behind its help, where the help doesn't."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if (
            default is None
            or default is False
            or default == argparse.SUPPRESS
            or "default:" in text
        ):
            return text
        several = default if isinstance(default, list | tuple) else [default]
        shown = " ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in several)
        return f"{text} (default: {shown})" if several else text


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

    def add(self, *names: str, **changes: Any) -> None:
        """Add flags, or arguments, whose names are in capitals: as in FLAGS but for the changes."""
        for name in names:
            given = {**FLAGS.get(name, {}), **changes}
            word = given.pop("word", name.lower()) if name.isupper() else f"--{name}"
            self.add_argument(word, **given)

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
            if not flag.startswith("-") or flag in self.flags or not math.isnan(_number(word)):
                continue
            if flag.startswith(self.open_flags) and flag not in self.open_flags:
                self.add_argument(flag, dest=flag[2:], default=argparse.SUPPRESS)
                continue
            long_flags = [known for known in self.flags if known.startswith("--")]
            near = nearest(flag, long_flags) if flag.startswith("--") else None
            raise ValueError(
                f"unknown flag {flag}: "
                + (f"did you mean {near}?" if near else f"`{self.prog} --help` lists all")
            )

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving the process."""
        raise ValueError(f"{message.removeprefix('argument ')}; see `{self.prog} --help`")


# ---- values of flags: each is a `type=` of argparse ----


def _number(text: str) -> float:
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        return math.nan


def whole_number(least: int, most: float = math.inf) -> Callable[[str], int]:
    """A whole number, at least `least` and at most `most`."""
    limits = f"at least {least}" + ("" if most == math.inf else f" and at most {most}")

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed; give a whole number, {limits}"
            )
        return value

    return parse


def even_number(text: str) -> int:
    """A whole number that two divides."""
    value = whole_number(2)(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give an even number")
    return value


def number(text: str) -> float:
    """A finite number."""
    value = math.nan if "/" in text else _number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give a number, such as 1.5")
    return value


def noise_level(text: str) -> float:
    """A number in [0, 1]."""
    if not 0 <= (value := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(
            f"noise level {text!r} is outside [0, 1]: 0 is data, 1 is noise; give one such as 0.5"
        )
    return value


def budget(text: str) -> float:
    """A fraction in (0, 1], as a number or as the tables print it: 1/4."""
    if not 0 < (value := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(
            f"budget {text!r} is outside (0, 1]: it is the fraction of the latents to keep; "
            f"give a number such as 0.25 or 1/4, or 1 for all"
        )
    return value


def budget_or_auto(text: str) -> float | str:
    """A budget, or the word that has it chosen."""
    return AUTO if text == AUTO else budget(text)


def one_of(allowed: Iterable[str], what: str) -> Callable[[str], str]:
    """One of a few words."""

    def parse(text: str) -> str:
        try:
            check_choice(text, allowed, what)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return parse


def path_text(text: str) -> str:
    """A path, with `~` and `$VARIABLES` replaced; names of the hub and of data sets stay."""
    try:
        return typed_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# ---- flags that several commands share ----


def flag(about: str, metavar: Any = None, type: Any = str, **more: Any) -> dict[str, Any]:  # noqa: A002
    """What `add_argument` is given for a flag with a value."""
    return {"help": about, "metavar": metavar, "type": type, **more}


def count(
    about: str, default: Any = None, least: int = 1, most: float = math.inf, **more: Any
) -> dict[str, Any]:
    """A flag with a whole number."""
    return flag(about, "N", whole_number(least, most), default=default, **more)


def choice(
    about: str, words: Iterable[str], what: str, note: str = "", metavar: str = "NAME", **more: Any
) -> dict[str, Any]:
    """A flag with one of a few words, which its help lists before the note."""
    return flag(f"{about}: {', '.join(words)}{note}", metavar, one_of(words, what), **more)


def switch(about: str) -> dict[str, Any]:
    """A flag without a value."""
    return {"help": about, "action": "store_true"}


_MADE_FOR = "(default: what the model was made for)"
FLAGS: dict[str, dict[str, Any]] = {
    "RUN": flag("folder of a pipeline, or its name on the hub", "RUN", path_text),
    "NAME_OR_PATH": flag(
        "preset, or folder of a pipeline or a model", "NAME_OR_PATH", path_text, word="model"
    ),
    "variant": flag("variant of the files of weights, such as fp16 (default: none)", "NAME"),
    "labels": flag("classes to draw (default: all, up to 10)", "L", whole_number(0), nargs="+"),
    "prompts": flag("texts to draw, with a model that draws texts", "TEXT", nargs="+"),
    "budget": flag("fraction of the latents to keep", "B", budget, default=1.0),
    "budgets": flag(
        "fractions of the latents to keep, such as 1 3/4 0.5 (default: 1 and halves of it)",
        "B", budget, nargs="+",
    ),
    "steps": count("steps of the sampler"),
    "guidance": choice("kind of guidance", GUIDANCES, "guidance", default="none"),
    "scale": flag(f"scale of the guidance (default: {DEFAULT_SCALE:g})", "S", number),
    "guide-budget": flag(
        "budget of the guide, for ag and ccfg (default: the lowest trained)", "B", budget
    ),
    "interval": flag(
        "noise levels between which guidance acts (default: 0 1)", ("LOW", "HIGH"), number, nargs=2
    ),
    "sampler": choice("sampler", SAMPLERS, "sampler", " (default: the one saved in RUN)"),
    "seed": flag("seed of the first image", "N", whole_number(0, 2**63 - 1), default=0),
    "size": flag(
        f"height and width in pixels {_MADE_FOR}", ("H", "W"), whole_number(1), nargs=2
    ),
    "frames": count(f"frames of a clip {_MADE_FOR}"),
    "resolution": count("pixels of an image's side"),
    "batch-size": count("images drawn at a time", 32),
    "device": flag("device: auto, cpu, cuda or mps", "NAME", default="auto"),
    "dtype": choice("data type to compute in", ("fp32", "bf16"), "dtype", default="fp32"),
    "out": flag("folder to write into", "DIR", path_text),
    "json": switch("print one JSON object instead"),
}  # fmt: skip
