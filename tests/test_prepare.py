"""`elit prepare`: what it reads, what it makes of pictures, and what it writes."""

import errno
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refuses
from idx_files import idx_folder, noise
from PIL import Image
from prepare_sources import class_folder, clip_vae, contents, picture, png, run, shard, tiny_vae
from safetensors.torch import load_file
from torch.nn.functional import interpolate

from elit.cli.main import main
from elit.data import load_dataset
from elit.data.fashion_mnist import CLASS_NAMES
from elit.data.manifest import read_manifest
from elit.preparation import PrepareSettings, verify
from elit.preparation.images import buckets, fit, nearest_bucket, read_clips, read_image, to_rgb
from elit.preparation.reading import Sizes, read
from elit.preparation.source import open_source

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


def as_saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_input(*pictures: Image.Image) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))
    return pixels.movedim(-1, 1).float() / 127.5 - 1


# ---- pictures ----


def test_resize_is_adm_s() -> None:
    """Box filters of two, then bicubic, then the middle; against numpy and torch."""
    image = picture(1, 96, 128)
    found = np.asarray(fit(image, (16, 16))).astype(float)
    # 96 -> 48: still twice 16 and more -> 24: no longer
    pixels = np.asarray(image).astype(float)
    for _ in range(2):
        pixels = np.floor((pixels[:, ::2] + pixels[:, 1::2] + 1) / 2)  # PIL rounds both ways
        pixels = np.floor((pixels[::2] + pixels[1::2] + 1) / 2)
    assert pixels.shape == (24, 32, 3)
    scaled = interpolate(
        torch.from_numpy(pixels).movedim(-1, 0)[None], (16, 21), mode="bicubic", antialias=True
    )
    wanted = scaled[0, :, :, 2:18].movedim(0, -1).clamp(0, 255).numpy()  # (21 - 16) // 2 = 2
    difference = np.abs(found - wanted)
    assert difference.max() < 1.6  # and here
    assert np.abs(np.asarray(fit(image, (16, 16))) - np.asarray(image.resize((16, 16)))).max() > 20


def test_a_small_picture_is_enlarged_and_a_fitting_one_stays() -> None:
    assert fit(picture(0, 5, 9), (16, 16)).size == (16, 16)
    exact = picture(0, 16, 16)
    assert np.array_equal(np.asarray(fit(exact, (16, 16))), np.asarray(exact))
    for height, width in ((17, 1000), (1000, 17), (31, 33), (1, 1)):
        assert fit(picture(0, height, width), (24, 16)).size == (16, 24)


def test_colours_of_every_mode() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (0, 0, 255, 128))
    wide = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    wanted = {
        "palette": (as_saved(palette), (255, 0, 0), (0, 255, 0)),
        "transparent palette": (
            as_saved(palette, transparency=0), (255, 255, 255), (0, 255, 0)
        ),
        "alpha": (as_saved(half), (255, 255, 255), (127, 127, 255)),
        "grey and alpha": (
            as_saved(Image.new("LA", (2, 1), (0, 0))), (255, 255, 255), (255, 255, 255)
        ),
        "16 bits": (as_saved(wide), (0, 0, 0), (255, 255, 255)),
        "one bit": (as_saved(Image.new("1", (2, 1), 1)), (255, 255, 255), (255, 255, 255)),
        "CMYK": (
            as_saved(Image.new("CMYK", (2, 1), (255, 0, 0, 0)), "TIFF"),
            (0, 255, 255), (0, 255, 255),
        ),
    }  # fmt: skip
    for name, (content, left, right) in wanted.items():
        image = read_image(content)
        assert image.mode == "RGB", name
        assert (image.getpixel((0, 0)), image.getpixel((1, 0))) == (left, right), name
    refuses("floating-point", lambda: to_rgb(Image.new("F", (2, 1))))


