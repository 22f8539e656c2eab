"""Source of pictures: whatever Hugging Face datasets reads, addressed by row."""

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from elit._choices import check_choice
from elit._extras import missing
from elit._files import sha256_of
from elit._listing import files_of, stamp
from elit._tables import counted
from elit.data import SPLITS
from elit.data.idx import is_idx_folder
from elit.preparation.columns import find_classes, find_column, find_image
from elit.preparation.layout import SUFFIXES, Layout
from elit.preparation.settings import NONE, PrepareSettings
from elit.preparation.tables import OFFSET, by_datasets, idx_tables

_SPLIT = re.compile(r"(?:(\w+)=)?(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_TEST = "test"  # held out where there is no validation
_HASHED_AT_A_TIME = 10_000  # rows
_DIGITS = 32  # of a picture's checksum


class Row(NamedTuple):
    """What is known of a row of the source, beside its picture."""

    number: int
    label: int | None
    caption: str | None


@dataclass
class Rows:
    """The rows of one split, in their order."""

    table: Any  # a map-style data set of datasets, whose pictures are not decoded
    image: str  # name of its column of pictures
    label: str | None  # of labels, or None
    caption: str | None  # of texts, or None
    # label of each class that the column names; empty where it has numbers
    numbers: dict[Any, int]
    of: str  # the split of the source that this is, as given
    folder: Path  # that paths are taken relative to
    files: Sequence[Path]  # that hold all rows; none where each picture is a file of its own

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Row:
        """A row, or a ValueError that says what it lacks."""
        columns = self.table[row]
        label = caption = None
        if self.label is not None:
            value = columns[self.label]
            if value in (None, "") or value != value or (not self.numbers and value < 0):
                raise ValueError(f"its {self.label} is {value if value != '' else 'empty'}")
            label = self.numbers[value] if self.numbers else int(value)
        if self.caption is not None:
            caption = columns[self.caption]
            if isinstance(caption, list):  # several texts of one picture
                caption = caption[0] if caption else None
            caption = "" if caption is None else str(caption)
        return Row(row, label, caption)

    def content(self, row: int) -> bytes | str:
        """Bytes, or the path, of a row's picture."""
        value = self.table[row][self.image]
        if isinstance(value, dict) and OFFSET in value:
            with Path(value["tar"]).open("rb") as file:
                file.seek(value[OFFSET])
                return file.read(value["size"])
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise ValueError(f"it has no {self.image}")
        return str(self.folder / value) if isinstance(value, str) else value

    def name(self, row: int) -> str | None:
        """File that a row's picture came from, where the source says so."""
        try:
            value = self.table[row][self.image]
        except Exception:  # the row itself cannot be read
            return None
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str):
            return None
        inside = Path(path).is_relative_to(self.folder)
        return str(Path(path).relative_to(self.folder)) if inside else path

    def digest(self, row: int) -> str:
        """Checksum of a row's picture as it lies in the source, empty if there is none."""
        try:
            content = self.content(row)
            if isinstance(content, str):
                return sha256_of(Path(content))[:_DIGITS]
            return hashlib.sha256(content).hexdigest()[:_DIGITS]
        except (ValueError, FileNotFoundError):
            return ""

    def seen(self, rows: range) -> str | None:
        """The state of the files of some rows in short, None where their times may deceive."""
        import pyarrow as pa
        from pyarrow import compute

        column = self.table.with_format("arrow")[rows.start : rows.stop][self.image]
        kind = column.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # not of a tar file
            column = column.filter(compute.is_null(compute.struct_field(column, ["bytes"])))
            column = compute.struct_field(column, ["path"])
        text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        paths = [self.folder / path for path in column.to_pylist() if path] if text else []
        of_hub = not self.files and not paths
        return self.table._fingerprint if of_hub else stamp([*self.files, *paths])

    def fingerprint(self) -> str:
        """Checksum of names and lengths of the pictures, labels and texts; not of the pixels."""
        digest = hashlib.sha256()
        columns = [c for c in (self.image, self.label, self.caption) if c is not None]
        table = self.table.with_format("arrow").select_columns(columns)
        for start in range(0, len(table), _HASHED_AT_A_TIME):
            part = table[start : start + _HASHED_AT_A_TIME]
            digest.update(repr(_summary(part[self.image], str(self.folder))).encode())
            for name in columns[1:]:
                digest.update(repr(part[name].to_pylist()).encode())
        return digest.hexdigest()


