"""`elit prepare` on folders as people have them: each is compared with a loop over its pictures."""

import io
import json
import os
import random
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import refuses
from prepare_sources import picture, png, run, shard

from elit.data.manifest import read_manifest
from elit.preparation import PrepareSettings
from elit.preparation.images import fit
from elit.preparation.source import open_source

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

# A file is a picture's seed, a text, bytes, or ("link", where to). What is expected is by split
# (seed, class, caption) of each row, or what the error says.
Files = dict[str, Any]
Row = tuple[int, str | None, str | None]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pictures(*names: str, start: int = 0) -> Files:
    return {name: start + number for number, name in enumerate(names)}


def classes(*names: str, count: int = 2, start: int = 0) -> Files:
    return pictures(*(f"{c}/{i}.png" for c in names for i in range(count)), start=start)


def rows(*classes: str | None, start: int = 0, captions: Any = None) -> list[Row]:
    captions = captions or [None] * len(classes)
    return [(start + i, c, t) for i, (c, t) in enumerate(zip(classes, captions, strict=True))]


def columns(*seeds: int, **more: Any) -> bytes:
    """A parquet file of pictures."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.null()})
    pictures = [{"bytes": png(seed), "path": None} for seed in seeds]
    return table(image=pa.array(pictures, kind), **more)


def table(**columns: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def packed(members: Files) -> bytes:
    """A tar file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, what in members.items():
            content = png(what) if isinstance(what, int) else what.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def lines(*found: dict[str, Any]) -> str:
    return "\n".join(map(json.dumps, found))


FOUR = pictures("0.png", "1.png", "2.png", "3.png")
PLAIN = rows(None, None, None, None)
NAMES = [f"{i}.png" for i in range(4)]
BUSES = rows("bus", "bus", "car", "car", "train", "train")

