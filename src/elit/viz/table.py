"""Tables of a page: all rows of a sweep, and the best at each cost."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from elit._pareto import is_number
from elit.interface.budget import format_budget
from elit.viz.charts import ScoreInfo
from elit.viz.figures import KINDS, Row, Rows, best_at_costs, guide_name, guide_of

Cell = tuple[str, str]  # text, and what to sort by where that is something else


def rows_table(rows: Rows, scores: Mapping[str, ScoreInfo]) -> str:
    """Every row; columns in which no row has anything are left out."""
    samplers = [_text(row.get("sampler")) for row in rows.rows]
    if len(set(samplers)) == 1:  # the settings name it
        samplers = [_text(None)] * len(samplers)
    columns = [
        ("budget", "", [_budget(row["budget"]) for row in rows.rows]),
        ("latents", "", [_number(row.get("num_latents")) for row in rows.rows]),
        ("steps", "", [_number(row["steps"]) for row in rows.rows]),
        ("sampler", "t", samplers),
        ("guidance", "t", [_text(KINDS.get(r["guidance"], r["guidance"])) for r in rows.rows]),
        ("scale", "", [_number(row.get("scale")) for row in rows.rows]),
        ("guide budget", "", [_budget(row.get("guide_budget")) for row in rows.rows]),
        ("noise levels", "t", [_interval(row.get("interval")) for row in rows.rows]),
        ("calls", "", [_number(row.get("calls")) for row in rows.rows]),
        ("GFLOPs", "", [_number(row.get("gflops_per_image")) for row in rows.rows]),
        ("ms", "", [_number(row.get("ms_per_image")) for row in rows.rows]),
    ]
    if len(rows.names) > 1:
        columns.insert(0, ("model", "t", [_text(name) for name in rows.models]))
    best: dict[str, set[int]] = {}
    for name, info in scores.items():
        title = f"{info.title} {'↓' if info.lower_is_better else '↑'}"
        best[title] = _best_rows(rows, name, info)
        values = [rows.score(i, name) for i in range(len(rows.rows))]
        columns.append((title, "", [_number(value) for value in values]))
    columns.append(("front", "t", [_front(row) for row in rows.rows]))
    columns = [column for column in columns if any(text != "-" for text, _ in column[2])]
    head = "".join(_head(title, classes) for title, classes, _ in columns)
    body = "".join(
        f'<tr data-row="{i}">'
        + "".join(_cell(cells[i], kind, i in best.get(title, ())) for title, kind, cells in columns)
        + "</tr>"
        for i in range(len(rows.rows))
    )
    return f'<table id="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def best_table(rows: Rows, score: str, info: ScoreInfo) -> str:
    """The best score of each model at or below each cost, and how it is reached."""
    lines = []
    for cost, best in best_at_costs(rows, score, info):
        values = {name: rows.score(i, score) for name, i in best.items() if i is not None}
        found = [value for value in values.values() if value is not None]
        winner = (min if info.lower_is_better else max)(found)
        cells = []
        for name in rows.names:
            i, value = best[name], values.get(name)
            cells.append(_cell(_number(value), "", len(rows.names) > 1 and value == winner))
            cells.append(_cell(("-" if i is None else in_words(rows.rows[i]), ""), "t"))
        lines.append(f"<tr>{_cell(_number(cost), '')}{''.join(cells)}</tr>")
    heads = "".join(
        f"<th>{escape(name)}</th>" + '<th class="t">reached with</th>' for name in rows.names
    )
    return (
        f"<table><thead><tr><th>GFLOPs per image, at most</th>{heads}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def facts_table(facts: Mapping[str, Mapping[str, str]]) -> str:
    """Facts of each model beside each other, those that differ marked."""
    names = list(facts)
    labels = list(dict.fromkeys(label for own in facts.values() for label in own))
    lines = []
    for label in labels:
        values = [facts[name].get(label, "-") for name in names]
        differs = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f"<tr{differs}><th>{escape(label)}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    head = f"<thead><tr><th></th>{head}</tr></thead>" if len(names) > 1 else ""
    return f'<table class="facts">{head}<tbody>{"".join(lines)}</tbody></table>'


def in_words(row: Row) -> str:
    """How a row was drawn: 'budget 1/4, 20 steps, cheap CFG 3, guide 1/16'."""
    return (
        f"budget {format_budget(row['budget'])}, {row['steps']} steps, {guide_name(guide_of(row))}"
    )


def _best_rows(rows: Rows, name: str, info: ScoreInfo) -> set[int]:
    values = {i: rows.score(i, name) or 0.0 for i in rows.scored(name)}
    best = (min if info.lower_is_better else max)(values.values(), default=None)
    return {i for i, value in values.items() if value == best}


def _head(name: str, classes: str) -> str:
    kind = f' class="{classes}"' if classes else ""
    return f"<th{kind}><button>{escape(name)}</button></th>"


def _cell(cell: Cell, classes: str, best: bool = False) -> str:
    text, key = cell
    names = " ".join(filter(None, [classes, "best" if best else ""]))
    kind = f' class="{names}"' if names else ""
    sort = f' data-v="{escape(key)}"' if key else ""
    return f"<td{kind}{sort}>{escape(text)}</td>"


def _text(value: Any) -> Cell:
    return ("-" if value is None else str(value)), ""


def _number(value: Any) -> Cell:
    if not is_number(value):
        return "-", ""
    return (str(value) if isinstance(value, int) else f"{value:.4g}"), ""


def _budget(value: Any) -> Cell:
    if not is_number(value):
        return "-", ""
    text = format_budget(value)
    return text, f"{value:.6g}" if "/" in text else ""


def _interval(value: Sequence[float] | None) -> Cell:
    if value is None or tuple(value) == (0, 1):
        return "-", ""
    return f"{value[0]:g} to {value[1]:g}", ""


def _front(row: Row) -> Cell:
    names = [name for name in ("flops", "ms") if row.get(f"front_{name}")]
    return (", ".join(names).replace("flops", "FLOPs") or "-"), ""
