"""Pages that show sweeps: one HTML file each, which needs nothing else and asks nobody."""

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from elit._pareto import is_number, pareto_front
from elit.interface.budget import format_budget
from elit.viz.charts import INK, RAMPS, THEMES, Chart, Line, ramp, svg
from elit.viz.sweeps import (
    KINDS,
    Guide,
    Rows,
    ScoreInfo,
    best_at_costs,
    facts_of,
    grouped,
    guide_name,
    guide_of,
    in_words,
    stamp,
    training_flops,
)

if TYPE_CHECKING:
    from jinja2 import Environment

Sheets = Sequence[tuple[str, Image.Image]]
Points = Sequence[tuple[float, float, int]]

COSTS = {"gflops_per_image": "GFLOPs per image", "ms_per_image": "ms per image"}
# Outlines of a point for each kind of guidance, of kinds unknown here the first.
_MARKERS = {"none": "o", "cfg": "s", "ag": "^", "ccfg": "D"}
_SIGNS = {"none": "●", "cfg": "■", "ag": "▲", "ccfg": "◆"}  # the same, of a legend
_DASHES = {"ag": "--", "ccfg": ":"}
_MOST_GUIDES = 12  # of the charts over steps and budgets
_LOG_RATIO = 10  # of the largest to the smallest score, beyond which they get a log axis


def sweep_page(
    report: Mapping[str, Any], scores: Mapping[str, ScoreInfo], sheets: Sheets = ()
) -> str:
    """HTML page of one sweep.

    Args:
        report: as `elit sweep` writes it.
        scores: title and direction of each score that the rows have, in the order to show them.
        sheets: captions and pictures: the same noise over the budgets.
    """
    model = report.get("model", {})
    name = str(model.get("path", "model"))
    rows = Rows({name: report})
    parameters = model.get("parameters")
    about = [str(model["class"])] if model.get("class") else []
    about += [f"{parameters:,} parameters"] if isinstance(parameters, int) else []
    about += ["elastic" if model.get("elastic") else "plain", training_flops(report)]
    counts = Counter(str(text) for row in rows.rows for text in row.get("warnings") or ())
    return _page(
        {name: report}, rows, scores, sheets, data=report, title=name,
        heading=f"{name}: quality against cost", about=", ".join(about),
        notes=[f"{k} of {len(rows.rows)} rows: {text}" for text, k in counts.most_common(5)],
    )  # fmt: skip


def compare_page(
    reports: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, ScoreInfo],
    sheets: Sheets = (),
    notes: Sequence[str] = (),
) -> str:
    """HTML page of two or more sweeps side by side, a colour for each model.

    Args:
        reports: by the models' names.
        scores: title and direction of each score, in the order to show them.
        sheets: captions and pictures.
        notes: what a reader must know of this comparison.
    """
    if len(reports) < 2:
        raise ValueError(f"{len(reports)} sweeps cannot be compared; give two or more")
    title = " and ".join(reports)
    return _page(
        reports, Rows(reports), scores, sheets, data={"reports": reports}, title=title,
        heading=f"{title} side by side", notes=notes,
    )  # fmt: skip


@cache
def templates() -> "Environment":
    """The templates of all pages; what they are given is escaped."""
    from jinja2 import Environment, FileSystemLoader

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _page(
    reports: Mapping[str, Mapping[str, Any]],
    rows: Rows,
    scores: Mapping[str, ScoreInfo],
    sheets: Sheets,
    data: Any,
    **words: Any,
) -> str:
    several = len(reports) > 1
    first_report = next(iter(reports.values()))
    shown = _shown_scores(rows, scores, first_report.get("ranked_by"))
    guides = rows.guides()
    steps = sorted({row["steps"] for row in rows.rows if is_number(row.get("scale"))}, reverse=True)
    samplers = {row.get("sampler") for row in rows.rows}
    options = {
        "score": {name: info.title for name, info in shown.items()},
        "guide": {
            str(k): guide_name(guide) + (f", {guide[-1]}" if len(samplers) > 1 else "")
            for k, guide in enumerate(guides[:_MOST_GUIDES])
        },
        "steps": {str(count): str(count) for count in steps},
    }
    themes = THEMES if several else [ramp(len(rows.budgets), theme) for theme in RAMPS]
    stamps = {name: stamp(report) for name, report in reports.items()}
    alike = len(set(stamps.values())) == 1
    names = rows.names if several else [f"budget {format_budget(b)}" for b in rows.budgets]
    facts = [facts_of(report) for report in reports.values()]
    return templates().get_template("sweep.html").render(
        words,
        data=_finite(data),
        themes=themes,
        colours=[(k % len(themes[0]), name) for k, name in enumerate(names)],
        signs=[(_SIGNS[k], KINDS[k]) for k in KINDS if any(r["guidance"] == k for r in rows.rows)],
        models=[(name, training_flops(report)) for name, report in reports.items()],
        several=several,
        options=options,
        figures=_figures(rows, shown, options, themes[0]),
        scores=shown,
        guides_note=_guides_note(guides),
        timed=any(row.get("ms_per_image") is not None for row in rows.rows),
        stamp=next(iter(stamps.values())) if alike else "; ".join(map(": ".join, stamps.items())),
        best={name: _best_table(rows, name, info) for name, info in shown.items() if several},
        sheets=[(caption, picture.size, _data_uri(picture)) for caption, picture in sheets],
        ranked=next(iter(shown.values())).axis() if shown and not several else "",
        columns=_columns(rows, shown),
        winners={info.column(): _cell(info.best(rows.score(i, name) for i in rows.scored(name)))
                 for name, info in shown.items()},
        count=len(rows.rows),
        facts={label: [one.get(label, "-") for one in facts] for own in facts for label in own},
    )  # fmt: skip