LAYOUTS: dict[str, tuple[Files, dict[str, list[Row]] | str, str]] = {
    # pictures alone
    "pictures": (FOUR, {"train": PLAIN}, "4 rows in train"),
    "named like splits": (
        pictures("a.png", "test-drive.png", "train_1.png", "val.png"), {"train": PLAIN}, "4 rows"
    ),
    "many endings": (
        pictures("0.PNG", "1.jfif", "2.bmp", "3.tga"), {"train": PLAIN}, "no labels"
    ),
    "signs of patterns": (
        pictures("[0] a/x*.png", "[0] a/y?.png", "{b}/[1].png", "{b}/z.png"),
        {"train": rows("[0] a", "[0] a", "{b}", "{b}")}, "classes are the folders [0] a, {b}",
    ),
    "hidden": (
        FOUR | pictures(
            ".thumbnails/0.png", ".ipynb_checkpoints/1.png", "__MACOSX/0.png", "._1.png",
            "@eaDir/0.png",
        ),
        {"train": PLAIN}, "left out: 5, such as ._1.png, hidden",
    ),
    "other files": (
        FOUR | {"Thumbs.db": "x", "notes.md": "x", "clip.mp4": "x"}, {"train": PLAIN},
        "left out: 3, such as Thumbs.db, clip.mp4, notes.md",
    ),
    "one folder in one": (
        pictures("all/photos/0.png", "all/photos/1.png"), {"train": rows(None, None)}, "no labels"
    ),
    "round and round": (FOUR | {"again": ("link", ".")}, {"train": PLAIN}, "again, which leads"),
    "a link to nothing": (
        FOUR | {"4.png": ("link", "gone.png")}, {"train": PLAIN}, "5 rows in train"
    ),
    # class folders
    "classes": (classes("cat", "dog"), {"train": rows("cat", "cat", "dog", "dog")}, "2 classes"),
    "a class train": (classes("bus", "car", "train"), {"train": BUSES}, "bus, car, train"),
    "classes in one folder": (
        classes("set/cat", "set/dog"), {"train": rows("cat", "cat", "dog", "dog")}, "cat, dog"
    ),
    "a class that is a link": (
        classes("cat", count=2) | {"dog": ("link", "../elsewhere"), "../elsewhere/a.png": 2},
        {"train": rows("cat", "cat", "dog")}, "2 classes",
    ),
    "one a level deeper": (
        pictures("cat/0.png", "cat/old/1.png", "dog/2.png"), {"train": rows("cat", "cat", "dog")},
        "classes are the folders cat, dog",
    ),
    "one beside the classes": (
        classes("cat", "dog") | {"5.png": 5}, "train has 1 picture, such as 5.png, beside the "
        "folders of its classes, cat, dog", "",
    ),
    "classes that are numbers": (
        classes(*map(str, range(11)), count=1),
        {"train": [(n, str(n), None) for n in (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)]}, "11 classes",
    ),
    # split folders
    "splits of classes": (
        classes("train/cat", "train/dog", "val/cat", "val/dog", count=1),
        {"train": rows("cat", "dog"), "validation": rows("cat", "dog", start=2)}, "2 rows in valid",
    ),
    "Training and dev": (
        classes("Training", "dev"),
        {"train": rows(None, None), "validation": rows(None, None, start=2)}, "2 rows in train",
    ),
    "a split alone": (
        classes("val/a", "val/b", count=1), {"train": rows("a", "b")},
        "2 rows in train, of train=validation",
    ),
    "three splits": (
        classes("train", "valid", "test"),
        {"train": rows(None, None), "validation": rows(None, None, start=2)},
        "test, of 2 rows, is not used",
    ),
    "splits and a class": (
        classes("train/cat", "train/dog", "val/cat", "val/dog", count=1) | {"extra/0.png": 9},
        "has the splits train, val, and beside them extra", "",
    ),
    "one split with classes beside a folder": (
        classes("train/cat", "train/dog", count=2)
        | pictures("test/0.png", "extra/0.png", "0.png"),
        "has the splits train, and beside them pictures, extra, test; move", "",
    ),
    "archives": (FOUR | {"rest.zip": "x"}, r"has 1 archive, such as rest.zip; unpack it", ""),
    "pictures of a kind unknown": (
        FOUR | {"a.heic": "x", "b.HEIC": "x"}, "2 pictures that Pillow cannot read, such as a.heic",
        "",
    ),
    "one class alone": (
        pictures("dog/0.png", "dog/1.png"), {"train": rows(None, None)},
        "one folder alone, dog, is no class",
    ),
    "labels of several types": (
        pictures("train/0.png", "train/1.png", "val/0.png")
        | {"train/metadata.csv": "file_name,label\n0.png,0\n1.png,1\n",
           "val/metadata.csv": "file_name,label\n0.png,a\n"},
        "label_column 'label' holds values of several types, such as .*; give all of all", "",
    ),
    "texts and metadata": (
        FOUR | {"0.txt": "a", "metadata.csv": "file_name,label\n" + "".join(
            f"{i}.png,{i}\n" for i in range(4))},
        "has 1 text, such as 0.txt, beside pictures, and metadata.csv; put the captions", "",
    ),
    # captions
    "texts": (
        FOUR | {f"{i}.txt": f"text {i}\n" for i in range(4)} | {"readme.txt": "x"},
        {"train": rows(*[None] * 4, captions=[f"text {i}" for i in range(4)])},
        "captions, from the .txt file beside each picture",
    ),
    "a text too few": (
        FOUR | {"0.txt": "null", "1.txt": "größer", "3.txt": ""},
        {"train": rows(*[None] * 4, captions=["null", "größer", "", ""])},
        "1 picture, such as 2.png, without .txt: the caption is empty",
    ),
    "texts in classes": (
        classes("10_cat", "5_dog", count=1) | {"10_cat/0.txt": "a", "5_dog/0.txt": "b"},
        {"train": rows("10_cat", "5_dog", captions=["a", "b"])}, "captions",
    ),
    "texts .caption": (
        pictures("0.png", "1.png") | {"0.caption": "a", "1.TXT": "b"},
        {"train": rows(None, None, captions=["a", "b"])},
        "captions, from the .caption or .txt file beside each picture",
    ),
    "two texts of one picture": (
        pictures("0.png") | {"0.caption": "a", "0.txt": "b"},
        "0.caption and .*0.txt are of one picture; leave one", "",
    ),
    "metadata.csv": (
        FOUR | {"metadata.csv": "file_name,text\n" + "\n".join(
            f'{name},"{text}"' for name, text in zip(
                NAMES, ("null", "NA", 'a "" b, c', "None\nnan"), strict=True))},
        {"train": rows(*[None] * 4, captions=["null", "NA", 'a " b, c', "None\nnan"])},
        "columns from metadata.csv",
    ),
    "metadata of numbers": (
        FOUR | {"metadata.csv": "file_name,text,label\n0.png,7,1\n1.png,12,\n2.png,3,0\n3.png,4,2"},
        {"train": [(0, "1", "7"), (2, "0", "3"), (3, "2", "4")]}, "captions in text",
    ),
    "numbers as written": (
        FOUR | {"metadata.csv": "file_name,text,label\n0.png,007,NA\n1.png,1.50,b\n2.png,1e3,true\n"
                                "3.png,,b"},
        {"train": rows("NA", "b", "true", "b", captions=["007", "1.50", "1e3", ""])}, "3 classes",
    ),
    "metadata.jsonl in splits": (
        classes("train", "test") | {
            "train/metadata.jsonl": lines({"file_name": "1.png", "label": True, "text": 12},
                                          {"file_name": "0.png", "label": False, "text": 3}),
            "test/metadata.jsonl": lines({"file_name": "0.png", "label": True, "text": 5},
                                         {"file_name": "1.png", "label": True, "text": 6})},
        {"train": [(1, "True", "12"), (0, "False", "3")],
         "validation": rows("True", "True", start=2, captions=["5", "6"])}, "2 classes",
    ),
    "metadata.csv of a spreadsheet": (
        pictures("0.png", "1.png") | {
            "metadata.csv": '\ufefffile_name; text ; label\r\n0.png; "a, b; c";1\r\n1.png;b;0\r\n'},
        {"train": rows("1", "0", captions=["a, b; c", "b"])}, "captions in text",
    ),
    "metadata.csv without rows": (
        FOUR | {"metadata.csv": "file_name,text\n"}, "from its folder; it has no rows", "",
    ),
    "metadata.csv one too few": (
        FOUR | {"metadata.csv": "file_name,text\n0.png,a\n1.png,b\n2.png,c\n"},
        "metadata.csv does not name 1 picture, such as 3.png; make", "",
    ),
    "metadata.csv one too many": (
        FOUR | {"metadata.csv": "file_name,text\n" + "".join(f"{i}.png,a\n" for i in range(5))},
        "metadata.csv names 1 file, such as 4.png, that is no picture there", "",
    ),
    "metadata.parquet": (
        classes("a", "b", count=1) | {"metadata.parquet": table(
            file_name=["b/0.png", "a/0.png", "b/0.png"], text=["None", "", "x"])},
        {"train": [(1, None, "None"), (0, None, ""), (1, None, "x")]},
        "2 pictures, of which some have several rows",
    ),
    "a table of another name": (
        FOUR | {"captions.csv": "file_name,text\n0.png,a"}, {"train": PLAIN},
        "1 table, such as captions.csv, not read: beside pictures only metadata.csv, ",
    ),
    "two columns of one name": (
        FOUR | {"metadata.csv": "file_name,text,text\n"}, "two of its columns have one name", "",
    ),
    "labels of two types": (
        pictures("0.png", "1.png") | {"metadata.jsonl": lines(
            {"file_name": "0.png", "label": "a"}, {"file_name": "1.png", "label": 1})},
        "the column 'label' of .* holds several types", "",
    ),
    "captions that are floats": (
        pictures("0.png") | {"metadata.jsonl": lines({"file_name": "0.png", "text": 0.5})},
        "caption_column 'text' holds .*float64.*none", "",
    ),
    # files of many rows
    "parquet": (
        {"a.parquet": columns(0, 1), "test-drive.parquet": columns(2), "[b].parquet": columns(3)},
        {"train": [(3, None, None), *rows(None, None), (2, None, None)]}, "4 rows in train",
    ),
    "parquet with splits": (
        {"data/train-00000-of-00002.parquet": columns(0), "README.md": "x",
         "data/train-00001-of-00002.parquet": columns(1),
         "data/validation-00000-of-00001.parquet": columns(2)},
        {"train": rows(None, None), "validation": [(2, None, None)]}, "1 row in validation",
    ),
    "several sets of the hub": (
        {"README.md": "---\nconfigs:\n- config_name: a\n- config_name: b\n---\n",
         "a/0.parquet": columns(0), "b/0.parquet": columns(1)},
        "README.md tells of several data sets, a, b; give", "",
    ),
    "parquet of floats": (
        {"a.parquet": columns(0, 1, 2, label=[1.0, None, 0.0], text=["null", "NA", None])},
        {"train": [(0, "1", "null"), (2, "0", "")]}, "2 classes",
    ),
    "parquet without rows": (
        {"a.parquet": table(image=pa.array([], pa.binary()))}, "a.parquet has no rows; give", "",
    ),
    "parquet, one without rows": (
        {"a.parquet": columns(), "b.parquet": columns(0)},
        {"train": rows(None)}, "1 row in train",
    ),
    "parquet of several pictures a row": (
        {"a.parquet": table(images=[[{"bytes": png(), "path": None}]])},
        "image_column 'images' holds List.*; give a column of pictures", "",
    ),
    "parquet that differs": (
        {"a.parquet": columns(0, text=["a"]), "b.parquet": columns(1)},
        "b.parquet and .*a.parquet differ in the column 'text'", "",
    ),
    "parquet beside pictures": (
        {"a.parquet": columns(0), "0.png": 0},
        "holds 1 picture, such as 0.png, and 1 file of many rows, such as a.parquet; give", "",
    ),
    "tar": (
        {"a.tar": packed({"0.png": 0, "0.cls": "1", "0.txt": "null\n"}),
         "test-drive.tar": packed({"x/1.jpg": 1, "x/1.cls": "0", "x/1.txt": "b",
                                   "__MACOSX/x/._1.jpg": 5})},
        {"train": rows("1", "0", captions=["null", "b"])}, "left out: 1, such as test-drive.tar/",
    ),
    "tar of folders": (
        {"a.tar": packed(pictures("cat/0.png", "dog/0.png"))}, {"train": rows(None, None)},
        "left out: 1, such as the folders in a.tar, cat to dog, as classes",
    ),
    "tar without rows": ({"a.tar": packed({})}, "no column of pictures among no columns", ""),
    "tar with a late text": (
        {"a.tar": packed(FOUR | pictures(*(f"{i}.png" for i in range(4, 8)), start=4)
                         | {"7.txt": "seven"})},
        {"train": rows(*[None] * 8, captions=[*[""] * 7, "seven"])},
        "7 of 8 captions in train are empty",
    ),
    "tar beside its parquet": (
        {"00000.tar": packed({"0.png": 0, "0.json": '{"caption": "a", "width": 1}'}),
         "00000.parquet": b"x", "00000_stats.json": "{}"},
        {"train": rows(None, captions=["a"])}, "left out: 2",
    ),
    "no pictures": (
        {"0.md": "x", "1.svg": "x"}, "no pictures: 1 .md, 1 .svg; give a folder of pictures", ""
    ),
    "videos alone": ({"0.mp4": "x"}, "holds no pictures: 1 .mp4; give --frames", ""),
}  # fmt: skip