def test_exif_turns_a_picture() -> None:
    image = Image.new("RGB", (8, 4), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    turned = read_image(as_saved(image, exif=exif))
    assert turned.size == (4, 8)
    assert turned.getpixel((3, 0)) == (0, 0, 0)


def test_buckets_are_of_one_area_and_fit_the_shape() -> None:
    for resolution, multiple in ((256, 64), (512, 64), (512, 32), (1024, 64)):
        sizes = buckets(resolution, multiple)
        assert (resolution, resolution) in sizes
        assert len(sizes) == len(set(sizes)) > 2
        for height, width in sizes:
            assert height % multiple == width % multiple == 0
            assert max(height, width) <= 2 * min(height, width)
            assert 0.87 < height * width / resolution**2 < 1.13
            assert (width, height) in sizes
        assert not {*sizes} & {*buckets(resolution + multiple, multiple)}
    assert nearest_bucket(640, 400, buckets(256, 64)) == (192, 320)
    assert nearest_bucket(100, 900, buckets(256, 64)) == (384, 192)
    assert nearest_bucket(300, 300, buckets(256, 64)) == (256, 256)


# ---- what is written ----


def test_moments_are_those_of_encoding_directly(tmp_path, vae_folder) -> None:
    class_folder(tmp_path / "images", 6)
    result = run(tmp_path / "images", tmp_path / "out", vae_folder, flips=True, store_dtype="fp32")
    assert (result.samples, result.finished) == ({"train": 6}, True)
    tensors, manifest = shard(tmp_path / "out"), read_manifest(tmp_path / "out")
    cut = [fit(picture(seed), (16, 16)) for seed in (0, 2, 4, 1, 3, 5)]  # cats, then dogs
    vae = tiny_vae()
    mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in cut]
    for name, pictures in (("moments", cut), ("moments_flipped", mirrored)):
        with torch.no_grad():
            posterior = vae.encode(as_input(*pictures)).latent_dist
        wanted = torch.cat((posterior.mean, posterior.logvar), dim=1)
        torch.testing.assert_close(tensors[name], wanted, rtol=1e-5, atol=1e-5)
    assert tensors["class_labels"].tolist() == [0, 0, 0, 1, 1, 1]
    assert tensors["rows"].tolist() == list(range(6))
    assert (manifest.classes, manifest.flips, manifest.captions) == (("cat", "dog"), True, False)
    assert manifest.shapes == {"16x16": (2, 8, 8)}
    assert manifest.autoencoder.class_name == "AutoencoderKL"
    assert (manifest.autoencoder.scale, manifest.autoencoder.shift) == ((0.5,), (0.25,))
    # The reported spread is that of draws, scaled
    both = torch.cat((tensors["moments"], tensors["moments_flipped"]))
    mean, logvar = both.double().chunk(2, dim=1)
    mean = (mean - 0.25) * 0.5
    variance = mean.var(correction=0) + (logvar.exp() * 0.25).mean()
    assert result.mean == pytest.approx(float(mean.mean()), rel=1e-5)
    assert result.std == pytest.approx(float(variance.sqrt()), rel=1e-5)


def test_pixels_of_several_sizes_and_what_cannot_be_read(tmp_path, capsys) -> None:
    source, out = class_folder(tmp_path / "images", 6, broken=(1, 4)), tmp_path / "out"
    (source / "cat" / "0000.png").write_bytes(png(0)[:300])  # cut off
    words = f"{source} {out} --pixels --resolution 16 8 --workers 1 --flips".split()
    assert main(["prepare", *words]) == 0
    printed = capsys.readouterr().out
    manifest = read_manifest(out)
    (split,) = manifest.splits.values()
    assert [row for row, _ in split.skipped] == [0, 2, 3]
    assert [reason.partition(":")[0] for _, reason in split.skipped] == [
        "cat/0000.png", "cat/0004.png", "dog/0001.png",
    ]  # fmt: skip
    assert "skipped 3" in printed
    assert "cat/0004.png: cannot identify image file" in printed
    assert manifest.kind == "images"
    assert manifest.autoencoder is None
    assert manifest.shapes == {"16x16": (3, 16, 16), "8x8": (3, 8, 8)}
    for size in (16, 8):
        tensors = shard(out, f"train-00000-{size}x{size}")
        wanted = np.stack([np.asarray(fit(picture(s), (size, size))) for s in (2, 3, 5)])
        assert np.array_equal(tensors["images"].movedim(1, -1), wanted)
        assert np.array_equal(tensors["images_flipped"].movedim(1, -1), wanted[:, :, ::-1])
        assert tensors["rows"].tolist() == [1, 4, 5]