def _figures(
    rows: Rows, scores: Mapping[str, ScoreInfo], options: Mapping[str, Any], colours: Sequence[str]
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

    for name, info in scores.items():
        for cost in COSTS:
            add("cost", cost_chart(rows, name, info, cost), score=name)
        for k, guide in enumerate(rows.guides()[:_MOST_GUIDES]):
            add("steps", budgets_chart(rows, name, info, guide), score=name, guide=str(k))
    for count in options["steps"]:
        for name, info in scores.items():
            add("guidance", guidance_chart(rows, name, info, int(count)), steps=count)
    return figures


def _guides_note(guides: Sequence[Guide]) -> str:
    if len(guides) > _MOST_GUIDES:
        return f"Of {len(guides)} guides, the {_MOST_GUIDES} with the most rows are here."
    return f"Drawn with {guide_name(guides[0])}." if len(guides) == 1 else ""


# ---- charts ----


def cost_chart(rows: Rows, score: str, info: ScoreInfo, cost: str) -> Chart | None:
    """A score against a cost, the Pareto front of each model joined; None without points."""
    points = rows.points(rows.scored(score), cost, score)
    series = []
    for (colour, kind), own in grouped(
        range(len(points)), lambda k: (rows.colours[points[k][2]], rows.kinds[points[k][2]])
    ).items():
        series.append(_line([points[k] for k in own], colour, kind, style=""))
    for number, name in enumerate(rows.names):
        own = [point for point in points if rows.models[point[2]] == name]
        front = pareto_front([p[0] for p in own], [p[1] for p in own], info.lower_is_better)
        colour = number if len(rows.names) > 1 else INK
        series.append(_path([own[k] for k in front], colour, style="--"))
    title = "Each point is a row of the table; the dashed line joins the Pareto front: what "
    return _chart(f"{title}nothing cheaper matches.", COSTS[cost], info, series)


def budgets_chart(rows: Rows, score: str, info: ScoreInfo, guide: Guide) -> Chart | None:
    """Budget versus steps, the paper's figure: fewer latents or fewer steps, at the same cost."""
    own = [i for i in rows.scored(score) if guide_of(rows.rows[i]) == guide]
    series = []
    for (_, steps), members in grouped(own, lambda i: rows.of(i, "steps")).items():
        points = rows.points(members, "gflops_per_image", score)
        series.append(_path(points, INK, f"{steps} steps", style=":"))
    for (_, budget), members in grouped(own, lambda i: rows.of(i, "budget")).items():
        points = rows.points(members, "gflops_per_image", score)
        width = 3 if budget == rows.budgets[-1] else 1.2
        series.append(_line(points, rows.colours[members[0]], guide[0], width=width))
    title = "Fewer latents or fewer steps at the same cost: a line for each budget, over the "
    title += "steps, the strong one at the highest; a dotted line joins equal steps."
    return _chart(title, COSTS["gflops_per_image"], info, series)


def guidance_chart(rows: Rows, score: str, info: ScoreInfo, steps: int) -> Chart | None:
    """A score over the scale of guidance at one number of steps, a line for a guide and a budget.

    At scale 1 every guide is no guidance: there each line starts, if that was measured.
    """

    def start_of(i: int) -> tuple[str, Any, float]:
        """What a guided row shares with the unguided one that it starts from."""
        return rows.models[i], rows.rows[i].get("sampler"), rows.rows[i]["budget"]

    own = [i for i in rows.scored(score) if rows.rows[i]["steps"] == steps]
    plain = {start_of(i): i for i in own if rows.kinds[i] == "none"}
    guided = [i for i in own if is_number(rows.rows[i].get("scale"))]
    series, starts = [], {}
    for (start, (kind, *_)), members in grouped(
        guided, lambda i: (start_of(i), guide_of(rows.rows[i] | {"scale": None}))
    ).items():
        points = rows.points(members, "scale", score)
        colour, joined = rows.colours[members[0]], points
        if start in plain and points[0][0] > 1:
            i = plain[start]
            starts[i] = (1.0, rows.score(i, score) or 0.0, i)
            joined = [starts[i], *points]
        label = f"budget {format_budget(start[2])}"
        series.append(_path(joined, colour, label=label, style=_DASHES.get(kind, "-")))
        series.append(_line(points, colour, kind, style=""))
    series += [_line([starts[i]], rows.colours[i], "none") for i in sorted(starts)]
    title = f"{info.title} over the scale at {steps} steps, a line for each guide and budget."
    return _chart(title, "guidance scale", info, series, log_x=False)


def _line(points: Points, colour: int | str, kind: str, label: str = "", **how: Any) -> Line:
    x, y, rows = zip(*points, strict=True) if points else ((), (), ())
    marker = _MARKERS.get(kind, "o")
    return Line(x, y, label, colour=colour, marker=marker, rows=rows, **how)


def _path(points: Points, colour: int | str, label: str = "", style: str = "-") -> Line:
    """A thin line without its points."""
    line = _line(points, colour, "none", label, style=style, width=1.2, alpha=0.75)
    return replace(line, marker="", rows=())


def _chart(
    title: str,
    x: str,
    info: ScoreInfo,
    series: Sequence[Line],
    log_x: bool = True,
) -> Chart | None:
    series = [line for line in series if line.x]
    heights = [y for line in series for y in line.y]
    if not heights:
        return None
    log_y = min(heights) > 0 and max(heights) / min(heights) > _LOG_RATIO
    return Chart(
        title, x + " (log scale)" * log_x, info.axis() + " (log scale)" * log_y, series,
        log_x=log_x, log_y=log_y, labels="start",
    )  # fmt: skip


# ---- tables ----


def _columns(rows: Rows, scores: Mapping[str, ScoreInfo]) -> dict[str, list[str]]:
    """Columns of the table of all rows, those in which some row has something."""

    def of(key: str, write: Callable[[Any], Any] = lambda value: value) -> list[Any]:
        return [None if row.get(key) is None else write(row[key]) for row in rows.rows]

    columns = {
        "model": rows.models if len(rows.names) > 1 else [],
        "budget": of("budget", format_budget),
        "latents": of("num_latents"),
        "steps": of("steps"),
        "sampler": of("sampler")
        if len(set(of("sampler"))) > 1
        else [],  # else the settings name it
        "guidance": of("guidance", lambda kind: KINDS.get(kind, kind)),
        "scale": of("scale"),
        "guide budget": of("guide_budget", format_budget),
        "noise levels": of("interval", lambda i: "{:g} to {:g}".format(*i) * (tuple(i) != (0, 1))),
        "calls": of("calls"),
        "GFLOPs": of("gflops_per_image"),
        "ms": of("ms_per_image"),
    }
    for name, info in scores.items():
        columns[info.column()] = [rows.score(i, name) for i in range(len(rows.rows))]
    fronts = ({"FLOPs": row.get("front_flops"), "ms": row.get("front_ms")} for row in rows.rows)
    columns["front"] = [", ".join(n for n, on in front.items() if on) for front in fronts]
    written = {title: list(map(_cell, cells)) for title, cells in columns.items()}
    return {title: cells for title, cells in written.items() if set(cells) - {"-"}}


def _best_table(rows: Rows, score: str, info: ScoreInfo) -> list[tuple[str, list[tuple]]]:
    """The best score of each model at or below each cost, if it wins, and how it is reached."""
    lines = []
    for cost, best in best_at_costs(rows, score, info):
        values = [None if i is None else rows.score(i, score) for i in best.values()]
        winner = info.best(values)
        how = ["-" if i is None else in_words(rows.rows[i]) for i in best.values()]
        wins = [value == winner for value in values]
        lines.append((_cell(cost), list(zip(map(_cell, values), wins, how, strict=True))))
    return lines


def _cell(value: Any) -> str:
    """Text of a value; "-" of what is missing."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return str(value) if value or value == 0 else "-"


# ---- data ----


def _shown_scores(rows: Rows, scores: Mapping[str, ScoreInfo], first: Any) -> dict[str, ScoreInfo]:
    """Scores that some row has, the one that the sweep ranks by first."""
    there = {name for row in rows.rows for name in row["scores"]}
    if unknown := sorted(there - set(scores)):
        raise ValueError(
            f"score {unknown[0]!r} has no title and no direction; give a ScoreInfo of it"
        )
    shown = [name for name in scores if rows.scored(name)]
    return {name: scores[name] for name in sorted(shown, key=lambda name: name != first)}


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _finite(value: Any) -> Any:
    """Plain types without what JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
