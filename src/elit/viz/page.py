"""Pages that show sweeps: one HTML file each, which needs nothing else and asks nobody."""

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from elit._pareto import is_number, pareto_front
from elit._tables import counted
from elit.interface.budget import format_budget
from elit.viz import sweeps
from elit.viz.charts import INK, RAMPS, THEMES, Chart, Line, ramp, svg
from elit.viz.sweeps import (
    GUIDES,
    KINDS,
    SCORES,
    Guide,
    Point,
    Rows,
    cache_name,
    grouped,
    guide_name,
    guide_of,
)

if TYPE_CHECKING:
    from jinja2 import Environment

Report = Mapping[str, Any]
Sheets = Sequence[tuple[str, Image.Image]]  # captions and pictures

COSTS = {"gflops_per_image": "GFLOPs per image", "ms_per_image": "ms per image"}
# Outlines of a point for each kind, of kinds unknown here the first.
_MARKERS = {
    "none": "o", "cfg": "s", "ag": "^", "ccfg": "D", "planned": "P", "cached": "X", "both": "h",
}  # fmt: skip
_SIGNS = {  # the same, of a legend
    "none": "●", "cfg": "■", "ag": "▲", "ccfg": "◆", "planned": "✚", "cached": "✖", "both": "⬢",
}  # fmt: skip
_DASHES = {"ag": "--", "ccfg": ":"}
_MOST_GUIDES = 12  # of the charts over steps and budgets
_LOG_RATIO = 10  # of the largest to the smallest score, beyond which they get a log axis


def sweep_page(report: Report, sheets: Sheets = ()) -> str:
    """HTML page of one sweep's report, with sheets that have the same noise over the budgets."""
    name = str(report.get("model", {}).get("path", "model"))
    warnings = Counter(str(text) for row in report["rows"] for text in row.get("warnings") or ())
    notes = [f"{k} of {len(report['rows'])} rows: {text}" for text, k in warnings.most_common(5)]
    return _page(report, {name: report}, report.get("ranked_by"), notes, sheets)


def compare_page(
    reports: Mapping[str, Report], ranked_by: str | None = None, notes: Sequence[str] = ()
) -> str:
    """HTML page of sweeps side by side, by the models' names, a colour for each."""
    return _page({"reports": reports}, reports, ranked_by, notes)


@cache
def templates() -> "Environment":
    """The templates of all pages; what they are given is escaped."""
    from jinja2 import Environment, FileSystemLoader

    folder = FileSystemLoader(Path(__file__).parent / "templates")
    return Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _page(
    data: Any,
    reports: Mapping[str, Report],
    ranked_by: Any,
    notes: Sequence[str],
    sheets: Sheets = (),
) -> str:
    rows, several = Rows(reports), len(reports) > 1
    shown = sorted(filter(rows.scored, SCORES), key=lambda name: name != ranked_by)
    guides = rows.guides()
    steps = sorted({row["steps"] for row in rows.rows if is_number(row.get("scale"))}, reverse=True)
    sampler = len({row.get("sampler") for row in rows.rows}) > 1
    names = [guide_name(guide) + f", {guide[-1]}" * sampler for guide in guides[:_MOST_GUIDES]]
    options = {
        "score": {name: SCORES[name].title for name in shown},
        "guide": {str(k): name for k, name in enumerate(names)},
        "steps": {str(count): str(count) for count in steps},
    }
    themes = THEMES if several else [ramp(len(rows.budgets), theme) for theme in RAMPS]
    best = {
        SCORES[name].column(): _cell(rows.best(rows.scored(name), name))
        for name in shown
        if rows.told_apart(name)
    }
    facts = [sweeps.facts_of(report) for report in reports.values()]
    stamps = {name: sweeps.stamp(report) for name, report in reports.items()}
    alike = len(set(stamps.values())) == 1
    return templates().get_template("sweep.html").render(
        title=" and ".join(reports), several=several, reports=reports, rows=rows, notes=notes,
        data=json.loads(json.dumps(data), parse_constant=lambda _: None),  # of NaN and infinity
        themes=themes, names=rows.names if several else list(map(_budget_name, rows.budgets)),
        kinds=[(_SIGNS[kind], KINDS[kind]) for kind in KINDS if kind in rows.kinds],
        guide_kinds=[(_SIGNS[kind], KINDS[kind]) for kind in GUIDES if kind in rows.kinds],
        scores=shown, options=options, guides=len(guides), about=sweeps,
        figures=_figures(rows, shown, options, themes[0]),
        best={name: _best_table(rows, name) for name in shown if several},
        caps={cap: _cap_table(rows, own, shown) for cap, own in sweeps.within_caps(rows).items()},
        sheets=[(caption, picture.size, _data_uri(picture)) for caption, picture in sheets],
        columns=_columns(rows, shown), winners=best,
        facts={label: [one.get(label, "-") for one in facts] for own in facts for label in own},
        stamp=stamps[rows.names[0]] if alike else "; ".join(map(": ".join, stamps.items())),
    )  # fmt: skip


