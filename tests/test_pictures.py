"""Pictures as files have them: their colours, what is transparent, long ones, too large ones."""

import errno
import io
import struct
import zlib

import numpy as np
import pytest
from helpers import refuses
from PIL import Image, ImageCms
from prepare_sources import class_folder, picture, run, shard

from elit.evaluation.images import open_images
from elit.preparation.images import LONGEST, fit, read_clips, read_image

# Colours of red, green and blue in XYZ, adapted to D50, of the standards
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
COLOURS = np.array(
    [[200, 100, 50], [30, 140, 90], [120, 120, 120], [255, 255, 255], [90, 60, 160], [255, 0, 0]]
)


def icc(space: str, curve: float | None, colours: tuple = ()) -> bytes:
    """A profile of the ICC, version 4: sRGB's curve, or a power."""
    parameters = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    if curve is None:
        of_curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + _fixed(*parameters)
    else:
        of_curve = b"para" + bytes(4) + struct.pack(">HH", 0, 0) + _fixed(curve)
    text = "tiny".encode("utf-16-be")
    name = b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(text), 28) + text
    white = b"XYZ " + bytes(4) + _fixed(0.9642, 1, 0.8249)
    tags = {b"desc": name, b"wtpt": white, b"cprt": name}
    if space == "GRAY":
        tags[b"kTRC"] = of_curve
    for letter, colour in zip("rgb", colours, strict=False):
        tags[f"{letter}TRC".encode()] = of_curve
        tags[f"{letter}XYZ".encode()] = b"XYZ " + bytes(4) + _fixed(*colour)
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += struct.pack(">4sII", tag, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12s4sI4sIIQI12s", start + len(body), bytes(4), 0x04200000, b"mntr",
        space.ljust(4).encode(), b"XYZ ", bytes(12), b"acsp", 0, bytes(4), 0, 0, 0, 0,
        _fixed(0.9642, 1, 0.8249),
    )  # fmt: skip
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def to_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def from_linear(values: np.ndarray) -> np.ndarray:
    values = values.clip(0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def p3_in_srgb(colours: np.ndarray) -> np.ndarray:
    """By the definition of both, clipped."""
    xyz = to_linear(colours / 255) @ np.array(P3)
    return from_linear(xyz @ np.linalg.inv(np.array(SRGB))) * 255


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(content: bytes | str) -> np.ndarray:
    return np.asarray(read_image(content)).astype(int)


def test_colours_of_a_profile_become_those_of_srgb(tmp_path) -> None:
    profile, colours = icc("RGB", None, P3), COLOURS[None].astype(np.uint8)
    wanted = p3_in_srgb(COLOURS)
    assert np.abs(wanted - COLOURS).max() > 20  # without it
    image = Image.fromarray(colours)
    content = saved(image, icc_profile=profile)
    for found in (content, saved(image, "TIFF", icc_profile=profile)):
        assert np.abs(pixels(found)[0] - wanted).max() <= 1
    # With an alpha channel, as a palette, in an animation, and where scores read
    see_through = image.copy()
    see_through.putalpha(Image.fromarray(np.array([[255] * 5 + [0]], np.uint8)))
    found = pixels(saved(see_through, icc_profile=profile))[0]
    assert np.abs(found[:5] - wanted[:5]).max() <= 1
    assert found[5].tolist() == [255, 255, 255]
    palette = image.quantize(6, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    exact = p3_in_srgb(np.asarray(palette.convert("RGB"))[0])
    assert np.abs(pixels(saved(palette, icc_profile=profile))[0] - exact).max() <= 1
    clip = saved(image, save_all=True, append_images=[image.rotate(180)], icc_profile=profile)
    (frames,) = read_clips(clip, 2, None)
    assert np.abs(np.asarray(frames[0])[0].astype(int) - wanted).max() <= 1
    (tmp_path / "a.png").write_bytes(content)
    scored = open_images(str(tmp_path)).read([0])[0, :, 0].T.numpy()
    assert np.abs(scored.astype(int) - wanted).max() <= 1


def test_grey_profiles_and_those_that_have_no_effect() -> None:
    grey = Image.fromarray(np.array([[0, 64, 128, 255]], np.uint8))
    wanted = from_linear(np.array([0, 64, 128, 255]) / 255) * 255  # a power of 1 is linear
    linear = icc("GRAY", 1.0)
    assert np.abs(pixels(saved(grey, icc_profile=linear))[0, :, 1] - wanted).max() <= 1
    wide = Image.fromarray(np.array([[0, 64 << 8, 128 << 8, 65535]], np.uint16))
    assert np.abs(pixels(saved(wide, icc_profile=linear))[0, :, 1] - wanted).max() <= 1
    with_alpha = grey.convert("LA")
    assert np.abs(pixels(saved(with_alpha, icc_profile=linear))[0, :, 1] - wanted).max() <= 1
    # sRGB itself changes no number; a broken profile, or one of other colours, is passed over
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    for profile in (srgb, icc("RGB", None, SRGB), b"broken" * 99, linear, srgb[:300]):
        assert np.array_equal(pixels(saved(noise, icc_profile=profile)), np.asarray(noise))
    assert np.array_equal(pixels(saved(grey, icc_profile=srgb))[..., 0], np.asarray(grey))


def png_of(width: int, bits: int, kind: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of one row, with a transparent value; PIL writes few of them."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0))
    body = chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("bits", "row", "value", "wanted"),
    [
        (16, struct.pack(">4H", 0, 20000, 40000, 65535), 20000, [0, 255, 156, 255]),
        (16, struct.pack(">4H", 0, 20001, 40000, 65535), 20000, [0, 78, 156, 255]),
        (8, bytes([10, 20, 30, 40]), 20, [10, 255, 30, 40]),
        (4, bytes([0x12, 0x34]), 2, [17, 255, 51, 68]),
        (2, bytes([0b00011011]), 1, [0, 255, 170, 255]),
        (1, bytes([0b01010000]), 0, [255, 255, 255, 255]),
    ],
)
def test_the_transparent_value_of_grey_alone_is_white(bits, row, value, wanted) -> None:
    content = png_of(4, bits, 0, row, struct.pack(">H", value))
    assert pixels(content)[0].tolist() == [[grey] * 3 for grey in wanted]


def test_the_transparent_colour_of_16_bits_is_white() -> None:
    row = struct.pack(">6H", 0, 20000, 40000, 65535, 1, 2)
    content = png_of(2, 16, 2, row, struct.pack(">3H", 0, 20000, 40000))
    assert pixels(content)[0].tolist() == [[255, 255, 255], [255, 0, 0]]


@pytest.mark.parametrize("shape", [(3, 5000), (5000, 3), (2, 30000), (40, 5000)])
def test_long_pictures_are_cut_then_scaled(shape, monkeypatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image, size = Image.fromarray(noise), (32, 48)
    largest, resize = [], Image.Image.resize

    def watched(self, new, *args, **kwargs):
        largest.append(new[0] * new[1])
        return resize(self, new, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    found = fit(image, size)
    assert max(largest) <= (LONGEST + 1) * 32 * 48
    # What scaling all of it and cutting then gives, but for the last digits of the scale
    scale = max(48 / shape[1], 32 / shape[0])
    whole = resize(
        image, (round(shape[1] * scale), round(shape[0] * scale)), Image.Resampling.BICUBIC
    )
    left, top = (whole.width - 48) // 2, (whole.height - 32) // 2
    wanted = whole.crop((left, top, left + 48, top + 32))
    if scale > 0.5:  # else halved first
        difference = np.abs(np.asarray(found).astype(int) - np.asarray(wanted))
        assert found.size == (48, 32)
        assert difference.mean() < 8  # of unrelated noise over 60


def test_a_picture_that_is_too_large_is_skipped_and_listed(tmp_path, monkeypatch) -> None:
    class_folder(tmp_path / "images", 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60000)  # PIL refuses twice as many
    Image.new("1", (400, 400)).save(tmp_path / "images" / "cat" / "0000.png")
    (tmp_path / "images" / "dog" / "0003.png").write_bytes(saved(Image.new("L", (30000, 3))))
    result = run(tmp_path / "images", tmp_path / "out")
    ((split, _, reason),) = result.skipped
    assert (split, result.samples) == ("train", {"train": 3})
    assert "cat/0000.png" in reason
    assert "exceeds limit" in reason
    assert shard(tmp_path / "out")["images"].shape == (3, 3, 16, 16)
    with pytest.raises(ValueError, match=r"0000\.png cannot be read as a picture.*exceeds limit"):
        open_images(str(tmp_path / "images"))


def test_where_memory_ends_the_file_is_named(tmp_path, monkeypatch) -> None:
    class_folder(tmp_path / "images", 2)
    load = Image.Image.load

    def out_of_memory(self):
        if self.size == (24, 20):
            raise MemoryError
        return load(self)

    from PIL.PngImagePlugin import PngImageFile

    monkeypatch.setattr(PngImageFile, "load", out_of_memory)
    with pytest.raises(OSError, match=r"no memory left to read it: 'cat/0000\.png'") as caught:
        run(tmp_path / "images", tmp_path / "out")
    assert caught.value.errno == errno.ENOMEM
    with pytest.raises(ValueError, match=r"0000\.png cannot be read as a picture: MemoryError"):
        open_images(str(tmp_path / "images"))


def test_scores_read_all_kinds_of_pictures_that_are_prepared(tmp_path) -> None:
    for number, (suffix, kind) in enumerate((("png", "PNG"), ("GIF", "GIF"), ("jfif", "JPEG"))):
        picture(number).save(tmp_path / f"{number}.{suffix}", kind)
    assert open_images(str(tmp_path)).count == 3
    (tmp_path / "0.png").write_bytes(b"none")
    refuses("0.png cannot be read as a picture: cannot identify image file; mend", open_images,
            str(tmp_path))  # fmt: skip