def test_aspect_ratios(tmp_path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for number, size in enumerate([(20, 40), (20, 20), (40, 20), (21, 41)]):
        picture(number, *size).save(source / f"{number}.png")
    run(source, tmp_path / "out", resolution=[16, 18], aspect_ratios=True, multiple=2)
    manifest = read_manifest(tmp_path / "out")
    counts = {s.size: s.count for s in manifest.splits["train"].shards}
    assert counts == {(12, 22): 2, (16, 16): 1, (22, 12): 1, (14, 24): 2, (18, 18): 1, (24, 14): 1}
    assert shard(tmp_path / "out", "train-00000-12x22")["rows"].tolist() == [0, 3]
    assert manifest.classes == ()
    assert {name for name, n in manifest.resolutions.items() if n == 16} == {
        "12x22", "16x16", "22x12"
    }  # fmt: skip
    for resolution in (16, 18):
        found = load_dataset("prepared", path=tmp_path / "out", resolution=resolution)
        held = load_dataset("prepared", "validation", path=tmp_path / "out", resolution=resolution)
        assert len(found) + len(held) == 4


def test_numbers_that_are_not_finite_do_not_pass_silently(tmp_path, caplog) -> None:
    vae, few, many = tiny_vae(force_upcast=False), tmp_path / "few", tmp_path / "many"
    with torch.no_grad():
        vae.quant_conv.weight[:2] *= 1e6
    vae.save_pretrained(tmp_path / "vae")
    class_folder(few, 2)
    class_folder(many, 9)
    with pytest.raises(ValueError, match=r"row 0: the autoencoder's .* beyond fp16.*--store"):
        run(few, tmp_path / "1", tmp_path / "vae")
    run(few, tmp_path / "2", tmp_path / "vae", store_dtype="bf16")
    assert "standard deviation" in caplog.text
    # Many of them end the run at once, and leave no record of the part
    message = "no row of the part train-00000 .* not finite in fp16; give --dtype bf16 or fp32"
    refuses(message, run, many, tmp_path / "3", tmp_path / "vae", dtype="fp16")
    assert {path.name for path in (tmp_path / "3").iterdir()} == {"settings.json"}


def test_many_pictures_that_cannot_be_read_are_told_at_once(tmp_path, caplog) -> None:
    class_folder(tmp_path / "images", 20, broken=tuple(range(8)))
    run(tmp_path / "images", tmp_path / "out")
    assert "train-00000 skips 8 of its 20 rows, such as row 0: cat/0000.png: cannot" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_disk_says_is_no_broken_picture(workers, tmp_path) -> None:
    """A file that is gone is skipped; an error that is not of the file stops, with its number."""
    class_folder(tmp_path / "images", 4)
    settings = PrepareSettings(str(tmp_path / "images"), str(tmp_path / "out"))
    source, sizes = open_source(settings), Sizes(settings)
    path = tmp_path / "images" / "cat" / "0002.png"
    path.unlink()
    (chunk,) = read(source.splits, sizes, [("train", range(4))], workers)
    assert list(chunk.skipped) == [1]
    path.symlink_to(path)  # round and round
    with pytest.raises(OSError, match=r"0002\.png") as caught:
        list(read(source.splits, sizes, [("train", range(4))], workers))
    assert caught.value.errno == errno.ELOOP


# ---- sources ----


def test_parts_of_a_split(tmp_path) -> None:
    source, out = class_folder(tmp_path / "images", 4), tmp_path / "out"
    result = run(source, out, splits=["train[:75%]", "validation=train[-1:]"])
    assert result.samples == {"train": 3, "validation": 1}
    found = [shard(out, f"{split}-00000-16x16") for split in result.samples]
    images = torch.cat([tensors["images"] for tensors in found]).movedim(1, -1)
    assert np.array_equal(images, np.stack([fit(picture(s), (16, 16)) for s in (0, 2, 1, 3)]))
    assert found[1]["class_labels"].tolist() == [1]


def test_parquet_with_names_and_numbers_as_labels(tmp_path) -> None:
    table = datasets.Dataset.from_dict({
        "image": [{"bytes": png(i), "path": None} for i in range(4)],
        "animal": ["dog", "cat", None, "dog"],
        "number": [2, 0, 1, -1],
        "captions": [["one", "more"], ["two"], [], ["four"]],
    })  # fmt: skip
    table.to_parquet(tmp_path / "data.parquet")
    source = tmp_path / "data.parquet"
    run(source, tmp_path / "names", label_column="animal")
    manifest = read_manifest(tmp_path / "names")
    assert manifest.classes == ("cat", "dog")
    assert manifest.splits["train"].skipped == ((2, "its animal is None"),)
    tensors = shard(tmp_path / "names")
    assert tensors["class_labels"].tolist() == [1, 0, 1]
    assert bytes(tensors["captions"].tolist()) == b"onetwofour"
    run(source, tmp_path / "numbers", label_column="number", caption_column="none")
    manifest = read_manifest(tmp_path / "numbers")
    assert (manifest.classes, manifest.captions) == (("0", "1", "2"), False)
    assert manifest.splits["train"].skipped == ((3, "its number is -1"),)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_folder_of_idx_files(tmp_path, end) -> None:
    source = idx_folder(tmp_path / "fashion", 20, end)
    run(source, tmp_path / "out", resolution=[28])
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes == CLASS_NAMES
    for number, split in enumerate(("train", "validation")):
        tensors = shard(tmp_path / "out", f"{split}-00000-28x28")
        wanted = np.repeat(noise(20, seed=number)[:, None], 3, axis=1)  # grey as red, green, blue
        assert np.array_equal(tensors["images"], wanted)
        assert tensors["class_labels"].tolist() == [(row + number) % 10 for row in range(20)]
        dataset = load_dataset("prepared", split, path=tmp_path / "out")
        assert (len(dataset), dataset.class_names) == (20, CLASS_NAMES)
    run(source, tmp_path / "large", resolution=[32], splits=["train=test[5:]"])
    tensors = shard(tmp_path / "large", "train-00000-32x32")
    picture = Image.fromarray(noise(20, seed=1)[5]).convert("RGB")
    assert np.array_equal(tensors["images"][0].movedim(0, -1), np.asarray(fit(picture, (32, 32))))
    (source / f"t10k-labels-idx1-ubyte{end}").unlink()
    refuses(r"fashion has neither t10k-labels-idx1-ubyte nor ", run, source, tmp_path / "out")


def hub_like(folder: Path, **splits: list[int]) -> Path:
    """Splits with the columns of `zalando-datasets/fashion_mnist`, by their labels."""
    columns = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["T - shirt / top", "Trouser"])
    )
    tables = {
        name: datasets.Dataset.from_dict(
            {"image": [Image.fromarray(p) for p in noise(len(labels))], "label": labels},
            features=columns,
        )
        for name, labels in splits.items()
    }
    datasets.DatasetDict(tables).save_to_disk(folder)
    return folder


