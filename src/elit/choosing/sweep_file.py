"""What `elit sweep` writes, read back and checked: files are edited, cut off, or something else."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elit._files import typed_path
from elit._numbers import is_whole
from elit._plain import fits_type, read_json
from elit.caching.step_cache import StepCache
from elit.flow.words import GUIDANCES

SWEEP_FILE = Path("swept") / "sweep.json"  # within a pipeline's folder
FORMAT = 1  # of the file


# What must stand in a file: the type of each entry, and which values of it are allowed
_REPORT: dict[str, Any] = {
    "ranked_by": str,
    "lower_is_better": bool,
    "model": dict[str, Any],
    "settings": dict[str, Any],
    "rows": list[dict[str, Any]],
}
_MODEL: dict[str, Any] = {
    "weights": str | None,
    "training": (dict[str, Any] | None, lambda x: fits_type(x.get("eflops"), float | None)),
}
_SETTINGS: dict[str, Any] = {
    "sampler": str,
    "size": (list[int], lambda x: all(map(is_whole, x))),
    "text_tokens": (int | None, is_whole),
    "reference": dict[str, Any] | None,
    "networks": list[dict[str, Any]] | None,
}
_ROW: dict[str, Any] = {
    "budget": (float, lambda x: 0 < x <= 1),
    "steps": (int, is_whole),
    "guidance": (str, lambda x: x in GUIDANCES),
    "sampler": str | None,
    "scale": float | None,
    "guide_budget": (float | None, lambda x: 0 < x <= 1),
    "interval": (tuple[float, float] | None, lambda x: 0 <= x[0] <= x[1] <= 1),
    "budgets_of_steps": (list[float] | None, lambda x: x and all(0 < b <= 1 for b in x)),
    "guide_budgets_of_steps": (
        list[float | None] | None, lambda x: x and all(b is None or 0 < b <= 1 for b in x)
    ),
    "cache": StepCache | None,
    "searches": (
        list[dict[str, Any]] | None, lambda x: all(fits_type(one.get("way"), str) for one in x)
    ),
    "gflops_per_image": (float, lambda x: x > 0),
    "ms_per_image": (float | None, lambda x: x >= 0),
    "scores": dict[str, float | None],
    "warnings": list[str] | None,
}  # fmt: skip


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
            _check(row, {"scale": (float, lambda x: x >= 0)}, file, f"row {number}: ")
    report["model"].setdefault("weights", None)
    if not report["rows"]:
        raise ValueError(f"{file} has no rows; run `elit sweep` to its end")
    return report


def plain_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of one budget for all steps, without a step cache."""
    late = "budgets_of_steps", "cache"
    return [row for row in report["rows"] if all(row.get(name) is None for name in late)]


def _check(found: Mapping[str, Any], checks: Mapping[str, Any], file: Path, where: str) -> None:
    for name, check in checks.items():
        hint, is_allowed = check if isinstance(check, tuple) else (check, lambda _: True)
        value = found.get(name)
        if not (fits_type(value, hint) and (value is None or is_allowed(value))):
            what = f"{name} {value!r:.40}" if name in found else f"no {name}"
            raise ValueError(
                f"{file} is no result of `elit sweep`: {where}{what}; run it again, or take the "
                f"file as it was written"
            )
