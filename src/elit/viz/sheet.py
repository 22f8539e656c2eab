"""Contact sheets: a grid of images with a caption for each row and column."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elit._extras import missing
from elit._files import write_file

MARGIN = 6


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
    cell: int = 64,
    corner: str = "",
) -> Image.Image:
    """Lay out images of one size in a grid.

    Args:
        rows: images, row by row; rows may differ in length.
        row_captions: a caption for each row, or none at all.
        column_captions: likewise.
        cell: least side of an image on the sheet, in pixels; smaller images are enlarged by a
            whole number, without smoothing.
        corner: what the row captions are, above them.
    """
    if not rows or not rows[0]:
        raise ValueError("a contact sheet needs at least one image")
    for captions, count, what in (
        (row_captions, len(rows), "rows"),
        (column_captions, max(map(len, rows)), "columns"),
    ):
        if captions and len(captions) != count:
            raise ValueError(f"{len(captions)} captions for {count} {what}; give one for each")
    factor = enlargement(rows[0][0].size, cell)
    width, height = (side * factor for side in rows[0][0].size)
    font = ImageFont.load_default(size=15)
    beside = filter(None, [*row_captions, corner])
    left = max((int(font.getlength(text)) for text in beside), default=-MARGIN)
    left += 2 * MARGIN
    letters = max(1, width // 7)  # of a line, about
    column_captions = [fill(text, letters, break_long_words=False) for text in column_captions]
    above = filter(None, [*column_captions, corner])
    most_lines = max((text.count("\n") + 1 for text in above), default=0)
    top = MARGIN + 18 * most_lines
    columns = max(map(len, rows))
    size = (left + columns * (width + MARGIN), top + len(rows) * (height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(column_captions):
        x = left + i * (width + MARGIN) + width // 2
        first_line = (x, top - 8 - 18 * text.count("\n"))
        draw.text(first_line, text, fill="black", font=font, anchor="ms", align="center", spacing=3)
    draw.text((MARGIN, top - 8), corner, fill="black", font=font, anchor="ls")
    for j, row in enumerate(rows):
        y = top + j * (height + MARGIN)
        if row_captions:
            middle = (MARGIN, y + height // 2)
            draw.text(middle, row_captions[j], fill="black", font=font, anchor="lm")
        for i, image in enumerate(row):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + i * (width + MARGIN), y))
    return sheet


def enlargement(size: tuple[int, int], cell: int) -> int:
    """The least whole number that makes an image's longer side at least `cell` pixels."""
    return max(1, -(-cell // max(size)))


def stack(sheets: Sequence[Image.Image], gap: int = 10) -> Image.Image:
    """Sheets one below the other."""
    height = sum(sheet.height for sheet in sheets) + gap * (len(sheets) - 1)
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), height), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height + gap
    return whole


def titled(image: Image.Image, title: str) -> Image.Image:
    """A picture below a title, in as many lines as it takes."""
    if not title:
        return image
    text = fill(title, max(12, image.width // 8))
    head = Image.new("RGB", (image.width, 8 + 18 * (text.count("\n") + 1)), "white")
    font = ImageFont.load_default(size=15)
    ImageDraw.Draw(head).text((MARGIN, 5), text, "black", font, spacing=3)
    return stack([head, image], gap=0)


def film_strip(frames: Sequence[Image.Image], count: int = 4) -> Image.Image:
    """Some frames of a clip side by side, the first and the last among them."""
    count = min(count, len(frames))
    chosen = [frames[round(i * (len(frames) - 1) / max(1, count - 1))] for i in range(count)]
    width, height = frames[0].size
    # A line between frames, or they look like one wide image.
    strip = Image.new("RGB", (count * (width + 1) - 1, height), "white")
    for i, frame in enumerate(chosen):
        strip.paste(frame, (i * (width + 1), 0))
    return strip


def save_clip(frames: Sequence[Image.Image], path: Path, fps: int = 8) -> None:
    """Write a clip as .gif, else as .mp4, enlarged as a sheet's images, aside and then renamed."""
    from diffusers.utils import export_to_gif, export_to_video

    factor = enlargement(frames[0].size, 64)
    size = (frames[0].width * factor, frames[0].height * factor)
    large = [frame.resize(size, Image.Resampling.NEAREST) for frame in frames]
    if path.suffix == ".gif":
        write_file(path, lambda aside: export_to_gif(large, str(aside), fps))
        return
    check_mp4()
    pixels = [np.asarray(frame.convert("RGB"), np.float32) / 255 for frame in large]
    write_file(path, lambda aside: export_to_video(pixels, str(aside), fps))


def check_mp4() -> None:
    """Raise a ValueError unless MP4 can be written here."""
    if find_spec("imageio") is None or find_spec("imageio_ffmpeg") is None:
        raise ValueError(missing("MP4 needs imageio and imageio-ffmpeg", "video", "write .gif"))


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG aside and rename it, so that a viewer never sees half of one."""
    write_file(path, lambda aside: image.save(aside, format="PNG"))