def test_a_test_split_is_held_out_where_there_is_no_validation(tmp_path) -> None:
    source = hub_like(tmp_path / "source", train=[1, 0, 1], test=[0, 1])
    run(source, tmp_path / "out", resolution=[28])
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes == ("T - shirt / top", "Trouser")
    assert {name: split.count for name, split in manifest.splits.items()} == {
        "train": 3, "validation": 2
    }  # fmt: skip
    tensors = shard(tmp_path / "out", "validation-00000-28x28")
    assert tensors["class_labels"].tolist() == [0, 1]
    assert np.array_equal(tensors["images"][:, 0], noise(2))


@pytest.mark.parametrize(
    ("splits", "used"),
    [
        ({"train": [1, 0], "validation": [0], "test": [1]}, ["train", "validation"]),
        ({"train": [1, 0], "test": [-1, -1]}, ["train"]),  # its labels are hidden
        ({"test": [1, 0]}, ["train=test"]),
    ],
)
def test_a_test_split_is_else_left_alone(tmp_path, splits, used) -> None:
    source = hub_like(tmp_path / "source", **splits)
    found = open_source(PrepareSettings(str(source), str(tmp_path / "out"), vae=None))
    assert [rows.of for rows in found.splits.values()] == used


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"splits": ["test"]}, r"unknown split 'test' of the source: use one of 'train'"),
        ({"splits": ["train", "train=train"]}, "two splits become train"),
        ({"splits": ["train[1]"]}, "is not understood"),
        ({"label_column": "lable"}, "did you mean 'label'"),
        ({"image_column": "picture"}, "unknown image_column 'picture'"),
        ({"text_encoder": "x"}, "needs captions"),
        ({"resolution": []}, "resolution is empty"),
        ({"resolution": [250], "aspect_ratios": True}, "must be a multiple of 64"),
        ({"fps": 8.0}, "give frames too"),
        ({"clips_per_video": 2}, "give frames too"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'"),
        ({"resolution": [15], "vae": True}, "pictures of 15x15 do not fit"),
        ({"frames": 5, "vae": True}, "is of pictures, not of clips"),
        ({"splits": ["train[6:]"]}, "has no rows"),
    ],
)
def test_mistakes_are_named(settings, message, tmp_path, vae_folder) -> None:
    class_folder(tmp_path / "images", 4)
    settings["vae"] = vae_folder if settings.pop("vae", False) else None
    refuses(message, run, tmp_path / "images", tmp_path / "out", **settings)