def lay(folder: Path, files: Files) -> Path:
    for name, what in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, tuple):
            path.symlink_to(what[1])
        elif isinstance(what, int):
            kind = {".jfif": "JPEG"}.get(path.suffix.lower())
            if path.suffix.lower() == ".png":
                path.write_bytes(png(what))
            else:
                picture(what).save(path, kind)
        else:
            path.write_bytes(what if isinstance(what, bytes) else what.encode())
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, tmp_path, caplog) -> None:
    files, expected, says = LAYOUTS[name]
    source, out = lay(tmp_path / "set[12]", files), tmp_path / "out"
    (tmp_path / "set1").mkdir()  # which the pattern set[12] fits
    (tmp_path / "set1" / "other.png").write_bytes(png(99))
    if isinstance(expected, str):
        refuses(expected, run, source, out)
        assert not out.exists()
        return
    with caplog.at_level("INFO", "elit"):
        run(source, out)
    assert says in caplog.text
    manifest = read_manifest(out)
    assert {n: s.count for n, s in manifest.splits.items()} == {
        n: len(r) for n, r in expected.items()
    }
    for split, wanted in expected.items():
        tensors = shard(out, f"{split}-00000-16x16")
        shown = [fit(picture(seed), (16, 16)) for seed, _, _ in wanted]
        found = tensors["images"].movedim(1, -1).numpy()
        for row, (seed, _, _) in enumerate(wanted):
            if not any(n.endswith(".jfif") and s == seed for n, s in files.items()):
                assert np.array_equal(found[row], shown[row])
        labels = tensors["class_labels"].tolist() if manifest.classes else [None] * len(wanted)
        assert [n if n is None else manifest.classes[n] for n in labels] == [
            c for _, c, _ in wanted
        ]
        if manifest.captions:
            text, ends = bytes(tensors["captions"].tolist()), tensors["caption_ends"].tolist()
            captions = [text[a:b].decode() for a, b in pairwise([0, *ends])]
            assert captions == [text for _, _, text in wanted]
        else:
            assert {text for _, _, text in wanted} == {None}


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_picture_of_a_random_folder_is_lost(count, tmp_path) -> None:
    """Each is a row, of a split that is said not to be used, or the folder is refused."""
    names = ["train", "val", "test", "cat", "dog", "Train", "images", ".x", "__MACOSX", "[1]", "a*"]
    refused = 0
    for seed in range(count):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        places = ["/".join(draw.choices(names, k=draw.choice([0, 1, 1, 2, 3]))) for _ in range(3)]
        files = {f"{p}/{draw.choice(['x', 'test'])}-{i}.png": 0 for p in places for i in range(2)}
        there = {
            name.strip("/") for name in files
            if not any(p.startswith(".") or p == "__MACOSX" for p in name.split("/"))
        }  # fmt: skip
        lay(folder, {name.strip("/"): 0 for name in files})
        try:
            source = open_source(PrepareSettings(str(folder), str(tmp_path / "out"), vae=None))
        except ValueError:
            refused += 1
            continue
        used = [rows.name(i) for rows in source.splits.values() for i in range(len(rows))]
        unused = sum(int(note.split()[0]) for note in source.notes if "are not used" in note)
        assert len(used) == len(set(used))
        assert {os.path.normpath(name) for name in used} <= there
        assert len(used) + unused == len(there), (seed, source.notes)
    assert refused < count * 0.7


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            "train_2",
            r"train_2.parquet and .*train_1.parquet differ in the column 'label'; give fil",
        ),
        ("validation", r"number the classes of 'label' in different ways, .*cat.*; give splits"),
    ],
)
def test_classes_in_another_order_are_refused(second, message, tmp_path) -> None:
    import datasets

    for file, names in (("train_1", ["cat", "dog"]), (second, ["dog", "cat"])):
        columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(2)], "label": [0, 1]}
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
        (tmp_path / "set").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "set" / f"{file}.parquet")
    refuses(message, run, tmp_path / "set", tmp_path / "out")
