"""Figures of the claims, drawn by matplotlib (extra: plots) from plain types."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from elit._extras import missing
from elit._files import write_file
from elit.interface.budget import format_budget

_COLUMNS = 3
_SIZE = (5.2, 4.1)  # inches of a panel
_COLOURS = ("#4e79a7", "#e15759", "#59a14f", "#b07aa1", "#9c755f")
_MARKERS = "osD^v"
# Each form of a model has one colour in all figures: its place among the colours.
_FORMS = {
    "DiT": 0, "U-ViT": 0, "ELIT": 1, "ELIT-U-ViT": 1, "ELIT-MB": 2, "ELIT-U-ViT-MB": 2,
}  # fmt: skip
_STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "legend.edgecolor": "none", "svg.hashsalt": "elit", "svg.fonttype": "path",
}  # fmt: skip


def load_matplotlib() -> ModuleType:
    """Matplotlib, or a ValueError that says how to get it."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise ValueError(
            missing("the report of elit reproduce needs matplotlib", "plots")
        ) from error
    return matplotlib


def svg(figure: dict[str, Any]) -> str:
    """One figure as an <svg> element."""
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(_STYLE):
        canvas = matplotlib.figure.Figure(figsize=_SIZE, layout="constrained")
        draw(canvas.subplots(), figure)
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def save_sheet(figures: Sequence[dict[str, Any]], captions: Sequence[str], path: Path) -> None:
    """All figures as one PNG, the verdicts under them."""
    matplotlib = load_matplotlib()
    columns = min(_COLUMNS, len(figures))
    rows = math.ceil(len(figures) / columns)
    with matplotlib.rc_context(_STYLE):
        size = (_SIZE[0] * columns, (_SIZE[1] + 0.9) * rows)
        canvas = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
        for axis, figure, caption in zip(axes, figures, captions, strict=False):
            draw(axis, figure)
            axis.set_xlabel(f"{figure['x']}\n\n{caption}")
        for axis in axes[len(figures) :]:
            axis.set_axis_off()
        metadata = {"Software": None}
        write_file(path, lambda aside: canvas.savefig(aside, dpi=110, metadata=metadata))


def draw(axis: Any, figure: dict[str, Any]) -> None:
    """Draw a figure on axes of matplotlib."""
    lines = figure["series"]
    for i, line in enumerate(lines):
        place = _FORMS.get(line["label"], i) % len(_COLOURS)
        colour, marker = _COLOURS[place], _MARKERS[place]
        x, y, error = line["x"], line["y"], line["error"]
        if figure["kind"] == "bars":
            width = 0.8 / len(lines)
            middles = [value + (i - (len(lines) - 1) / 2) * width for value in x]
            axis.bar(middles, y, width, yerr=error, capsize=3, color=colour, label=line["label"])
        elif figure.get("bands"):
            axis.plot(x, y, color=colour, label=line["label"])
            low = [a - b for a, b in zip(y, error, strict=True)]
            high = [a + b for a, b in zip(y, error, strict=True)]
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        else:
            joined = "none" if figure["kind"] == "points" else "-"
            axis.errorbar(
                x, y, yerr=error, color=colour, marker=marker, markersize=4, capsize=3,
                linestyle=joined, label=line["label"],
            )  # fmt: skip
        for a, b, text in zip(x, y, line.get("texts", ()), strict=False):
            axis.annotate(
                text, (a, b), (4, 4), textcoords="offset points", fontsize=7, color=colour
            )
    _scale(axis, figure)
    axis.set_title(figure["title"], fontsize=10, loc="left")
    axis.set_xlabel(figure["x"])
    axis.set_ylabel(figure["y"])
    axis.legend(fontsize=8)


def _scale(axis: Any, figure: dict[str, Any]) -> None:
    """Scales, limits and names of the axes."""
    for name in ("x", "y"):
        if figure.get(f"log_{name}"):
            from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

            axis.set(**{f"{name}scale": "log"})
            scale = getattr(axis, f"{name}axis")
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            scale.set_minor_formatter(NullFormatter())
    if figure.get("budgets"):
        ticks = sorted({x for line in figure["series"] for x in line["x"]})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [format_budget(x) for x in ticks])
        axis.minorticks_off()
        axis.invert_xaxis()  # from the full budget down
    if "names" in figure:
        axis.set_xticks(range(len(figure["names"])), figure["names"])
    if figure["kind"] == "points":
        axis.set_xlim(-0.5, len(figure["names"]) - 0.5)
    if figure["kind"] == "bars" and not figure.get("zero"):  # differences are small
        values = [
            y + sign * e
            for line in figure["series"]
            for y, e in zip(line["y"], line["error"], strict=True)
            for sign in (1, -1)
        ]
        margin = 0.25 * (max(values) - min(values)) or 0.01
        axis.set_ylim(min(values) - margin, max(values) + margin)
    if figure.get("zero"):
        axis.axhline(0, color="black", linewidth=0.8)
    if figure.get("top") is not None and figure["top"] > figure.get("bottom", -math.inf):
        axis.set_ylim(top=figure["top"])
    if figure.get("bottom") is not None and figure["bottom"] < axis.get_ylim()[1]:
        axis.set_ylim(bottom=figure["bottom"])