def test_an_empty_or_absent_source_and_a_strange_vae(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    refuses("is an empty folder", run, tmp_path / "empty", tmp_path / "out")
    refuses("there is no", run, tmp_path / "absent", tmp_path / "out")
    class_folder(tmp_path / "images", 2)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLL"}')
    with pytest.raises(ValueError, match="did you mean AutoencoderKL"):
        run(tmp_path / "images", tmp_path / "out", tmp_path / "vae")
    with pytest.raises(ValueError, match=r"there is no folder \./nowhere"):
        run(tmp_path / "images", tmp_path / "out", "./nowhere")
    class_folder(tmp_path / "broken", 2, broken=(0, 1))
    with pytest.raises(ValueError, match=r"nothing of .* could be read: row 0: cat/0000\.png"):
        run(tmp_path / "broken", tmp_path / "out2")
    assert not (tmp_path / "out2" / "manifest.json").exists()
    table = tmp_path / "table.jsonl"
    table.write_text('{"image": "0.png"}')
    refuses("row 0: 0.png: No such file or directory$", run, table, tmp_path / "out3")


def test_dry_run_tells_and_writes_nothing(tmp_path, capsys) -> None:
    source = class_folder(tmp_path / "images", 4)
    words = ["prepare", str(source), str(tmp_path / "out"), "--dry-run"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "4 rows in train" in printed
    assert "image image, label label, caption -" in printed
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == ["cat", "dog"]
    assert not (tmp_path / "out").exists()


# ---- clips ----


def test_clips_in_time(tmp_path) -> None:
    frames = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(6)]
    # 200 ms each, the last but one 400
    content = as_saved(
        frames[0], "GIF", save_all=True, append_images=frames[1:],
        duration=[200, 200, 200, 200, 400, 200],
    )  # fmt: skip

    def reds(frames: int, fps: float | None, count: int = 1) -> list[list[int]]:
        clips = read_clips(content, frames, fps, count)
        return [[round(image.getpixel((8, 8))[0] / 40) for image in clip] for clip in clips]

    assert reds(6, None) == [[0, 1, 2, 3, 4, 5]]
    assert reds(7, 5) == [[0, 1, 2, 3, 4, 4, 5]]
    assert reds(14, 10) == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 5, 5]]
    assert reds(3, 2.5) == [[0, 2, 4]]
    refuses("it has 7 frames at 5 a second, 8 are wanted", read_clips, content, 8, 5)
    # Of its middle, or evenly spread
    assert reds(2, None) == [[2, 3]]
    assert reds(1, 5) == [[3]]
    assert reds(2, None, 3) == reds(2, None, 9) == [[0, 1], [2, 3], [4, 5]]
    assert reds(2, None, 2) == [[0, 1], [3, 4]]
    assert reds(1, 5, 7) == [[0], [1], [2], [3], [4], [4], [5]]
    assert reds(5, 5, 2) == [[1, 2, 3, 4, 4]]


