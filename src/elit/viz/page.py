"""Pages that show a sweep: one HTML file each, which needs nothing else and asks nobody."""

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from elit.viz.axes import cycle, pale, ramp
from elit.viz.charts import ScoreInfo, markers
from elit.viz.facts import facts_of, stamp, training_flops
from elit.viz.figures import Rows
from elit.viz.sections import charts, hidden, key
from elit.viz.table import best_table, facts_table, rows_table

Sheets = Sequence[tuple[str, Image.Image]]

# Of budgets, from the lowest to the full one, which stands out most. Their lightness only rises or
# only falls, so that they are told apart without seeing their hues.
RAMPS = {
    "light": ("#bf8215", "#cf4f5a", "#6f3d96", "#1a2455"),
    "dark": ("#7f63cf", "#dc6480", "#f2a65a", "#fbeaa6"),
}


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
    shown = _shown_scores(rows, scores, report.get("ranked_by"))
    parameters = model.get("parameters")
    about = [str(model["class"])] if model.get("class") else []
    about += [f"{parameters:,} parameters"] if isinstance(parameters, int) else []
    about += ["elastic" if model.get("elastic") else "plain", training_flops(report)]
    header = f"<h1>{escape(name)}: quality against cost</h1><p>{escape(', '.join(about))}</p>"
    header += _warnings(rows)
    front = f"The fronts are by {_title(shown, report)}." if shown else ""
    sections = (
        header,
        charts(rows, shown, stamp(report)),
        _sheets(sheets),
        _table_section(rows, shown, front),
        _settings({name: report}),
    )
    return _page(name, sections, report, rows)


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
    rows = Rows(reports)
    ranked_by = next(iter(reports.values())).get("ranked_by")
    shown = _shown_scores(rows, scores, ranked_by)
    title = " and ".join(reports)
    models = "".join(
        f"<li>{key(k, 'none')}{escape(name)}: {escape(training_flops(report))}</li>"
        for k, (name, report) in enumerate(reports.items())
    )
    header = f'<h1>{escape(title)} side by side</h1><ul class="legend">{models}</ul>' + "".join(
        f'<p class="warning">{escape(note)}</p>' for note in notes
    )
    best = "".join(
        f'<div class="wide" data-score="{escape(score)}"{hidden(k)}>'
        f"{best_table(rows, score, info)}</div>"
        for k, (score, info) in enumerate(shown.items())
    )
    stamps = {name: stamp(report) for name, report in reports.items()}
    alike = len(set(stamps.values())) == 1
    stamped = stamps[rows.names[0]] if alike else "; ".join(map(": ".join, stamps.items()))
    best = f'<section id="best"><h2>Best score at or below a cost</h2>{best}</section>'
    sections = (
        header,
        charts(rows, shown, stamped),
        best,
        _sheets(sheets),
        _table_section(rows, shown, ""),
        _settings(reports),
    )
    return _page(title, sections, {"reports": reports}, rows)


def _warnings(rows: Rows) -> str:
    """What the rows warn of, each warning once, with the number of its rows."""
    counts = Counter(text for row in rows.rows for text in row.get("warnings") or ())
    return "".join(
        f'<p class="warning">{count} of {len(rows.rows)} rows: {escape(str(text))}</p>'
        for text, count in counts.most_common(5)
    )


def _page(title: str, sections: Sequence[str], data: Any, rows: Rows) -> str:
    """A file that holds all that it needs: style, script and numbers."""
    here = Path(__file__).parent
    style = (here / "page.css").read_text(encoding="utf-8")
    script = (here / "page.js").read_text(encoding="utf-8")
    colours, theme = _colours(rows)
    marks, rules = markers(colours)
    # A "<" could end the element that holds it.
    numbers = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    numbers = numbers.replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title>\n<style>\n{style}{theme}{rules}</style></head>\n"
        f"<body>{marks}<main>" + "\n".join(filter(None, sections)) + "</main>\n"
        '<div id="tip" hidden></div>\n'
        f'<script type="application/json" id="report">{numbers}</script>\n'
        f"<script>\n{script}</script></body></html>\n"
    )


def _shown_scores(rows: Rows, scores: Mapping[str, ScoreInfo], first: Any) -> dict[str, ScoreInfo]:
    """Scores that some row has, the one that the sweep ranks by first."""
    there = {name for i, row in enumerate(rows.rows) for name in row["scores"]}
    if unknown := sorted(there - set(scores)):
        raise ValueError(
            f"score {unknown[0]!r} has no title and no direction; give a ScoreInfo of it"
        )
    shown = [name for name in scores if rows.scored(name)]
    shown.sort(key=lambda name: name != first)
    return {name: scores[name] for name in shown}


def _table_section(rows: Rows, scores: Mapping[str, ScoreInfo], note: str) -> str:
    note = f"{note} Click a heading to sort. GFLOPs and ms are for one image, all calls together."
    return (
        f'<section id="table"><h2>All rows: {len(rows.rows)}</h2><p class="note">{escape(note)}</p>'
        f'<div class="wide">{rows_table(rows, scores)}</div></section>'
    )


def _settings(reports: Mapping[str, Mapping[str, Any]]) -> str:
    facts = {name: facts_of(report) for name, report in reports.items()}
    return (
        '<section id="settings"><h2>What these scores depend on</h2><div class="wide">'
        f"{facts_table(facts)}</div></section>"
    )


def _sheets(sheets: Sheets) -> str:
    figures = "".join(
        f'<figure><img src="{_data_uri(picture)}" width="{picture.width}" '
        f'height="{picture.height}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, picture in sheets
    )
    if not figures:
        return ""
    return f'<section id="sheets"><h2>Samples</h2><div class="sheets">{figures}</div></section>'


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _colours(rows: Rows) -> tuple[int, str]:
    """How many colours, and a class for each, light and dark."""
    if len(rows.names) > 1:
        light = cycle(len(rows.names))
        dark = [pale(colour, 0.65) for colour in light]
    else:
        light, dark = (ramp(RAMPS[theme], len(rows.budgets)) for theme in ("light", "dark"))
    day, night = (
        "\n".join(f".c{k} {{ color: {colour}; }}" for k, colour in enumerate(theme))
        for theme in (light, dark)
    )
    return len(light), f"{day}\n@media (prefers-color-scheme: dark) {{\n{night}\n}}\n"


def _title(scores: Mapping[str, ScoreInfo], report: Mapping[str, Any]) -> str:
    info = scores.get(str(report.get("ranked_by"))) or next(iter(scores.values()))
    return info.axis()


def _finite(value: Any) -> Any:
    """Plain types without what JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
