"""Sections of a page with their charts, pickers and legends."""

from collections.abc import Mapping, Sequence
from html import escape

from elit.interface.budget import format_budget
from elit.viz.charts import ScoreInfo, colour_and_shape
from elit.viz.figures import (
    KINDS,
    Guide,
    Rows,
    budgets_chart,
    cost_chart,
    guidance_chart,
    guide_name,
    guided_steps,
    guides_by_use,
    steps_chart,
)

_MOST_GUIDES = 12  # of the charts over steps and budgets


def charts(rows: Rows, scores: Mapping[str, ScoreInfo], stamped: str) -> str:
    """Pickers and all charts."""
    if not scores:
        return '<p class="warning">No row has a score yet: there is nothing to draw.</p>'
    guides = guides_by_use(rows)
    steps = guided_steps(rows)
    pickers = _picker("score", "Score", {name: info.title for name, info in scores.items()})
    if guides[1:]:
        pickers += _picker("guide", "Guide of the lines", {
            str(k): _guide_title(rows, guide) for k, guide in enumerate(guides[:_MOST_GUIDES])
        })  # fmt: skip
    if steps[1:]:
        pickers += _picker("steps", "Steps of the guidance", {str(n): str(n) for n in steps})
    return (
        f'<div class="picks">{pickers}</div><p class="stamp">{escape(stamped)}</p>'
        + _cost_section(rows, scores)
        + _steps_section(rows, scores, guides)
        + _guidance_section(rows, scores, steps)
    )


def _cost_section(rows: Rows, scores: Mapping[str, ScoreInfo]) -> str:
    figures = []
    for k, (name, info) in enumerate(scores.items()):
        for cost in ("gflops_per_image", "ms_per_image"):
            if svg := cost_chart(rows, name, info, cost):
                figures.append(f'<figure data-score="{escape(name)}"{hidden(k)}>{svg}</figure>')
    timed = any(row.get("ms_per_image") is not None for row in rows.rows)
    note = "" if timed else " No times were measured."
    return _section(
        "cost", "Score against cost", "A point is a row of the table. The dashed line joins the "
        f"Pareto front: what nothing cheaper matches.{note}", figures, _legend(rows),
    )  # fmt: skip


def _steps_section(rows: Rows, scores: Mapping[str, ScoreInfo], guides: Sequence[Guide]) -> str:
    figures = []
    for k, (name, info) in enumerate(scores.items()):
        for g, guide in enumerate(guides[:_MOST_GUIDES]):
            for draw in (budgets_chart, steps_chart):
                if svg := draw(rows, name, info, guide):
                    place = f'data-score="{escape(name)}" data-guide="{g}"{hidden(k or g)}'
                    figures.append(f"<figure {place}>{svg}</figure>")
    note = "Fewer latents or fewer steps? First chart: a thin line for each number of steps, over "
    note += "the budgets; the strong line is the highest budget, over the steps. Second chart: a "
    note += "line for each budget, over the steps."
    if guides:
        note += (
            f" Drawn with {guide_name(guides[0])}." if not guides[1:] else " One guide at a time."
        )
    if len(guides) > _MOST_GUIDES:
        note += f" Of {len(guides)} guides, the {_MOST_GUIDES} with the most rows are here."
    return _section("steps", "Budget versus steps", note, figures, _legend(rows, kinds=False))


def _guidance_section(rows: Rows, scores: Mapping[str, ScoreInfo], steps: Sequence[int]) -> str:
    figures = []
    for k, count in enumerate(steps):
        for name, info in scores.items():
            if svg := guidance_chart(rows, name, info, count):
                figures.append(f'<figure data-steps="{count}"{hidden(k)}>{svg}</figure>')
    note = "All scores over the scale of guidance, a line for each guide and budget. At scale 1 "
    note += "every guide is no guidance."
    return _section("guidance", "Guidance", note, figures, _legend(rows))


def _section(name: str, title: str, note: str, figures: Sequence[str], legend: str) -> str:
    if not figures:
        return ""
    return (
        f'<section id="{name}"><h2>{title}</h2><p class="note">{escape(note)}</p>'
        f'<div class="charts">{"".join(figures)}</div>{legend}</section>'
    )


def _legend(rows: Rows, kinds: bool = True) -> str:
    """Keys of the colours, and of the shapes."""
    several = len(rows.names) > 1
    words = rows.names if several else [f"budget {format_budget(b)}" for b in rows.budgets]
    items = [f"<li>{key(k, 'none')}{escape(text)}</li>" for k, text in enumerate(words)]
    there = [kind for kind in KINDS if any(row["guidance"] == kind for row in rows.rows)]
    if kinds:
        items += [f"<li>{key(None, kind)}{KINDS[kind]}</li>" for kind in there]
    return f'<ul class="legend">{"".join(items)}</ul>'


def key(colour: int | None, kind: str) -> str:
    """A legend's key: a colour's dot, or a kind's shape on its line."""
    classes = " ".join(colour_and_shape(colour, kind))
    line = f'<path class="line dashed {classes}" d="M-12 0H12"/>' if colour is None else ""
    return (
        f'<svg viewBox="-12 -7 24 14" aria-hidden="true">{line}'
        f'<path class="dots {classes}" d="M0 0h0"/></svg>'
    )


def _picker(name: str, label: str, options: Mapping[str, str]) -> str:
    listed = "".join(
        f'<option value="{escape(value)}">{escape(text)}</option>'
        for value, text in options.items()
    )
    return f'<label>{label} <select data-picks="{name}">{listed}</select></label>'


def _guide_title(rows: Rows, guide: Guide) -> str:
    """A guide's name, with the sampler where there are several."""
    samplers = {row.get("sampler") for row in rows.rows}
    return guide_name(guide) + (f", {guide[-1]}" if len(samplers) > 1 else "")


def hidden(number: int) -> str:
    """Only what the pickers choose first is shown at first."""
    return " hidden" if number else ""