def test_videos_through_a_video_autoencoder(tmp_path) -> None:
    imageio = pytest.importorskip("imageio")
    clip_vae().save_pretrained(tmp_path / "vae")
    source = tmp_path / "videos"
    for name, length in (("a", 12), ("b", 3)):
        (source / name).mkdir(parents=True)
        frames = [np.full((32, 48, 3), 20 * i, dtype=np.uint8) for i in range(length)]
        imageio.mimwrite(source / name / "clip.mp4", frames, fps=10, macro_block_size=16)
    run(source, tmp_path / "out", tmp_path / "vae", frames=5, fps=5, resolution=[16])
    manifest = read_manifest(tmp_path / "out")
    assert manifest.shapes == {"5x16x16": (2, 2, 2, 2)}
    assert manifest.classes == ("a", "b")
    ((row, reason),) = manifest.splits["train"].skipped
    assert (row, reason) == (1, "b/clip.mp4: it has 2 frames at 5 a second, 5 are wanted")
    assert manifest.resolutions == {"5x16x16": 16}
    assert manifest.autoencoder.scale == pytest.approx((2.0, 0.5))
    assert manifest.autoencoder.shift == pytest.approx((0.1, -0.2))
    (shown,) = read_clips(str(source / "a" / "clip.mp4"), 5, 5.0)
    assert [round(np.asarray(f).mean() / 20) for f in shown] == [0, 2, 4, 6, 8]
    clip = as_input(*(fit(f, (16, 16)) for f in shown)).movedim(0, 1)[None]  # (1, 3, 5, 16, 16)
    with torch.no_grad():
        posterior = clip_vae().encode(clip).latent_dist
    moments = shard(tmp_path / "out", "train-00000-5x16x16")["moments"].float()
    wanted = torch.cat((posterior.mean, posterior.logvar), dim=1)
    torch.testing.assert_close(moments, wanted, rtol=2e-3, atol=2e-3)
    content = (source / "a" / "clip.mp4").read_bytes()
    means = [[np.asarray(f).mean() / 20 for f in clip] for clip in read_clips(content, 4, None, 3)]
    assert np.round(means).tolist() == np.arange(12).reshape(3, 4).tolist()
    result = run(source, tmp_path / "pixels", frames=3, clips_per_video=4)
    assert result.samples == {"train": 5}
    tensors = shard(tmp_path / "pixels", "train-00000-3x16x16")
    assert tensors["rows"].tolist() == [0, 0, 0, 0, 1]
    assert tensors["class_labels"].tolist() == [0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="frames=6 is not a multiple of 4"):
        run(source, tmp_path / "out2", tmp_path / "vae", frames=6)


# ---- texts ----


