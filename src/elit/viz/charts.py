"""Charts for a page, as SVG whose colours and shapes the page's style sheet gives.

Points are markers on the corners of a path, the shortest way to write them, and carry the numbers
of the rows that they stand for, for the page's script to name.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from elit.viz.axes import distinct, even_values, round_values

# In units of the drawing, which is scaled to the place that it gets.
WIDTH, HEIGHT = 440, 300
BOX = 50.0, 30.0, 428.0, 258.0  # left, top, right, bottom of the axes
_LETTER = 6.2  # width of one, about
_LOG_RATIO = 10  # of the largest to the smallest value, beyond which scores get a log axis

# Outlines of a point, one for each kind of guidance; the first for kinds unknown here.
SHAPES = {
    "none": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "cfg": "M-3.5-3.5h7v7h-7z",
    "ag": "M0-4.6l4.3 7.8h-8.6z",
    "ccfg": "M0-5l5 5-5 5-5-5z",
}


@dataclass(frozen=True)
class ScoreInfo:
    """What a score is called, and whether lower is better."""

    title: str
    lower_is_better: bool

    def axis(self) -> str:
        """Title with its direction."""
        return f"{self.title}, {'lower' if self.lower_is_better else 'higher'} is better"


@dataclass(frozen=True)
class Series:
    """Points of one colour and shape, and perhaps a line through them.

    Attributes:
        points: (x, y, number of the row).
        colour: number of a colour of the page; None is the ink of the text.
        kind: guidance, which gives points their shape.
        line: classes of the line: thin, strong, front, dashed; "" draws none.
        dots: whether to draw the points.
        label: stands above the first point, or before it where all lines begin at one x.
    """

    points: Sequence[tuple[float, float, int]]
    colour: int | None = None
    kind: str = "none"
    line: str = ""
    dots: bool = True
    label: str = ""


class Axis:
    """A range of values, and where in it a value lies.

    Args:
        values: at least one; above 0 on a logarithmic axis.
        log: whether it is logarithmic.
        ticks: values to mark; else round ones.
        room: to leave free before the lowest, a share of the range.
    """

    def __init__(
        self,
        values: Iterable[float],
        *,
        log: bool = False,
        ticks: Sequence[float] = (),
        room: float = 0.0,
    ):
        values = list(values)
        self.log, low, high = log, min(values), max(values)
        if log:
            margin = max(0.05 * math.log(high / low), 0.05)
            span = math.log(high / low) + 2 * margin
            self.low, self.high = low * math.exp(-margin - room * span), high * math.exp(margin)
        else:
            margin = max(0.06 * (high - low), 0.005 * max(abs(low), abs(high))) or 0.5
            span = high - low + 2 * margin
            self.low, self.high = low - margin - room * span, high + margin
        self.ticks = list(ticks) or self._round_ticks()

    def _round_ticks(self) -> list[float]:
        if self.log:
            return round_values(self.low, self.high)
        return even_values(self.high, (self.high - self.low) / 6, self.low)

    def share(self, value: float) -> float:
        """0 at the lowest value, 1 at the highest."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def chart(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    *,
    log_x: bool = True,
    x_ticks: Sequence[float] = (),
) -> str:
    """SVG of a chart; its score axis is logarithmic where the scores differ much.

    Args:
        series: at least one point in all; on a log axis, x above 0.
        x_title: what goes along, with its unit.
        y_title: what goes up, with its direction.
        log_x: whether x is logarithmic.
        x_ticks: values to mark; else round ones.
    """
    points = [point for one in series for point in one.points]
    heights = [y for _, y, _ in points]
    log_y = min(heights) > 0 and max(heights) / min(heights) > _LOG_RATIO
    before = len({one.points[0][0] for one in series if one.label}) == 1
    longest = max((len(one.label) for one in series), default=0) if before else 0
    room = longest * _LETTER / (BOX[2] - BOX[0])
    x = Axis((point[0] for point in points), log=log_x, ticks=x_ticks, room=room)
    y = Axis(heights, log=log_y)
    y_title += " (log scale)" if log_y else ""
    paths = "".join(_path(one, x, y) for one in series)
    name = escape(f"{y_title}; {x_title}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">'
        f"{_x_axis(x, x_title)}{_y_axis(y, y_title)}{paths}"
        f"{_labels(series, x, y, before)}</svg>"
    )


def _place(point: tuple[float, float, int], x: Axis, y: Axis) -> tuple[float, float]:
    left, top, right, bottom = BOX
    return left + (right - left) * x.share(point[0]), bottom - (bottom - top) * y.share(point[1])


