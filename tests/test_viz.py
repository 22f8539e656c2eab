"""Contact sheets."""

import pytest
from helpers import refuses
from PIL import Image

from elit.interface.budget import format_budget
from elit.viz.sheet import contact_sheet, film_strip, save_clip, save_image


def solid(colour: str, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_every_image_is_on_the_sheet_in_its_place() -> None:
    rows = [[solid("red"), solid("blue")], [solid("lime"), solid("yellow")]]
    sheet = contact_sheet(rows, ["1", "1/16"], ["a", "b"], cell=32)
    colours = [
        colour for _, colour in sheet.getcolors(10_000) if colour.count(255) + colour.count(0) == 3
    ]
    for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 0)):
        assert colour in colours
        count = next(n for n, c in sheet.getcolors(10_000) if c == colour)
        assert count == 32 * 32  # enlarged by a whole number, covered by nothing
    # Red is to the left of blue and above green.
    pixels = sheet.load()
    where = {pixels[x, y]: (x, y) for x in range(sheet.width) for y in range(sheet.height)}
    assert where[255, 0, 0][0] < where[0, 0, 255][0]
    assert where[255, 0, 0][1] < where[0, 255, 0][1]


def test_rows_may_differ_in_length_and_images_be_large() -> None:
    sheet = contact_sheet([[solid("red", (100, 80))], [solid("blue", (100, 80))] * 3])
    assert sheet.width >= 300
    assert sheet.height >= 160


def test_what_the_rows_are_stands_above_their_captions() -> None:
    rows = [[solid("red")], [solid("blue")]]
    plain = contact_sheet(rows, ["1", "1/2"])
    sheet = contact_sheet(rows, ["1", "1/2"], corner="budget")
    assert sheet.height > plain.height
    above = sheet.crop((0, 0, sheet.width, sheet.height - plain.height))
    assert min(value for _, value in above.convert("L").getcolors()) < 128  # written there
    assert sheet.width > plain.width  # it covers no picture


def test_captions_must_match() -> None:
    refuses("1 captions for 2 rows", contact_sheet, [[solid("red")], [solid("red")]], ["one"])
    refuses("at least one image", contact_sheet, [])


@pytest.mark.parametrize(
    ("budget", "text"),
    [(1, "1"), (1 / 2, "1/2"), (1 / 3, "1/3"), (1 / 16, "1/16"), (0.3, "0.3"), (7 / 16, "0.438"),
     (1 / 1024, "1/1024"), (1e-320, "9.99989e-321")],
)  # fmt: skip
def test_budgets_are_written_as_people_read_them(budget: float, text: str) -> None:
    assert format_budget(budget) == text


def test_a_picture_replaces_another_whole(tmp_path) -> None:
    path = tmp_path / "deep" / "x.png"
    save_image(solid("red"), path)
    save_image(solid("blue"), path)
    assert Image.open(path).getpixel((0, 0)) == (0, 0, 255)
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


def test_a_film_strip_has_the_first_and_the_last_frame() -> None:
    frames = [solid(colour) for colour in ("red", "lime", "blue", "black", "white")]
    strip = film_strip(frames, count=3)
    assert strip.size == (50, 16)
    assert [strip.getpixel((x, 0)) for x in (0, 20, 49)] == [
        (255, 0, 0), (0, 0, 255), (255, 255, 255),
    ]  # fmt: skip
    assert film_strip(frames[:1]).size == (16, 16)


def test_a_gif_has_all_frames_enlarged(tmp_path) -> None:
    save_clip([solid("red"), solid("blue"), solid("lime")], tmp_path / "new" / "clip.gif")
    with Image.open(tmp_path / "new" / "clip.gif") as clip:
        assert clip.n_frames == 3
        assert clip.size == (64, 64)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clip.gif"]