def captioned(folder: Path) -> Path:
    folder.mkdir()
    texts = ["a red disc", "blue square on a red disc", "a"]
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_text_encoder_of_transformers(tmp_path) -> None:
    pytest.importorskip("transformers")
    from test_text import save_encoder

    from elit.pipelines.text_encoder import encode as encode_texts
    from elit.pipelines.text_encoder import load_text_encoder

    save_encoder("clip", tmp_path / "clip")
    out, name = tmp_path / "out", str(tmp_path / "clip")
    options = {"text_encoder": name, "max_text_length": 8, "store_dtype": "fp32"}
    run(captioned(tmp_path / "images"), out, batch_size=2, **options)
    tensors, null = shard(out), load_file(out / "null.safetensors")
    tokenizer, encoder = load_text_encoder(name)
    config = {"max_text_length": 8, "vocab_size": None, "text_dim": 16, "pooled_dim": 16}
    wanted = encode_texts(["blue square on a red disc"], config, tokenizer, encoder)
    mask = tensors["encoder_attention_mask"]
    assert mask.sum(1).tolist() == [3, 6, 1]
    assert tensors["encoder_hidden_states"].shape == (3, 8, 16)
    torch.testing.assert_close(
        tensors["encoder_hidden_states"][1, :6], wanted["encoder_hidden_states"][0]
    )
    torch.testing.assert_close(tensors["pooled_projections"][1:2], wanted["pooled_projections"])
    assert not tensors["encoder_hidden_states"][~mask].any()
    assert {n: (1, *x.shape[1:]) for n, x in tensors.items() if n in null} == {
        n: tuple(x.shape) for n, x in null.items()
    }
    assert set(null) == {"encoder_hidden_states", "encoder_attention_mask", "pooled_projections"}
    manifest = read_manifest(out)
    assert (manifest.text_encoder, manifest.max_text_length) == (name, 8)

    # The empty text is checked, and mended, as shards are
    file, before = out / "null.safetensors", contents(out)
    assert verify(out) == {}
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert verify(out) == {"null.safetensors": "its checksum is wrong"}
    with pytest.raises(ValueError, match=r"null\.safetensors is damaged: its checksum is wrong; "):
        load_dataset("prepared", path=out, verify=True)
    again = {"source": tmp_path / "images", "out": out, "batch_size": 2} | options
    run(**again)
    assert verify(out)  # without --verify damage is neither seen nor taken for what was written
    assert run(**again, verify=True).done == 0
    assert contents(out) == before
    file.unlink()
    assert run(**again).finished
    assert contents(out) == before


