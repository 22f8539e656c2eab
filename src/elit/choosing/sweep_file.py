"""What `elit sweep` writes, read back and checked: files are edited, cut off, or something else."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from elit._files import typed_path
from elit._numbers import is_real, is_whole
from elit._plain import fits_type, read_json
from elit.flow.words import GUIDANCES

SWEEP_FILE = Path("swept") / "sweep.json"  # within a pipeline's folder
FORMAT = 1  # of the file
Check = Callable[[Any], bool]


def _is_share(value: Any) -> bool:
    return is_real(value) and 0 < value <= 1


def _is_interval(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2 and all(map(is_real, value))
    return is_pair and 0 <= value[0] <= value[1] <= 1


def _is_scale(value: Any) -> bool:
    return is_real(value) and value >= 0


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _of_type(hint: Any) -> Check:
    return lambda value: fits_type(value, hint)


_is_real_or_none = _or_none(is_real)


_REPORT: dict[str, Check] = {
    "ranked_by": _of_type(str),
    "lower_is_better": _of_type(bool),
    "model": _of_type(dict[str, Any]),
    "settings": _of_type(dict[str, Any]),
    "rows": _of_type(list[dict[str, Any]]),
}
_MODEL: dict[str, Check] = {
    "weights": _of_type(str | None),
    "training": lambda x: x is None or (isinstance(x, dict) and _is_real_or_none(x.get("eflops"))),
}
_SETTINGS: dict[str, Check] = {
    "sampler": _of_type(str),
    "size": lambda x: isinstance(x, list) and all(map(is_whole, x)),
    "text_tokens": _or_none(is_whole),
    "reference": _of_type(dict[str, Any] | None),
    "networks": _of_type(list[dict[str, Any]] | None),
}
_ROW: dict[str, Check] = {
    "budget": _is_share,
    "steps": is_whole,
    "guidance": lambda x: isinstance(x, str) and x in GUIDANCES,
    "sampler": _of_type(str | None),
    "scale": _is_real_or_none,
    "guide_budget": _or_none(_is_share),
    "interval": _or_none(_is_interval),
    "gflops_per_image": lambda x: is_real(x) and x > 0,
    "ms_per_image": _or_none(lambda x: is_real(x) and x >= 0),
    "scores": _of_type(dict[str, float | None]),
    "warnings": _of_type(list[str] | None),
}


def default_home(name: str) -> Path:
    """Folder that results of a pipeline go to: its own, or of one on the hub one under runs/."""
    return Path(name) if Path(name).is_dir() else Path("runs") / Path(name).name


def read_sweep(file: str | os.PathLike) -> dict[str, Any]:
    """A report as `elit sweep` writes it, or a ValueError that says what is wrong with the file.

    Args:
        file: `sweep.json`, or the folder that it lies in.
    """
    file = Path(typed_path(file))
    file = file / SWEEP_FILE.name if file.is_dir() else file
    if not file.exists():
        raise ValueError(f"there is no {file}; `elit sweep RUN` measures and writes it")
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
            _check(row, {"scale": _is_scale}, file, f"row {number}: ")
    report["model"].setdefault("weights", None)
    if not report["rows"]:
        raise ValueError(f"{file} has no rows; run `elit sweep` to its end")
    return report


def _check(found: Mapping[str, Any], checks: Mapping[str, Check], file: Path, where: str) -> None:
    for name, is_right in checks.items():
        if not is_right(found.get(name)):
            what = f"{name} {found[name]!r:.40}" if name in found else f"no {name}"
            raise ValueError(
                f"{file} is no result of `elit sweep`: {where}{what}; run it again, or take the "
                f"file as it was written"
            )
