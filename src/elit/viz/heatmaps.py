"""Maps of numbers over an image: colours, overlays, and sheets of them with their scales."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elit.viz.sheet import _MARGIN, contact_sheet

Array = np.ndarray

# Dark to light in even steps of perceived lightness (OKLab), so that it reads in grey too.
_RAMP = ("160047", "3b016c", "6a137b", "9c2874", "ca4459", "eb6b3b", "fe9823", "feca58", "fff789")
_BAR = 10  # pixels, height of a colour bar
_INSET = 4  # pixels between a bar's end and its number: bars stand side by side


@dataclass(frozen=True)
class Column:
    """A column of a sheet: what it is, and its pictures or its maps.

    Attributes:
        title: in words.
        images: a picture for each row; or
        maps: (rows, h, w) numbers, which get one scale for the whole column.
        low: number of the darkest colour; None is the least of the maps.
        high: number of the lightest one; None is their largest.
    """

    title: str
    images: Sequence[Image.Image] = ()
    maps: Array | None = None
    low: float | None = None
    high: float | None = None

    @property
    def scale(self) -> tuple[float, float] | None:
        """Numbers of the darkest and the lightest colour; None of pictures."""
        if self.maps is None:
            return None
        finite = self.maps[np.isfinite(self.maps)]
        least, largest = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        low = float(least) if self.low is None else self.low
        return low, max(low, float(largest) if self.high is None else self.high)


def colours(values: Array, low: float, high: float) -> Array:
    """Numbers (...) as colours (..., 3) uint8; what is not finite is grey.

    Numbers outside of low..high get the colour of its ends; where those are the same, the middle.
    """
    table = np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in _RAMP], float)
    values = np.asarray(values, float)
    span = high - low
    share = (values - low) / span if span > 0 else np.full(values.shape, 0.5)
    finite = np.isfinite(values)
    place = np.where(finite, share, 0).clip(0, 1) * (len(table) - 1)
    at = np.arange(len(table))
    mixed = np.stack([np.interp(place, at, channel) for channel in table.T], axis=-1)
    return np.where(finite[..., None], mixed, 128).round().astype(np.uint8)


def heatmap(
    values: Array, size: tuple[int, int], scale: tuple[float, float] | None = None
) -> Image.Image:
    """A map (h, w) as a picture of some (width, height), each number a rectangle.

    Args:
        values: numbers.
        size: pixels, at least one for each number.
        scale: numbers of the darkest and the lightest colour; None are the map's own.
    """
    values = np.asarray(values, float)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a map of shape {values.shape} is no picture; give (rows, columns)")
    low, high = scale or Column("", maps=values[None]).scale  # type: ignore[misc]
    return Image.fromarray(colours(values, low, high)).resize(size, Image.Resampling.NEAREST)


def overlay(
    image: Image.Image,
    values: Array,
    scale: tuple[float, float] | None = None,
    strength: float = 0.6,
) -> Image.Image:
    """A map laid over an image, which shines through in grey; it has the image's size.

    Args:
        image: of any mode.
        values: (h, w).
        scale: as in `heatmap`.
        strength: of the map's colours, from 0 (the image alone) to 1 (the map alone).
    """
    grey = image.convert("L").convert("RGB")
    return Image.blend(grey, heatmap(values, image.size, scale), strength)


def colour_bar(scale: tuple[float, float], width: int, digits: int = 3) -> Image.Image:
    """The colours from left to right with the numbers at both ends below."""
    font = ImageFont.load_default(size=11)
    bar = Image.new("RGB", (width, _BAR + 16), "white")
    ramp = colours(np.linspace(0, 1, width)[None], 0, 1)  # (1, width, 3)
    bar.paste(Image.fromarray(ramp).resize((width, _BAR), Image.Resampling.NEAREST), (0, 0))
    pen, (low, high) = ImageDraw.Draw(bar), scale
    if low == high:
        pen.text((width // 2, _BAR + 3), f"all {low:.{digits}g}", "black", font, anchor="ma")
        return bar
    pen.text((_INSET, _BAR + 3), f"{low:.{digits}g}", "black", font, anchor="la")
    pen.text((width - _INSET, _BAR + 3), f"{high:.{digits}g}", "black", font, anchor="ra")
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
    size = _cell_size(columns, cell)
    drawn = [
        [image.convert("RGB").resize(size, Image.Resampling.NEAREST) for image in column.images]
        if column.maps is None
        else [heatmap(values, size, column.scale) for values in column.maps]
        for column in columns
    ]
    rows = [list(row) for row in zip(*drawn, strict=True)]
    grid = contact_sheet(rows, row_captions, [c.title for c in columns], cell=max(size))
    left = grid.width - len(columns) * (size[0] + _MARGIN)
    head = 26 if title else 0
    has_bars = any(column.scale for column in columns)
    height = head + grid.height + (_BAR + 20 if has_bars else 0)
    sheet = Image.new("RGB", (grid.width, height), "white")
    if title:
        font = ImageFont.load_default(size=15)
        ImageDraw.Draw(sheet).text((_MARGIN, head // 2), title, "black", font, anchor="lm")
    sheet.paste(grid, (0, head))
    for i, column in enumerate(columns):
        if column.scale is not None:
            place = (left + i * (size[0] + _MARGIN), head + grid.height)
            sheet.paste(colour_bar(column.scale, size[0]), place)
    return sheet


def stack(sheets: Sequence[Image.Image], gap: int = 10) -> Image.Image:
    """Sheets one below the other."""
    if not sheets:
        raise ValueError("nothing to stack: give at least one sheet")
    width = max(sheet.width for sheet in sheets)
    height = sum(sheet.height for sheet in sheets) + gap * (len(sheets) - 1)
    whole, top = Image.new("RGB", (width, height), "white"), 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height + gap
    return whole


def _cell_size(columns: Sequence[Column], cell: int) -> tuple[int, int]:
    """Width and height of all cells: a whole number of times the pictures', else the maps'."""
    pictures = [c.images[0].size for c in columns if c.maps is None]
    shapes = [c.maps.shape[1:] for c in columns if c.maps is not None]
    width, height = pictures[0] if pictures else shapes[0][::-1]
    factor = max(1, -(-cell // max(width, height)))
    return width * factor, height * factor
