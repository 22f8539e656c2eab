"""Comparison of two sweeps: whether it is allowed, and what both measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elit._pareto import is_number
from elit._tables import in_units
from elit.choosing.sweep_file import SWEEP_FILE, read_sweep
from elit.viz.sweeps import SCORES, Rows, best_at_costs

Report = dict[str, Any]

# Scores that differ in one of these are not of the same thing.
_SAME = ("networks", "samples", "seed", "drawn", "size", "eight_bit")
_POINT = ("budget", "steps", "sampler", "guidance", "scale", "guide_budget", "interval")
_SEARCHED = ("budgets_of_steps", "guide_budgets_of_steps", "cache")  # of some points alone
_EQUAL_TRAINING = 0.05  # share by which training FLOPs may differ and still be called equal


def read_sweeps(first: str, second: str) -> dict[str, Report]:
    """The reports of two sweeps, by the names of their runs: of folders of either, or files."""
    files = [_file_of(Path(path)) for path in (first, second)]
    if files[0].resolve() == files[1].resolve():
        raise ValueError(f"{first} and {second} are the same sweep; give two different ones")
    for name_of in (_name_of, lambda file: str(file.parent), str):
        names = [name_of(file) for file in files]
        if names[0] != names[1]:  # the first that tells them apart
            break
    reports = {name: read_sweep(file) for name, file in zip(names, files, strict=True)}
    for file, report in zip(files, reports.values(), strict=True):
        unknown = sorted({name for row in report["rows"] for name in row["scores"]} - set(SCORES))
        if unknown:
            raise ValueError(f"{file} has a score {unknown[0]!r} that this version of elit lacks")
        for row in report["rows"]:  # under whatever load there was then
            row["ms_per_image"] = row["front_ms"] = None
    return reports


def time_together(
    reports: Mapping[str, Report], runs: Sequence[str], device: str = "auto", progress: bool = False
) -> None:
    """Measure what an image of each row takes, the models in turns on one device, as was drawn.

    Of rows with a step cache nothing is measured: theirs are times of whole runs, not of calls.

    Args:
        reports: of the sweeps; their rows get `ms_per_image`.
        runs: folders of the pipelines, in the same order.
        device: "auto", or a name of torch.
        progress: whether to show a bar.
    """
    from elit.choosing.points import OperatingPoint
    from elit.choosing.timing import CallTimes, ms_together
    from elit.pipelines.load import open_pipeline

    several, rows = [], []
    for run, report in zip(runs, reports.values(), strict=True):
        settings = report["settings"]
        folder = run if Path(run).is_dir() else report["model"]["path"]
        dtype = "bf16" if settings["dtype"].startswith("bfloat16") else "fp32"  # of a variant
        pipeline = open_pipeline(folder, device, dtype)
        if type(pipeline.scheduler).__name__ != settings["sampler"]:
            raise ValueError(
                f"{folder} was swept with a {settings['sampler']}, but draws with a "
                f"{type(pipeline.scheduler).__name__}; sweep it with the saved sampler, or compare "
                f"without times"
            )
        size = (*[None] * (3 - len(settings["size"])), *settings["size"])
        times = CallTimes(pipeline, min(settings["batch_size"], settings["samples"]),
                          size, progress, anew=True)  # fmt: skip
        rows.append([row for row in report["rows"] if row.get("cache") is None])
        points = map(OperatingPoint.from_dict, rows[-1])
        several.append((times, [pipeline.calls(**p.arguments(), size=size) for p in points]))
    for own, all_ms in zip(rows, ms_together(several), strict=True):
        for row, ms in zip(own, all_ms, strict=True):
            row["ms_per_image"] = ms


def check_comparable(reports: Mapping[str, Report]) -> None:
    """Raise a ValueError that names what differs, of all that scores of two sweeps must share."""
    compared = []
    for settings in (report["settings"] for report in reports.values()):
        reference = settings.get("reference") or {}
        of = {"reference": reference.get("digest") or reference.get("name")}
        compared.append(of | {key: settings.get(key) for key in _SAME})
    mine, theirs = compared
    differing = [
        f"{what} ({_brief(value)} and {_brief(theirs[what])})"
        for what, value in mine.items()
        if value != theirs[what]
    ]
    if differing:
        raise ValueError(
            f"{' and '.join(reports)} cannot be compared, for they differ in "
            f"{', '.join(differing)}; run `elit sweep` on both with the same settings"
        )


def notes_on(reports: Mapping[str, Report]) -> list[str]:
    """Warnings that a reader of an allowed comparison must know."""
    trained = {n: (r["model"].get("training") or {}).get("eflops") for n, r in reports.items()}
    known = {name: eflops for name, eflops in trained.items() if is_number(eflops)}
    notes = [f"the training FLOPs of {name} are not known" for name in trained if name not in known]
    if not notes:
        low, high = sorted(known.values())
        if high - low > _EQUAL_TRAINING * high:
            more = f"{100 * (high / low - 1):.0f} % more" if low > 0 else "against none"
            spent = {name: in_units(1e18 * eflops, "FLOPs") for name, eflops in known.items()}
            each = ", ".join(f"{name} {flops}" for name, flops in spent.items())
            notes.append(f"not at equal training FLOPs: {each} ({more})")
    return notes


def ranking_of(reports: Mapping[str, Report]) -> str:
    """The score that both have and the first ranks by, or else the first that both have."""
    names = [
        {name for row in report["rows"] for name, v in row["scores"].items() if is_number(v)}
        for report in reports.values()
    ]
    common = set.intersection(*names)
    if not common:
        raise ValueError(
            f"{' and '.join(reports)} have no score in common: "
            + "; ".join(f"{', '.join(sorted(own)) or 'none'}" for own in names)
            + "; run `elit sweep` on both with the same networks"
        )
    usual = next(iter(reports.values()))["ranked_by"]
    return str(usual) if usual in common else next(name for name in SCORES if name in common)


def shared_points(reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """Operating points that all have, with each model's costs and scores by its name."""

    def point_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
        values = (row.get(key) for key in _POINT)
        plain = (tuple(value) if isinstance(value, list) else value for value in values)
        return (*plain, *(str(row.get(key)) for key in _SEARCHED))

    by_point = [{point_of(row): row for row in report["rows"]} for report in reports.values()]
    points = []
    for point, row in by_point[0].items():
        if all(point in own for own in by_point):
            rows = {name: own[point] for name, own in zip(reports, by_point, strict=True)}
            late = {key: row[key] for key in _SEARCHED if row.get(key) is not None}
            points.append({key: row.get(key) for key in _POINT} | late | {
                "gflops_per_image": {name: r["gflops_per_image"] for name, r in rows.items()},
                "ms_per_image": {name: r.get("ms_per_image") for name, r in rows.items()},
                "scores": {
                    score: {name: r["scores"].get(score) for name, r in rows.items()}
                    for score in dict.fromkeys(s for r in rows.values() for s in r["scores"])
                },
            })  # fmt: skip
    return points