def _path(one: Series, x: Axis, y: Axis) -> str:
    places = (_place(point, x, y) for point in one.points)
    path = " ".join(f"{_brief(px)} {_brief(py)}" for px, py in places)
    alone = "h0" if len(one.points) == 1 else ""  # or it would have no corner to mark
    classes = [f"line {one.line}"] if one.line else []
    classes += ["dots"] if one.dots else []
    rows = " ".join(str(row) for _, _, row in one.points)
    numbered = f' data-rows="{rows}"' if one.dots else ""
    names = " ".join([*classes, *colour_and_shape(one.colour, one.kind)])
    return f'<path class="{names}"{numbered} d="M{path}{alone}"/>'


def colour_and_shape(colour: int | None, kind: str) -> tuple[str, str]:
    """The classes of a mark."""
    return "ink" if colour is None else f"c{colour}", f"k-{kind if kind in SHAPES else 'none'}"


def markers(colours: int) -> tuple[str, str]:
    """An SVG of no size with the marks of so many colours, and the style that puts them there."""
    marks, rules = [], []
    for colour in (None, *range(colours)):
        for kind, shape in SHAPES.items():
            name = "-".join(colour_and_shape(colour, kind))
            marks.append(
                f'<marker id="{name}" viewBox="-6 -6 12 12" markerWidth="12" markerHeight="12" '
                f'markerUnits="userSpaceOnUse"><path class="{name.split("-")[0]}" d="{shape}"/>'
                "</marker>"
            )
            classes = ".".join(colour_and_shape(colour, kind))
            rules.append(f".dots.{classes}{{marker:url(#{name})}}")
    return f'<svg class="marks" aria-hidden="true">{"".join(marks)}</svg>', "\n".join(rules)


def _x_axis(axis: Axis, title: str) -> str:
    left, top, right, bottom = BOX
    parts, free = [], -math.inf
    for value, text in zip(axis.ticks, distinct(axis.ticks), strict=True):
        x = left + (right - left) * axis.share(value)
        parts.append(f'<path class="grid" d="M{_brief(x)} {_brief(top)}V{_brief(bottom)}"/>')
        half = len(text) * _LETTER / 2
        if x - half > free:  # else it would cover the one before
            parts.append(_text(min(x, WIDTH - half), bottom + 16, text, "tick middle"))
            free = x + half + 4
    return "".join(parts) + _text((left + right) / 2, HEIGHT - 8, title, "middle")


def _y_axis(axis: Axis, title: str) -> str:
    left, top, right, bottom = BOX
    parts = []
    for value, text in zip(axis.ticks, distinct(axis.ticks), strict=True):
        y = bottom - (bottom - top) * axis.share(value)
        parts.append(f'<path class="grid" d="M{_brief(left)} {_brief(y)}H{_brief(right)}"/>')
        parts.append(_text(left - 6, y + 4, text, "tick end"))
    return "".join(parts) + _text(4, 16, title, "")


def _labels(series: Sequence[Series], x: Axis, y: Axis, before: bool) -> str:
    """Labels before or above the first points, those left out that would cover others.

    Before them they are moved apart, as far as there is room; lines that begin in one point share
    their label.
    """
    starts = {(one.label, one.points[0][:2]): one.points[0] for one in series if one.label}
    places = [_place(point, x, y) for point in starts.values()]
    heights = [py + 4 if before else max(py - 9, BOX[1] + 6) for _, py in places]
    if before:
        heights = _apart(heights, BOX[1] + 6, BOX[3])
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for (label, _), (px, _), py in zip(starts, places, heights, strict=True):
        half = len(label) * _LETTER / 2
        px = min(max(px - half - 8 if before else px, BOX[0] + half), WIDTH - half)
        if all(abs(px - x) > half + h + 3 or abs(py - y) > 11 for x, y, h in taken):
            taken.append((px, py, half))
            parts.append(_text(px, py, label, "label middle"))
    return "".join(parts)


def _apart(heights: Sequence[float], low: float, high: float, gap: float = 12) -> list[float]:
    """Heights in their order, moved as little as keeps them apart and within; or as they are."""
    count = len(heights)
    if (count - 1) * gap > high - low:
        return list(heights)
    order = sorted(range(count), key=heights.__getitem__)
    blocks: list[tuple[float, int]] = []  # mean of what moves as one, less its gaps, and how many
    for k, i in enumerate(order):
        mean, size = heights[i] - k * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, more = blocks.pop()
            mean, size = (mean * size + other * more) / (size + more), size + more
        blocks.append((mean, size))
    means = (mean for mean, size in blocks for _ in range(size))
    moved = [0.0] * count
    for k, (i, mean) in enumerate(zip(order, means, strict=True)):
        moved[i] = min(max(mean, low), high - (count - 1) * gap) + k * gap
    return moved


def _text(x: float, y: float, text: str, classes: str) -> str:
    return f'<text x="{_brief(x)}" y="{_brief(y)}" class="{classes}">{escape(text)}</text>'


def _brief(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