def _summary(column: Any, folder: str) -> list[list[Any]]:
    """Lengths and names that a column of pictures holds, without reading the pictures."""
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_struct(column.type):
        fields = [column.type.field(i).name for i in range(column.type.num_fields)]
        parts = (_summary(compute.struct_field(column, [name]), folder) for name in fields)
        return [values for part in parts for values in part]
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return [compute.binary_length(column).to_pylist()]
    return [[v.removeprefix(folder) if isinstance(v, str) else v for v in column.to_pylist()]]


@dataclass(frozen=True)
class Source:
    """A source with its splits, columns and classes."""

    name: str  # as given; a folder by its full path
    config: str | None  # of a data set on the hub that has several
    splits: dict[str, Rows]  # rows of "train" and, perhaps, "validation"
    classes: tuple[str, ...]  # names of the labels; empty without labels
    notes: tuple[str, ...] = ()  # what was decided about it

    @property
    def captions(self) -> bool:
        return next(iter(self.splits.values())).caption is not None

    def describe(self) -> dict[str, Any]:
        """Plain types that tell it from another source."""
        rows = next(iter(self.splits.values()))
        return {
            "name": self.name,
            "config": self.config,
            "columns": {"image": rows.image, "label": rows.label, "caption": rows.caption},
            "splits": {
                name: {"of": rows.of, "rows": len(rows), "fingerprint": rows.fingerprint()}
                for name, rows in self.splits.items()
            },
        }