def differences(reports: Mapping[str, Report]) -> dict[str, dict[str, Any]]:
    """Settings in which they differ, each model's by its name."""
    keys = dict.fromkeys(key for report in reports.values() for key in report["settings"])
    values = {key: {n: r["settings"].get(key) for n, r in reports.items()} for key in keys}
    first = next(iter(reports))
    return {key: own for key, own in values.items() if any(v != own[first] for v in own.values())}


def compare(reports: Mapping[str, Report]) -> Report:
    """All that is said of two sweeps, in plain types; a ValueError if they may not be compared."""
    check_comparable(reports)
    score, differing = ranking_of(reports), differences(reports)
    rows = Rows(reports)
    settings = next(iter(reports.values()))["settings"]
    return {
        "format": 1,
        "models": {name: report["model"] for name, report in reports.items()},
        "settings": {key: value for key, value in settings.items() if key not in differing},
        "differences": differing,
        "ranked_by": score,
        "lower_is_better": SCORES[score].lower_is_better,
        "notes": notes_on(reports),
        "shared": shared_points(reports),
        "best": [
            {
                "gflops_per_image": cost,
                "best": {name: None if i is None else rows.rows[i] for name, i in places.items()},
            }
            for cost, places in best_at_costs(rows, score)
        ],
    }


def _file_of(path: Path) -> Path:
    """The file of a sweep that a user named by it or by a folder."""
    if path.is_file():
        return path
    tried = [path / SWEEP_FILE, path / SWEEP_FILE.name]
    for file in tried:
        if file.is_file():
            return file
    if path.is_dir():
        raise ValueError(f"there is no {tried[0]}; `elit sweep {path}` measures and writes it")
    raise ValueError(f"there is no {path}; give a run's folder, or a sweep.json")


def _name_of(file: Path) -> str:
    """Name of the run that a sweep lies in, or of a file elsewhere."""
    file = file.absolute()
    if file.parts[-2:] == SWEEP_FILE.parts:
        return file.parts[-3]
    return file.parent.name if file.name == SWEEP_FILE.name else file.stem


def _brief(value: Any) -> str:
    """A setting, short enough for a message."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        names = [f"{item.get('name')} {str(item.get('weights'))[:14]}" for item in value]
        return ", ".join(names) or "none"
    if isinstance(value, list):
        return "x".join(map(str, value))
    return f"{value!s:.40}"