def diffusers_pipeline(kind: str, home: Path):
    """A pipeline of tiny random text encoders, and without the rest."""
    import diffusers
    import transformers
    from test_text import save_encoder

    part = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "vae": None}
    tokenizers = {}
    for name in ("t5", "clip", "qwen2"):
        save_encoder(name, home / name)
        tokenizers[name] = transformers.AutoTokenizer.from_pretrained(home / name)
    tokenizers["clip"].model_max_length = 16
    t5 = transformers.T5EncoderModel.from_pretrained(home / "t5").eval()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    if kind == "wan":
        config = transformers.UMT5Config(
            vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
        )
        return diffusers.WanPipeline(
            tokenizer=tokenizers["t5"], text_encoder=transformers.UMT5EncoderModel(config).eval(),
            transformer=None, **part,
        )  # fmt: skip
    if kind == "flux":
        return diffusers.FluxPipeline(
            text_encoder=transformers.CLIPTextModel.from_pretrained(home / "clip").eval(),
            tokenizer=tokenizers["clip"], text_encoder_2=t5, tokenizer_2=tokenizers["t5"],
            transformer=None, **part,
        )  # fmt: skip
    if kind == "sd3":
        config = transformers.CLIPTextConfig(
            vocab_size=8, **small, eos_token_id=7, bos_token_id=6, max_position_embeddings=77,
            projection_dim=16,
        )  # fmt: skip
        clips = [transformers.CLIPTextModelWithProjection(config).eval() for _ in range(2)]
        return diffusers.StableDiffusion3Pipeline(
            text_encoder=clips[0], tokenizer=tokenizers["clip"], text_encoder_2=clips[1],
            tokenizer_2=tokenizers["clip"], text_encoder_3=t5, tokenizer_3=tokenizers["t5"],
            transformer=None, **part,
        )  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=small | {"vocab_size": 300, "num_key_value_heads": 1, "rope_scaling": rope},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                       "out_hidden_size": 16, "patch_size": 2},
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizers["qwen2"], transformer=None, **part,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("flux", {"encoder_hidden_states", "pooled_projections"}),
        ("sd3", {"encoder_hidden_states", "pooled_projections"}),
        ("qwen", {"encoder_hidden_states", "encoder_hidden_states_mask"}),
        ("wan", {"encoder_hidden_states"}),
    ],
)
def test_a_text_is_encoded_alike_whatever_else_is_there(kind, arguments, tmp_path) -> None:
    pytest.importorskip("transformers")
    from elit.preparation.texts import load_texts

    pipe = diffusers_pipeline(kind, tmp_path)
    pipe.save_pretrained(tmp_path / "pipe")
    encoder = load_texts(str(tmp_path / "pipe"), 64, torch.device("cpu"), "fp32", "fp32")
    texts = ["a red disc", "on", ""]
    found = encoder(texts)
    assert set(found) == arguments
    for row, text in enumerate(texts):
        for name, x in encoder([text]).items():
            torch.testing.assert_close(x[0], found[name][row], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        options = {"prompt_2": None} if kind in ("flux", "sd3") else {}
        options |= {"prompt_3": None} if kind == "sd3" else {}
        options |= {"do_classifier_free_guidance": False} if kind in ("sd3", "wan") else {}
        states = pipe.encode_prompt(prompt=["a red disc"], max_sequence_length=64, **options)[0]
    length = states.shape[1]
    torch.testing.assert_close(
        found["encoder_hidden_states"][:1, :length], states, rtol=1e-4, atol=1e-4
    )
    assert not found["encoder_hidden_states"][0, length:].any()


@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        ("clip", {"16 tokens of its tokenizer": 2}),
        ("flux", {"16 tokens of tokenizer": 2, "64 tokens of tokenizer_2": 2}),
        (
            "sd3",
            {"16 tokens of tokenizer": 2, "16 tokens of tokenizer_2": 2,
             "64 tokens of tokenizer_3": 2},
        ),
        ("qwen", {"512 tokens of tokenizer": 2}),
    ],
)  # fmt: skip
def test_captions_that_are_cut_off_are_counted(kind, cut, tmp_path, caplog) -> None:
    pytest.importorskip("transformers")
    if kind == "clip":
        from test_text import save_encoder

        save_encoder("clip", tmp_path / "pipe")
    else:
        diffusers_pipeline(kind, tmp_path).save_pretrained(tmp_path / "pipe")
    source = tmp_path / "images"
    source.mkdir()
    for number, words in enumerate([3, 100, 12, 100]):
        (source / f"{number}.png").write_bytes(png(number))
        (source / f"{number}.txt").write_text("red " * words)
    length = {"clip": 16, "qwen": 512}.get(kind, 64)  # Qwen's template is long
    options = {"text_encoder": str(tmp_path / "pipe"), "max_text_length": length, "batch_size": 2}
    result = run(source, tmp_path / "out", part_size=2, **options)
    assert result.cut == cut
    for where, count in result.cut.items():
        assert f"{count} of 4 captions were cut off at {where}" in caplog.text


def test_texts_take_the_arguments_that_finetuning_feeds() -> None:
    from elit.preparation.texts import PIPELINES
    from elit.retrofit.known import FLOW_TRANSFORMERS

    assert len(PIPELINES) == len(FLOW_TRANSFORMERS)