def datasets_module() -> Any:
    """Hugging Face datasets, or the error that says how to install it."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            missing("preparing data needs Hugging Face datasets", "prepare")
        ) from error
    return datasets


def open_source(settings: PrepareSettings) -> Source:
    """The rows of a source, their columns found, or a ValueError that says what is wrong."""
    datasets = datasets_module()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    loaded = _load(datasets, settings)
    chosen = _choose_splits(loaded.tables, settings)
    first = next(iter(chosen.values())).table.features
    image = find_image(first, settings.image_column)
    label = find_column(first, settings.label_column, "label")
    caption = find_column(first, settings.caption_column, "caption")
    used = [column for column in (image, label, caption) if column is not None]
    for name, split in chosen.items():
        if lacks := [column for column in used if column not in split.table.column_names]:
            raise ValueError(
                f"{name} has no column {lacks[0]!r}, which the other split has; choose columns of "
                f"both, or {NONE}"
            )
        split.table = split.table.select_columns(used)
        kind = type(split.table.features[image])
        if kind in (datasets.Image, datasets.Video):
            split.table = split.table.cast_column(image, kind(decode=False))
    classes, numbers = find_classes([split.table for split in chosen.values()], label)
    path = Path(settings.source)
    folder = (path if path.is_dir() else path.parent).absolute()
    splits = {
        ours: Rows(split.table, image, label, caption, numbers, split.text, folder, loaded.files)
        for ours, split in chosen.items()
    }
    if not any(map(len, splits.values())):
        raise ValueError(f"{settings.source} has no rows; give one with pictures in it")
    notes = [
        f"{counted(len(rows), 'row')} in {ours}{'' if rows.of == ours else f', of {rows.of}'}"
        for ours, rows in splits.items()
    ]
    taken = {split.name for split in chosen.values()}
    unused = [name for name in loaded.tables if name not in taken]
    notes += [
        f"{name}, of {counted(len(loaded.tables[name]), 'row')}, is not used" for name in unused
    ]
    notes.append(counted(len(classes), "class") if label else "no labels")
    notes.append(f"captions in {caption}" if caption else "no captions")
    if caption and not hasattr(first[caption], "dtype"):
        notes.append(f"of several texts in {caption} the first is taken")
    for ours, rows in splits.items() if caption else ():
        if empty := sum(text in (None, "", []) for text in rows.table[caption]):
            notes.append(f"{empty} of {len(rows)} captions in {ours} are empty")
    if spare := [name for name in first if name not in used]:
        notes.append(f"columns that are not used: {', '.join(spare)}")
    name = str(path.absolute()) if path.exists() else settings.source
    return Source(name, settings.source_config, splits, classes, (*notes, *loaded.notes))


def _load(datasets: Any, settings: PrepareSettings) -> Layout:
    """Load all splits of the source, by name."""
    name, path, loaded = settings.source, Path(settings.source), Layout(settings)
    pattern = "*" in name and not path.exists()
    if Path(settings.out).absolute() == path.absolute():
        raise ValueError(f"{name} is the source and the folder to write; give another one")
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"{name} is an empty folder; give one with pictures in it")
    local = name.startswith((".", "/", "~")) or path.suffix in SUFFIXES
    if local and not path.exists() and not pattern:
        raise ValueError(f"there is no {name}; give a folder, a file, or a name on the hub")
    if (path.exists() or pattern) and settings.source_config is not None:
        raise ValueError(f"source_config is of data sets on the hub, and {name} is none")
    is_saved = any((path / file).exists() for file in ("state.json", "dataset_dict.json"))
    if is_idx_folder(path):
        loaded.tables = idx_tables(path)
    elif (path.exists() or pattern) and not is_saved:
        loaded.read()
        return loaded
    else:
        with by_datasets(name):
            tables = (
                datasets.load_from_disk(name)
                if is_saved
                else datasets.load_dataset(name, settings.source_config)
            )
        loaded.tables = {"train": tables} if isinstance(tables, datasets.Dataset) else dict(tables)
    loaded.files = files_of(path)[0] if path.exists() else []
    return loaded


@dataclass
class _Split:
    """A split of the source, or a part of one, that is to be used."""

    table: Any
    name: str  # of the source's split
    text: str  # as it was given


def _choose_splits(given: dict[str, Any], settings: PrepareSettings) -> dict[str, _Split]:
    """What becomes train and validation."""
    chosen: dict[str, _Split] = {}
    for text in settings.splits or _usual_splits(given, settings):
        match = _SPLIT.fullmatch(text)
        if not match:
            raise ValueError(
                f"split {text!r} is not understood; give a name, such as train, or which is to "
                f"become which, such as 'validation=train[-1000:]'"
            )
        ours, theirs, start, end = match.groups()
        ours = ours or theirs
        check_choice(theirs, given, "split", " of the source")
        if ours not in SPLITS:
            raise ValueError(f"a split becomes train or validation; give train={text} or the like")
        if ours in chosen:
            raise ValueError(f"two splits become {ours}; give one")
        table = given[theirs]
        rows = range(len(table))[_position(start, len(table)) : _position(end, len(table))]
        if len(rows) < len(table):
            table = table.select(rows if len(rows) else [])
        chosen[ours] = _Split(table, theirs, text)
    return chosen


def _position(text: str | None, count: int) -> int | None:
    """Where a split's part begins or ends; 5% is of all."""
    if text is None:
        return None
    return int(text[:-1]) * count // 100 if text.endswith("%") else int(text)


def _usual_splits(given: dict[str, Any], settings: PrepareSettings) -> list[str]:
    """Train and validation, or a test split like train; without train the first alone."""
    usual = [name for name in SPLITS if name in given]
    if usual == ["train"] and _TEST in given and given[_TEST].features == given["train"].features:
        test = given[_TEST]
        label = find_column(test.features, settings.label_column, "label")
        if label is None or not {-1, None}.issuperset(test.unique(label)):  # none are hidden
            usual.append(f"validation={_TEST}")
    return usual if "train" in given else [f"train={next(iter(given))}"]
