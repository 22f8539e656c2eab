"""Line charts drawn with Pillow alone: how a run goes, for those without TensorBoard."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elit.viz.axes import cycle, even_values, pale, round_values, short

# Sizes in pixels, drawn twice as large and shrunk, which smooths the lines.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 300, 64, 96, 34, 34
_SCALE = 2
_INK, _GRID, _FAINT = "#202124", "#e4e6ea", "#6b7078"

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A line of a chart: its name, its (x, y) points, and whether to show them smoothed too."""

    name: str
    points: Points
    smooth: bool = False


def line_charts(charts: Sequence[tuple[str, Sequence[Curve]]]) -> Image.Image:
    """Charts one below the other, with a logarithmic y-axis.

    Args:
        charts: a title and the curves of each; points that are not positive and finite are left
            out.
    """
    if not charts:
        raise ValueError("nothing to draw: give at least one chart")
    sheet = Image.new("RGB", (_WIDTH * _SCALE, _HEIGHT * len(charts) * _SCALE), "white")
    for i, (title, curves) in enumerate(charts):
        _Chart(sheet, i * _HEIGHT).draw(title, curves)
    return sheet.resize((_WIDTH, _HEIGHT * len(charts)), Image.Resampling.LANCZOS)


class _Chart:
    """One chart of a sheet: its axes, and where a point lies."""

    def __init__(self, sheet: Image.Image, top: int):
        self.pen = ImageDraw.Draw(sheet)
        self.box = (_LEFT, top + _TOP, _WIDTH - _RIGHT, top + _HEIGHT - _BOTTOM)
        self.font = ImageFont.load_default(size=12 * _SCALE)

    def draw(self, title: str, curves: Sequence[Curve]) -> None:
        """Title, grid, curves and their names."""
        left, top, right, bottom = self.box
        self.text((left, top - 16), title, _INK, "lm")
        lines = [(c, np.array(_drawable(c.points), float).reshape(-1, 2)) for c in curves]
        lines = [(curve, points) for curve, points in lines if len(points)]
        if not lines:
            self.text(((left + right) / 2, (top + bottom) / 2), "nothing yet", _FAINT, "mm")
            return
        everything = np.concatenate([points for _, points in lines])
        self.x = 0.0, float(everything[:, 0].max())
        # A first value or a spike far from the rest would press the rest into a line.
        heights = np.log(everything[:, 1])
        low, high = np.quantile(heights, 0.002), np.quantile(heights, 0.998)
        margin = max(0.06 * (high - low), 0.02)
        self.y = low - margin, high + margin
        self.axes()
        names = []
        for (curve, points), colour in zip(lines, cycle(len(lines)), strict=True):
            if curve.smooth:
                self.line(_thinned(points), pale(colour), 1)
                points = _smoothed(points)
            self.line(_thinned(points), colour, 2)
            names.append((self.place(points[-1:])[0][1], curve.name, colour))
        if len(lines) > 1:
            self.legend(names)

    def place(self, points: np.ndarray) -> list[tuple[float, float]]:
        """Pixels of points (n, 2), kept inside the box."""
        left, top, right, bottom = self.box
        x = left + (right - left) * (points[:, 0] - self.x[0]) / max(self.x[1] - self.x[0], 1e-9)
        share = (np.log(points[:, 1]) - self.y[0]) / (self.y[1] - self.y[0])
        y = bottom - (bottom - top) * share.clip(0, 1)
        return list(zip(x.tolist(), y.tolist(), strict=True))

    def axes(self) -> None:
        """Grid lines with their numbers: round ones."""
        left, top, right, bottom = self.box
        for value in round_values(math.exp(self.y[0]), math.exp(self.y[1])):
            ((_, y),) = self.place(np.array([[0.0, value]]))
            self.pen.line(_scaled([(left, y), (right, y)]), _GRID, _SCALE)
            self.text((left - 8, y), f"{value:.3g}", _FAINT, "rm")
        for value in even_values(self.x[1], self.x[1] / 6):
            ((x, _),) = self.place(np.array([[value, math.exp(self.y[0])]]))
            self.pen.line(_scaled([(x, top), (x, bottom)]), _GRID, _SCALE)
            self.text((x, bottom + 14), short(value), _FAINT, "mm")

    def line(self, points: np.ndarray, colour: str, width: int) -> None:
        """A line through the points; a dot where there is only one."""
        pixels = self.place(points)
        if len(pixels) == 1:
            ((x, y),) = pixels
            self.pen.ellipse(_scaled([(x - 3, y - 3), (x + 3, y + 3)]), colour)
            return
        self.pen.line(_scaled(pixels), colour, width * _SCALE, joint="curve")

    def legend(self, names: list[tuple[float, str, str]]) -> None:
        """Names at the ends of their lines, pushed apart where those lie close."""
        _, top, right, bottom = self.box
        names = sorted(names, key=lambda name: round(name[0] / 4))  # alike: in the order given
        heights = [max(y, top + 7 + 15 * i) for i, (y, _, _) in enumerate(names)]
        for i in range(1, len(heights)):
            heights[i] = max(heights[i], heights[i - 1] + 15)
        over = max(0.0, heights[-1] - (bottom + 7))
        for height, (_, name, colour) in zip(heights, names, strict=True):
            self.text((right + 10, height - over), name, colour, "lm")

    def text(self, place: tuple[float, float], text: str, colour: str, anchor: str) -> None:
        """A text at a place."""
        self.pen.text(_scaled([place])[0], text, fill=colour, font=self.font, anchor=anchor)


def _drawable(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if 0 < y < math.inf]


def _scaled(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x * _SCALE, y * _SCALE) for x, y in points]


def _smoothed(points: np.ndarray) -> np.ndarray:
    """Running geometric means over a fiftieth of the points to each side."""
    reach = max(1, len(points) // 50)
    total = np.concatenate([[0.0], np.log(points[:, 1]).cumsum()])
    at = np.arange(len(points))
    low, high = (at - reach).clip(0), (at + reach + 1).clip(max=len(points))
    return np.stack([points[:, 0], np.exp((total[high] - total[low]) / (high - low))], axis=1)


def _thinned(points: np.ndarray, most: int = 2000) -> np.ndarray:
    """At most so many points, evenly chosen, the last one among them."""
    return points[np.unique(np.linspace(0, len(points) - 1, most).round().astype(int))]
