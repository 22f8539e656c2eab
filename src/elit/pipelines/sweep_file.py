"""What `elit sweep` writes, read back and checked: files are edited, cut off, or something else."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from elit._numbers import is_real, is_whole
from elit._plain import read_json
from elit.flow.words import GUIDANCES

SWEEP_FILE = Path("swept") / "sweep.json"  # within a pipeline's folder
FORMAT = 1  # of the file


def _is_share(value: Any) -> bool:
    return is_real(value) and 0 < value <= 1


def _is_interval(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2 and all(map(is_real, value))
    return is_pair and 0 <= value[0] <= value[1] <= 1


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_scores(value: Any) -> bool:
    numbers = value.values() if isinstance(value, dict) else ["none"]
    return all(number is None or is_real(number) for number in numbers)


def _is_training(value: Any) -> bool:
    return isinstance(value, dict) and (value.get("eflops") is None or is_real(value["eflops"]))


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


_REPORT: dict[str, Callable[[Any], bool]] = {
    "ranked_by": lambda x: isinstance(x, str),
    "lower_is_better": lambda x: isinstance(x, bool),
    "model": _is_dict,
    "settings": _is_dict,
    "rows": lambda x: isinstance(x, list) and all(map(_is_dict, x)),
}
_MODEL = {"weights": _or_none(lambda x: isinstance(x, str)), "training": _or_none(_is_training)}
_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "sampler": lambda x: isinstance(x, str),
    "size": lambda x: isinstance(x, list) and all(map(is_whole, x)),
    "text_tokens": _or_none(is_whole),
    "reference": _or_none(_is_dict),
    "networks": _or_none(lambda x: isinstance(x, list) and all(map(_is_dict, x))),
}
_ROW: dict[str, Callable[[Any], bool]] = {
    "budget": _is_share,
    "steps": is_whole,
    "guidance": lambda x: isinstance(x, str) and x in GUIDANCES,
    "sampler": _or_none(lambda x: isinstance(x, str)),
    "scale": _or_none(is_real),
    "guide_budget": _or_none(_is_share),
    "interval": _or_none(_is_interval),
    "gflops_per_image": lambda x: is_real(x) and x > 0,
    "ms_per_image": _or_none(lambda x: is_real(x) and x >= 0),
    "scores": _is_scores,
    "warnings": _or_none(lambda x: isinstance(x, list) and all(isinstance(t, str) for t in x)),
}


def read_sweep(file: Path) -> dict[str, Any]:
    """A report as `elit sweep` writes it, or a ValueError that says what is wrong with the file."""
    report = read_json(file, "run `elit sweep` again")
    if report.get("format") != FORMAT:
        raise ValueError(
            f"{file} is no result of `elit sweep`, or of another version of elit; run `elit sweep` "
            f"again"
        )
    _check(report, _REPORT, file, "")
    _check(report["model"], _MODEL, file, "model: ")
    _check(report["settings"], _SETTINGS, file, "settings: ")
    for number, row in enumerate(report["rows"]):
        _check(row, _ROW, file, f"row {number}: ")
        if row["guidance"] != "none":
            _check(row, {"scale": is_real}, file, f"row {number}: ")
    if not report["rows"]:
        raise ValueError(f"{file} has no rows; run `elit sweep` to its end")
    return report


def _check(
    found: Mapping[str, Any], wanted: Mapping[str, Callable[[Any], bool]], file: Path, where: str
) -> None:
    for name, is_right in wanted.items():
        if not is_right(found.get(name)):
            what = f"{name} {found[name]!r:.40}" if name in found else f"no {name}"
            raise ValueError(
                f"{file} is no result of `elit sweep`: {where}{what}; run it again, or take the "
                f"file as it was written"
            )
