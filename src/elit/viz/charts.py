"""Charts drawn by matplotlib, as SVG for a page or as a picture; it is imported when one is drawn.

Nothing of matplotlib's global state stays changed: figures belong to no window system, and its
settings, which a process shares, are set and reset under a lock.
"""

import io
import math
import re
import textwrap
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image

from elit.interface.budget import format_budget

COLOURS = (
    "#1f5fbf", "#d9662b", "#2a9d6f", "#a63d8f", "#b8901d", "#5b6475", "#c23b3b", "#3aa6b9",
)  # fmt: skip
# The colours of a light and a dark page.
THEMES = COLOURS, tuple(f"color-mix(in srgb, {colour} 65%, white)" for colour in COLOURS)
# Of budgets, from the lowest to the full one, which stands out most. Their lightness only rises or
# only falls, so that they are told apart without seeing their hues.
RAMPS = {
    "light": ("#bf8215", "#cf4f5a", "#6f3d96", "#1a2455"),
    "dark": ("#7f63cf", "#dc6480", "#f2a65a", "#fbeaa6"),
}
INK, FAINT, GRID, PAPER = "#202124", "#5f656d", "#e4e6ea", "#ffffff"
_THEME = {INK: "ink", FAINT: "faint", GRID: "grid", PAPER: "paper"}  # variables of a page's style
_STYLE = {
    "font.size": 9, "font.family": "DejaVu Sans", "text.color": INK, "text.parse_math": False,
    "axes.labelcolor": INK, "axes.edgecolor": FAINT, "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titlesize": 10, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.8, "xtick.color": FAINT, "ytick.color": FAINT,
    "legend.frameon": False, "legend.fontsize": 8, "svg.fonttype": "none",
}  # fmt: skip
# Behind a text, that no line strikes it through.
_PLATE = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Line:
    """Points of one colour, and perhaps a line through them."""

    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    label: str = ""
    error: Sequence[float] = ()  # half length of each point's error bar
    texts: Sequence[str] = ()  # beside the points
    colour: int | str | None = None  # number of a colour, by default the line's own number
    marker: str = "o"  # matplotlib's sign of a shape; "" draws no points
    style: str = "-"  # matplotlib's sign of dashes; "" draws no line
    width: float = 1.5  # in points
    alpha: float = 1.0
    rows: Sequence[int] = ()  # number of each point, by which a page's script finds its row


@dataclass(frozen=True)
class Chart:
    """What a chart shows; x and y name the axes with their units and directions."""

    title: str
    x: str
    y: str
    series: Sequence[Line]
    kind: str = "lines"  # or "points", which are not joined, or "bars"
    names: Sequence[str] = ()  # of the places 0, 1, ... along x
    budgets: bool = False  # whether x is a budget, drawn from the full one down
    log_x: bool = False
    log_y: bool = False
    bands: bool = False  # whether errors are bands along the lines
    zero: bool = False  # whether to draw a line at 0, from which bars stand
    top: float | None = None
    bottom: float | None = None
    left: float | None = None
    labels: str = "inside"  # where lines are named: also "right" of all, or at their "start"