def _figures(
    rows: Rows, scores: Sequence[str], options: Mapping[str, Any], colours: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """All charts by their sections, those that the pickers' first options don't choose hidden."""
    first = {what: next(iter(own), None) for what, own in options.items()}
    figures: dict[str, list[dict[str, Any]]] = {"cost": [], "steps": [], "guidance": []}

    def add(section: str, chart: Chart | None, **picks: str) -> None:
        if chart is not None:
            drawn = svg(replace(chart, title=""), colours)
            hidden = any(first[what] != value for what, value in picks.items())
            figure = {"svg": drawn, "caption": chart.title, "picks": picks, "hidden": hidden}
            figures[section].append(figure)

    for name in scores:
        for cost in COSTS:
            add("cost", cost_chart(rows, name, cost), score=name)
        for k, guide in enumerate(rows.guides()[:_MOST_GUIDES]):
            add("steps", budgets_chart(rows, name, guide), score=name, guide=str(k))
    for count in options["steps"]:
        for name in scores:
            add("guidance", guidance_chart(rows, name, int(count)), steps=count)
    return figures


# ---- charts ----


def cost_chart(rows: Rows, score: str, cost: str) -> Chart | None:
    """A score against a cost, the Pareto front of each model joined; None without points."""
    points = rows.points(rows.scored(score), cost, score)
    kinds = grouped(points, lambda p: (rows.colours[p[2]], rows.kinds[p[2]]))
    errors = {i: rows.error(i, score) for *_, i in points}
    series = [
        _line(rows, own, style="", alpha=0.8,
              error=[errors[i] for *_, i in own] if any(errors.values()) else ())
        for own in kinds.values()
    ]  # fmt: skip
    several = len(rows.names) > 1
    for own in grouped(points, lambda p: rows.models[p[2]]).values():
        costs, values, _ = zip(*own, strict=True)
        front = pareto_front(costs, values, SCORES[score].lower_is_better)
        line = _path(rows, [own[k] for k in front], style="--")
        series.append(line if several else replace(line, colour=INK))
    title = "Each point is a row of the table; the dashed line joins the Pareto front: what "
    title += "nothing cheaper matches."
    if any(errors.values()):
        of = "deviation over parts" if score in ("kid", "is") else "error by the choice"
        title += f" Bars are one standard {of} of the samples."
    return _chart(title, COSTS[cost], score, series)


def budgets_chart(rows: Rows, score: str, guide: Guide) -> Chart | None:
    """Budget versus steps, the paper's figure: fewer latents or fewer steps, at the same cost."""
    own = [i for i in rows.scored(score) if guide_of(rows.rows[i]) == guide and i in rows.plain]
    points = rows.points(own, "gflops_per_image", score)
    series = []
    for (_, steps), equal in grouped(points, lambda p: rows.of(p[2], "steps")).items():
        series.append(_path(rows, equal, counted(steps, "step"), style=":", colour=INK))
    for (_, budget), equal in grouped(points, lambda p: rows.of(p[2], "budget")).items():
        series.append(_line(rows, equal, width=3 if budget == rows.budgets[-1] else 1.2))
    title = "Fewer latents or fewer steps at the same cost: a line for each budget, over the "
    title += "steps, the strong one at the highest; a dotted line joins equal steps."
    return _chart(title, COSTS["gflops_per_image"], score, series)


def guidance_chart(rows: Rows, score: str, steps: int) -> Chart | None:
    """A score over the scale of guidance at one number of steps, a line for a guide and a budget.

    At scale 1 every guide is no guidance: there each line starts, if that was measured.
    """

    def start_of(i: int) -> tuple[Any, ...]:
        """What a guided row shares with the unguided one that it starts from."""
        return (*rows.of(i, "budget"), rows.rows[i].get("sampler"))

    own = [i for i in rows.scored(score) if rows.rows[i]["steps"] == steps and i in rows.plain]
    starts = {start_of(i): (1.0, rows.score(i, score) or 0.0, i)
              for i in own if rows.kinds[i] == "none"}  # fmt: skip
    lines = grouped(
        rows.points(own, "scale", score),
        lambda p: (start_of(p[2]), guide_of(rows.rows[p[2]] | {"scale": None})),
    )
    series, used = [], set()
    for (start, (kind, *_)), points in lines.items():
        before = [starts[start]] if start in starts and points[0][0] > 1 else []
        used.update(before)
        dashes = _DASHES.get(kind, "-")
        series.append(_path(rows, before + points, _budget_name(start[1]), style=dashes))
        series.append(_line(rows, points, style=""))
    series += [_line(rows, [start]) for start in sorted(used)]
    title = f"{SCORES[score].title} over the scale at {counted(steps, 'step')}, a line for each "
    return _chart(f"{title}guide and budget.", "guidance scale", score, series, log_x=False)


def _line(rows: Rows, points: Sequence[Point], label: str = "", /, **how: Any) -> Line:
    x, y, numbers = zip(*points, strict=True)
    look = {
        "colour": rows.colours[numbers[0]], "rows": numbers,
        "marker": _MARKERS.get(rows.kinds[numbers[0]], "o"),
    }  # fmt: skip
    return Line(x, y, label, **(look | how))


def _path(rows: Rows, points: Sequence[Point], label: str = "", /, **how: Any) -> Line:
    """A thin line without its points."""
    return _line(rows, points, label, marker="", rows=(), width=1.2, alpha=0.75, **how)


def _chart(
    title: str, x: str, score: str, series: Sequence[Line], log_x: bool = True
) -> Chart | None:
    if not series:
        return None
    low, high = (which(y for line in series for y in line.y) for which in (min, max))
    log_y = low > 0 and high / low > _LOG_RATIO
    return Chart(
        title, x + " (log scale)" * log_x, SCORES[score].axis() + " (log scale)" * log_y, series,
        log_x=log_x, log_y=log_y, labels="start",
    )  # fmt: skip


def _budget_name(budget: float) -> str:
    return f"budget {format_budget(budget)}"


# ---- tables ----


def _columns(rows: Rows, scores: Sequence[str]) -> dict[str, list[str]]:
    """Columns of the table of all rows, those in which some row has something."""

    def of(key: str, write: Callable[[Any], Any] = lambda value: value) -> list[Any]:
        return [None if row.get(key) is None else write(row[key]) for row in rows.rows]

    samplers = of("sampler")
    columns = {
        "model": rows.models if len(rows.names) > 1 else [],
        "budget": of("budget", format_budget),
        "latents": of("num_latents"),
        "steps": of("steps"),
        "sampler": samplers if len(set(samplers)) > 1 else [],  # else the settings name it
        "guidance": of("guidance", lambda kind: GUIDES.get(kind, kind)),
        "scale": of("scale"),
        "guide budget": of("guide_budget", format_budget),
        "noise levels": of("interval", lambda i: "{:g} to {:g}".format(*i) * (tuple(i) != (0, 1))),
        "step cache": list(map(cache_name, rows.rows)),
        "skipped": of("skipped"),
        "calls": of("calls"),
        "GFLOPs": of("gflops_per_image"),
        "ms": of("ms_per_image"),
    }
    for name in scores:
        columns[SCORES[name].column()] = [rows.score(i, name) for i in range(len(rows.rows))]
    columns["way"] = of("searches", lambda of: ", ".join(dict.fromkeys(one["way"] for one in of)))
    fronts = ({"FLOPs": row.get("front_flops"), "ms": row.get("front_ms")} for row in rows.rows)
    columns["front"] = [", ".join(n for n, on in front.items() if on) for front in fronts]
    written = {title: list(map(_cell, cells)) for title, cells in columns.items()}
    return {title: cells for title, cells in written.items() if set(cells) - {"-"}}


def _best_table(rows: Rows, score: str) -> list[tuple[str, list[tuple]]]:
    """The best score of each model at or below each cost, if it wins, and how it is reached."""
    lines = []
    for cost, best in sweeps.best_at_costs(rows, score):
        winner = rows.best((i for i in best.values() if i is not None), score)
        cells = []
        for i in best.values():
            value = None if i is None else rows.score(i, score)
            how = "-" if i is None else sweeps.in_words(rows.rows[i])
            cells.append((_cell(value), value == winner, how))
        lines.append((_cell(cost), cells))
    return lines


def _cap_table(
    rows: Rows, found: Sequence[tuple[int, str]], scores: Sequence[str]
) -> list[tuple[str, ...]]:
    """What a search found within a cap: way, costs, score, and how; the best first."""
    name = scores[0]
    sign = 1 if SCORES[name].lower_is_better else -1
    own = [(i, way) for i, way in found if rows.score(i, name) is not None]
    own.sort(key=lambda pair: sign * (rows.score(pair[0], name) or 0.0))
    return [
        (way, *(_cell(rows.rows[i].get(cost)) for cost in COSTS),
         _cell(rows.score(i, name)), sweeps.in_words(rows.rows[i]))
        for i, way in own
    ]  # fmt: skip


def _cell(value: Any) -> str:
    """Text of a value; "-" of what is missing."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return str(value) if value or value == 0 else "-"


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
