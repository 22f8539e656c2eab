"""Maps of numbers over an image, and sheets of them with their scales: Pillow pastes, exact to the
pixel, what matplotlib's colours paint.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elit.viz.sheet import MARGIN, contact_sheet, enlargement, stack, titled

Array = np.ndarray

_BAR = 10  # pixels, height of a colour bar
_MANY = 50  # numbers of a column, of which the outermost 2 % do not set its scale
_INSET = 4  # pixels between a bar's end and its number: bars stand side by side


@dataclass
class Column:
    """A column of a sheet: what it is, and its pictures or its maps."""

    title: str
    images: Sequence[Image.Image] = ()  # one for each row; or
    maps: Array | None = None  # (rows, h, w) numbers, which get one scale for the whole column
    # numbers of the darkest and the lightest colour; by default the least and the largest of the
    # maps, of many maps without a few outliers; none of pictures
    scale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.maps is not None and self.scale is None:
            finite = self.maps[np.isfinite(self.maps)]
            ends = (0.02, 0.98) if finite.size >= _MANY else (0.0, 1.0)
            low, high = np.quantile(finite, ends) if finite.size else (0.0, 0.0)
            self.scale = float(low), float(high)

    @property
    def beyond(self) -> tuple[bool, bool]:
        """Whether some number is below the scale, and above."""
        if self.maps is None or self.scale is None:
            return False, False
        finite = self.maps[np.isfinite(self.maps)]
        return bool((finite < self.scale[0]).any()), bool((finite > self.scale[1]).any())


def colours(values: Array, low: float, high: float) -> Array:
    """Numbers (...) as colours (..., 3) uint8, dark to light; what is not finite is grey.

    Numbers outside of low..high get the colour of its ends; where those are the same, the middle.
    """
    from matplotlib import colormaps

    values = np.ma.masked_invalid(np.asarray(values, float))
    share = (values - low) / (high - low) if high > low else values * 0 + 0.5
    paint = colormaps["inferno"].with_extremes(bad="#808080")
    return np.asarray(paint(np.ma.atleast_1d(share), bytes=True))[..., :3].reshape(*values.shape, 3)


def heatmap(values: Array, size: tuple[int, int], scale: tuple[float, float]) -> Image.Image:
    """A map (h, w) as a picture of some (width, height) in pixels, each number a rectangle."""
    return Image.fromarray(colours(values, *scale)).resize(size, Image.Resampling.NEAREST)


def overlay(image: Image.Image, values: Array, scale: tuple[float, float]) -> Image.Image:
    """A map (h, w) laid over an image, which shines through in grey; it has the image's size."""
    grey = image.convert("L").convert("RGB")
    return Image.blend(grey, heatmap(values, image.size, scale), 0.6)


def colour_bar(
    scale: tuple[float, float], width: int, beyond: tuple[bool, bool] = (False, False)
) -> Image.Image:
    """The colours from left to right with the numbers at both ends below."""
    low, high = scale
    bar = Image.new("RGB", (width, _BAR + 16), "white")
    bar.paste(heatmap(np.linspace(low, high, width)[None], (width, _BAR), scale))
    pen, font = ImageDraw.Draw(bar), ImageFont.load_default(size=11)
    below, above = "<" * beyond[0], ">" * beyond[1]
    ends = [(0.0, "la", f"{below}{low:.3g}"), (1.0, "ra", f"{above}{high:.3g}")]
    for share, anchor, text in ends if low < high else [(0.5, "ma", f"all {low:.3g}")]:
        x = _INSET + share * (width - 2 * _INSET)
        pen.text((x, _BAR + 3), text, "black", font, anchor=anchor)
    return bar


def map_sheet(
    columns: Sequence[Column],
    row_captions: Sequence[str] = (),
    cell: int = 112,
    title: str = "",
) -> Image.Image:
    """Pictures and maps side by side, a colour bar below each column of maps.

    Args:
        columns: of as many rows each.
        row_captions: a caption for each row, or none at all.
        cell: least longer side of a picture, in pixels.
        title: above all.
    """
    counts = {len(c.images) if c.maps is None else len(c.maps) for c in columns}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"columns of {sorted(counts)} rows; give one or more, of as many rows")
    # Cells are a whole number of times as large as the pictures, else as the maps.
    shapes = [c.images[0].size if c.maps is None else c.maps.shape[:0:-1] for c in columns]
    pictures = [shape for shape, c in zip(shapes, columns, strict=True) if c.maps is None]
    width, height = (pictures or shapes)[0]
    factor = enlargement((width, height), cell)
    size = width * factor, height * factor
    drawn = [
        [image.convert("RGB").resize(size, Image.Resampling.NEAREST) for image in column.images]
        if column.maps is None
        else [heatmap(values, size, column.scale or (0, 0)) for values in column.maps]
        for column in columns
    ]
    rows = [list(row) for row in zip(*drawn, strict=True)]
    grid = contact_sheet(rows, row_captions, [c.title for c in columns], cell=max(size))
    left = grid.width - len(columns) * (size[0] + MARGIN)
    bars = Image.new("RGB", (grid.width, _BAR + 20), "white")
    for i, column in enumerate(columns):
        if column.scale is not None:
            bars.paste(
                colour_bar(column.scale, size[0], column.beyond), (left + i * (size[0] + MARGIN), 0)
            )
    scaled = any(column.scale for column in columns)
    return titled(stack([grid, *[bars] * scaled], gap=0), title)