def svg(chart: Chart, colours: Sequence[str] = COLOURS) -> str:
    """A chart as an <svg> element, in the colours that the page names --c0, --c1, ..., --ink, ...

    A point of a row has its number as data-row. `colours` are those that the lines count.
    """
    file = io.StringIO()
    _save(file, [chart], colours, (4.6, 3.2), format="svg", transparent=True,
          metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))  # fmt: skip
    text = re.sub(r"<!--.*?-->", "", file.getvalue(), flags=re.DOTALL)
    text = " ".join(text[text.index("<svg") :].split())
    text = re.sub(r'<g id="rows-([\d-]+)">.*?</g> </g>', _with_rows, text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # each drawing has the same ones
    text = re.sub(r"font-family: [^;]*; ", "", text)  # the page's own
    text = re.sub(
        r' (?:d|x|y|transform)="[^"]*"', lambda a: re.sub(r"(\.\d)\d+", r"\1", a[0]), text
    )
    variables = _THEME | {colour: f"c{k}" for k, colour in enumerate(colours)}
    for colour, name in variables.items():
        text = text.replace(colour, f"var(--{name})")
    name = escape("; ".join(filter(None, (chart.title, chart.y, chart.x))))
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def picture(
    charts: Sequence[Chart],
    colours: Sequence[str] = COLOURS,
    size: tuple[float, float] = (6.4, 3.2),
    columns: int = 1,
    sentence: str = "",
) -> Image.Image:
    """Charts as a picture, row by row, below a sentence that says what they show.

    The size of each is in inches, of 125 pixels.
    """
    if not charts:
        raise ValueError("no charts; give at least one chart")
    file = io.BytesIO()
    columns = min(columns, len(charts))
    _save(file, charts, colours, size, columns, sentence, format="png", dpi=125)
    return Image.open(file).convert("RGB")


def run_chart(
    title: str,
    y: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    colours: Sequence[str] = COLOURS,
    smooth: bool = False,
) -> Chart:
    """Values of a run by their names, as (step, value) pairs, on a logarithmic axis.

    What is not positive and finite is left out, a few spikes leave the axis, and smooth curves are
    running means over pale lines.
    """
    lines, logs = [], [np.zeros(0)]
    for (name, points), colour in zip(curves.items(), cycle(colours), strict=False):
        drawn = np.array([p for p in points if 0 < p[1] < math.inf], float).reshape(-1, 2)
        steps, heights = drawn.T
        logs.append(np.log(heights))
        if smooth and len(steps) > 2:
            lines.append(Line(steps, heights, colour=colour, marker="", width=1, alpha=0.3))
            window = np.ones(2 * max(1, len(steps) // 50) + 1)
            counts = np.convolve(np.ones(len(steps)), window, "same")
            heights = np.exp(np.convolve(logs[-1], window, "same") / counts)
        marker = "o" if len(steps) < 30 else ""
        width = 3 if len(curves) > 1 and not lines else 1.5  # seen below one that covers it
        lines.append(Line(steps, heights, name, colour=colour, marker=marker, width=width))
    low, high = np.quantile(np.concatenate(logs), (0.002, 0.998)) if any(map(len, logs)) else (0, 0)
    margin = max(0.06 * (high - low), 0.02)
    return Chart(
        title, "training step", f"{y} (log scale)", lines, log_y=True, labels="right", left=0,
        bottom=math.exp(low - margin), top=math.exp(high + margin),
    )  # fmt: skip


def ramp(count: int, theme: str = "light") -> list[str]:
    """So many colours of budgets, the full one last."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    blend = LinearSegmentedColormap.from_list("budgets", RAMPS[theme])
    return [to_hex(blend(place)) for place in np.linspace(1 if count == 1 else 0, 1, count)]


def _save(
    file: Any,
    charts: Sequence[Chart],
    colours: Sequence[str],
    size: tuple[float, float],
    columns: int = 1,
    sentence: str = "",
    **how: Any,
) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    # Names within a drawing follow from what it shows: the same each time, others in each chart.
    style: dict[Any, Any] = _STYLE | {"svg.hashsalt": repr(charts)}
    with _LOCK, matplotlib.rc_context(style):
        rows = math.ceil(len(charts) / columns)
        alone = how["format"] == "svg"  # a page has many: a layout by hand takes half the time
        lines = textwrap.wrap(sentence, round(13 * size[0] * columns))
        height = size[1] * rows + 0.2 * len(lines)
        figure = Figure((size[0] * columns, height), layout=None if alone else "constrained")
        if lines:
            figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10)
        if alone:
            figure.subplots_adjust(0.125, 0.15, 0.985, 0.9 - 0.07 * bool(charts[0].title))
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, chart in zip(axes, charts, strict=False):
            _draw(axis, chart, colours)
            if alone:  # where no long name nor wide number pushes it out
                axis.set_ylabel("")
                name = "\n".join(filter(None, (chart.title, chart.y)))
                axis.set_title(name, loc="left", x=-0.1, fontsize=9)
        for axis in figure.axes[len(charts) :]:
            axis.set_axis_off()
        figure.savefig(file, **how)


def _draw(axis: Any, chart: Chart, colours: Sequence[str]) -> None:
    for i, line in enumerate(chart.series):
        number = i if line.colour is None else line.colour
        colour = number if isinstance(number, str) else colours[number % len(colours)]
        errors = np.asarray(line.error) if len(line.error) else None
        if chart.kind == "bars":
            width = 0.8 / len(chart.series)
            middles = np.asarray(line.x) + (i - (len(chart.series) - 1) / 2) * width
            axis.bar(
                middles, line.y, width, yerr=errors, capsize=3, color=colour, ecolor=INK,
                label=line.label,
            )  # fmt: skip
            continue
        if chart.bands and errors is not None:
            low, high = np.asarray(line.y) - errors, np.asarray(line.y) + errors
            axis.fill_between(line.x, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.errorbar(
            line.x, line.y, yerr=None if chart.bands else errors, capsize=3, color=colour,
            alpha=line.alpha, marker="" if chart.bands else line.marker,
            markersize=6.5 if line.rows else 4.5, markeredgecolor=PAPER, markeredgewidth=0.6,
            linestyle="" if chart.kind == "points" else line.style, linewidth=line.width,
            label=line.label, gid="rows-" + "-".join(map(str, line.rows)),
        )  # fmt: skip
        for *at, text in zip(line.x, line.y, line.texts, strict=False):
            axis.annotate(text, at, (4, 4), textcoords="offset points", fontsize=7, color=colour,
                          bbox=_PLATE)  # fmt: skip
    _scale(axis, chart)
    axis.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    if not any(len(line.x) for line in chart.series):
        axis.text(0.5, 0.5, "nothing yet", transform=axis.transAxes, ha="center", color=FAINT)
    elif chart.labels == "start":
        _name_starts(axis, chart.series)
    elif sum(bool(line.label) for line in chart.series) > (chart.labels == "right"):
        right = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        axis.legend(**(right if chart.labels == "right" else {}))


def _scale(axis: Any, chart: Chart) -> None:
    """Scales, limits and marks of the axes."""
    axis.set_xscale("log" if chart.log_x else "linear")
    axis.set_yscale("log" if chart.log_y else "linear")
    if chart.kind == "bars" and not chart.zero:  # differences are small
        ends = [np.add(bars.y, np.multiply(sign, bars.error if len(bars.error) else 0))
                for bars in chart.series for sign in (1, -1)]  # fmt: skip
        low, high = np.min(np.concatenate(ends)), np.max(np.concatenate(ends))
        margin = 0.25 * (high - low) or 0.01
        axis.set_ylim(low - margin, high + margin)
    if chart.zero:
        axis.axhline(0, color=INK, linewidth=0.8)
    if chart.top is not None and chart.top > (-math.inf if chart.bottom is None else chart.bottom):
        axis.set_ylim(top=chart.top)
    if chart.bottom is not None and chart.bottom < axis.get_ylim()[1]:
        axis.set_ylim(bottom=chart.bottom)
    if chart.left is not None:
        axis.set_xlim(left=chart.left)
    if chart.kind == "points":
        axis.set_xlim(-0.5, len(chart.names) - 0.5)
    for scale in (axis.xaxis, axis.yaxis):
        if scale.get_scale() == "log":
            _mark_log(scale)
    if not (chart.log_x or chart.budgets) and _all_whole(chart.series):
        axis.xaxis.get_major_locator().set_params(integer=True)
    if chart.budgets:
        ticks = sorted({x for line in chart.series for x in line.x})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [format_budget(x) for x in ticks])
        axis.invert_xaxis()
        axis.xaxis.minorticks_off()
    elif chart.names:
        every = math.ceil(len(chart.names) / 20)
        axis.set_xticks(range(0, len(chart.names), every), chart.names[::every])
        axis.grid(visible=False, axis="x")


def _all_whole(lines: Sequence[Line]) -> bool:
    return all(float(x).is_integer() for line in lines for x in line.x)


def _mark_log(scale: Any) -> None:
    """Mark a few round numbers of a logarithmic axis, also where it has less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, ScalarFormatter

    low, high = scale.get_view_interval()
    decades = math.log10(high / low)
    fine = {
        0.8: (1, 1.5, 2, 3, 4, 5, 7),
        1.5: (1, 2, 3, 5, 7),
        3: (1, 2, 5),
        5: (1, 3),
        math.inf: (1,),
    }
    subs = next(subs for most, subs in fine.items() if decades < most)
    wide = decades > 0.35
    scale.set_major_locator(LogLocator(subs=subs) if wide else MaxNLocator(5))
    scale.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}") if wide else ScalarFormatter())
    scale.minorticks_off()


def _name_starts(axis: Any, lines: Sequence[Line]) -> None:
    """Labels at the first points, each once, moved apart and kept within the axis."""
    axis.margins(y=0.12)  # a label above the highest point needs room too
    room = axis.transAxes.transform((-0.2, 0))
    axis.set_ylim(axis.get_ylim())  # else they are set when it is drawn
    axis.set_xlim(left=axis.transData.inverted().transform(room)[0])
    starts = {(line.label, line.x[0], line.y[0]) for line in lines if line.label and len(line.x)}
    ordered = sorted(starts, key=lambda start: (start[2], start[0]))
    points = [axis.transData.transform(start[1:]) * 72 / axis.figure.dpi for start in ordered]
    highest = axis.transAxes.transform((0, 1))[1] * 72 / axis.figure.dpi
    width = 4.4 * max((len(label) for label, *_ in ordered), default=0)  # of 7.5 points, about
    places: list[float] = []
    for i, (px, py) in enumerate(points):
        beside = [k for k in range(i) if abs(points[k][0] - px) < width]
        places.append(max([py, *(places[k] + 9 for k in beside)]))
    for i in reversed(range(len(places))):  # what rose above the axis goes down again
        beside = [k for k in range(i + 1, len(places)) if abs(points[k][0] - points[i][0]) < width]
        places[i] = min([places[i], highest, *(places[k] - 9 for k in beside)])
    # Left of the lines; of lines that start one after the other, where each doesn't go.
    side, ha, va = (-6.0, 0.0), "right", "center"
    if len({round(px) for px, _ in points}) == len(points) > 1:
        rising = [line.y[1] > line.y[0] for line in lines if line.label and len(line.y) > 1]
        below = sum(rising) > len(rising) / 2
        side, ha, va = (0.0, -5.0 if below else 5.0), "center", "top" if below else "bottom"
    for (label, x, y), (_, py), place in zip(ordered, points, places, strict=True):
        axis.annotate(
            label, (x, y), (side[0], side[1] + place - py), textcoords="offset points",
            fontsize=7.5, ha=ha, va=va, bbox=_PLATE,
        )  # fmt: skip


def _with_rows(group: re.Match[str]) -> str:
    """The points of a line, each with the number of its row, their common style once."""
    rows = iter(group[1].split("-"))
    text = re.sub(
        r'<use xlink:href="(#\w+)"( x="[^"]*" y="[^"]*") style="([^"]*)"/>',
        lambda use: f'<use href="{use[1]}"{use[2]} data-row="{next(rows)}" style="{use[3]}"/>',
        group[0],
    )
    style = re.search(r'<use [^>]*?( style="[^"]*")/>', text)
    if style is None:
        return text
    return re.sub("<g id=[^>]*", f"<g{style[1]}", text.replace(style[1] + "/>", "/>"), count=1)
