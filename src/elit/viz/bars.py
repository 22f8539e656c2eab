"""Bar charts drawn with Pillow alone, with an error bar on each."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from elit.viz.axes import COLOURS, even_values
from elit.viz.curves import _FAINT, _GRID, _INK

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 260, 72, 20, 34, 44
_SCALE = 2  # drawn twice as large and shrunk, which smooths the lines


def bar_chart(
    title: str,
    values: Sequence[float],
    errors: Sequence[float | None],
    names: Sequence[str],
    about_names: str = "",
) -> Image.Image:
    """One bar for each value, from 0 up or down.

    Args:
        title: in words.
        values: finite numbers.
        errors: half length of each error bar; None has none.
        names: below the bars; where there are many, only some are written.
        about_names: what the names are.
    """
    if not values or not len(values) == len(errors) == len(names):
        raise ValueError(
            f"{len(values)} values, {len(errors)} errors and {len(names)} names; give as many of "
            f"each, at least one"
        )
    if not all(map(math.isfinite, values)):
        raise ValueError("a bar has no height that is not a finite number")
    sheet = Image.new("RGB", (_WIDTH * _SCALE, _HEIGHT * _SCALE), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12 * _SCALE)
    ends = [(v - (e or 0), v + (e or 0)) for v, e in zip(values, errors, strict=True)]
    low, high = min(0.0, *(e[0] for e in ends)), max(0.0, *(e[1] for e in ends))
    span = (high - low) or 1.0
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / span

    def text(place: tuple[float, float], words: str, colour: str, anchor: str) -> None:
        pen.text((place[0] * _SCALE, place[1] * _SCALE), words, colour, font, anchor=anchor)

    def box(x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        pen.rectangle([v * _SCALE for v in (x0, min(y0, y1), x1, max(y0, y1))], colour)

    text((left, _TOP / 2), title, _INK, "lm")
    text(((left + right) / 2, _HEIGHT - 12), about_names, _FAINT, "mm")
    steps = even_values(max(high, -low), span / 4)
    for value in sorted({*steps, *(-s for s in steps)}):
        if low <= value <= high:
            box(left, y(value) - 0.25, right, y(value) + 0.25, _GRID)
            text((left - 8, y(value)), f"{value:.3g}", _FAINT, "rm")
    width = (right - left) / len(values)
    every = math.ceil(len(values) / 20)
    for i, (value, (lower, upper)) in enumerate(zip(values, ends, strict=True)):
        middle = left + (i + 0.5) * width
        box(middle - 0.36 * width, y(0), middle + 0.36 * width, y(value), COLOURS[0])
        if upper > lower:
            box(middle - 0.5, y(lower), middle + 0.5, y(upper), _INK)
        if i % every == 0:
            text((middle, bottom + 12), names[i], _FAINT, "mm")
    box(left, y(0) - 0.5, right, y(0) + 0.5, _INK)
    return sheet.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)
