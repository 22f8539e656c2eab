"""Source of pictures: whatever Hugging Face datasets reads, addressed by row."""

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elit._choices import check_choice
from elit._extras import missing
from elit._files import sha256_of
from elit._listing import files_of, stamp
from elit.data import SPLITS
from elit.data.idx import is_idx_folder
from elit.preparation.columns import (
    count_empty,
    find_captions,
    find_classes,
    find_image,
    find_labels,
)
from elit.preparation.layout import SUFFIXES, Layout
from elit.preparation.settings import NONE, PrepareSettings
from elit.preparation.tables import OFFSET, by_datasets, idx_tables

_SPLIT = re.compile(r"(?:(\w+)=)?(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_TEST = "test"  # held out where there is no validation
_HASHED_AT_A_TIME = 10_000  # rows
_DIGITS = 32  # of a picture's checksum


@dataclass(frozen=True)
class Row:
    """A row of the source: its picture's bytes or path, its label and its text."""

    content: bytes | str
    label: int | None
    caption: str | None


@dataclass
class Rows:
    """The rows of one split, in their order."""

    table: Any  # a map-style data set of datasets, whose pictures are not decoded
    image: str  # name of its column of pictures
    label: str | None = None  # of labels, or None
    caption: str | None = None  # of texts, or None
    # label of each class that the column names; empty where it has numbers
    numbers: dict[Any, int] = field(default_factory=dict)
    of: str = ""  # the split of the source that this is, as given
    folder: Path = field(default_factory=Path)  # that paths are taken relative to
    files: tuple[Path, ...] = ()  # that hold all rows; none where each picture is a file of its own

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
        return Row(self._content(columns[self.image]), label, caption)

    def _content(self, value: Any) -> bytes | str:
        """Bytes, or a path, of what stands in the column."""
        if isinstance(value, dict) and OFFSET in value:
            with Path(value["tar"]).open("rb") as file:
                file.seek(value[OFFSET])
                return file.read(value["size"])
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise ValueError(f"it has no {self.image}")
        if isinstance(value, str) and not Path(value).is_absolute():
            return str(self.folder / value)
        return value

    def name(self, row: int) -> str | None:
        """File that a row's picture came from, where the source says so."""
        value = self.table[row][self.image]
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str):
            return None
        inside = Path(path).is_relative_to(self.folder)
        return str(Path(path).relative_to(self.folder)) if inside else path

    def digest(self, row: int) -> str:
        """Checksum of a row's picture as it lies in the source, empty if there is none."""
        try:
            content = self._content(self.table[row][self.image])
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
    given = loaded.tables
    chosen = _choose_splits(given, settings.splits or _usual_splits(given, settings))
    tables = {ours: _cut(given[theirs], part) for ours, (theirs, part, _) in chosen.items()}
    first = next(iter(tables.values()))
    image = find_image(first.features, settings.image_column)
    label = find_labels(first.features, settings.label_column)
    caption = find_captions(first.features, settings.caption_column)
    for name, table in tables.items():
        used = [column for column in (image, label, caption) if column is not None]
        if lacks := [column for column in used if column not in table.column_names]:
            raise ValueError(
                f"{name} has no column {lacks[0]!r}, which the other split has; choose columns of "
                f"both, or {NONE}"
            )
        kind = type(table.features[image])
        if kind in (datasets.Image, datasets.Video):
            table = table.cast_column(image, kind(decode=False))
        tables[name] = table.select_columns(used)
    classes, numbers = find_classes(list(tables.values()), label)
    path = Path(settings.source)
    folder = (path if path.is_dir() else path.parent).absolute()
    splits = {
        ours: Rows(
            table, image, label, caption, numbers, chosen[ours][2], folder, tuple(loaded.files)
        )
        for ours, table in tables.items()
    }
    if not any(map(len, splits.values())):
        raise ValueError(f"{settings.source} has no rows; give one with pictures in it")
    name = str(path.absolute()) if path.exists() else settings.source
    taken = {theirs for theirs, _, _ in chosen.values()}
    notes = [
        f"{len(rows)} rows in {ours}{'' if rows.of == ours else f', of {rows.of}'}"
        for ours, rows in splits.items()
    ]
    notes += [f"{len(given[n])} rows of {n} are not used" for n in given if n not in taken]
    notes.append(f"{len(classes)} classes" if label else "no labels")
    notes.append(f"captions in {caption}" if caption else "no captions")
    if caption and not hasattr(first.features[caption], "dtype"):
        notes.append(f"of several texts in {caption} the first is taken")
    if caption and isinstance(loaded, Layout):
        for ours, table in tables.items():
            if empty := count_empty(table, caption):
                notes.append(f"{empty} of {len(table)} captions in {ours} are empty")
    if spare := [n for n in first.features if n not in (image, label, caption)]:
        notes.append(f"columns that are not used: {', '.join(spare)}")
    return Source(name, settings.source_config, splits, classes, (*notes, *loaded.notes))


@dataclass
class _Loaded:
    """Tables of datasets by split, the files that hold them, and what was decided."""

    tables: dict[str, Any]
    files: Sequence[Path] = ()
    notes: Sequence[str] = ()


def _load(datasets: Any, settings: PrepareSettings) -> _Loaded | Layout:
    """Load all splits of the source, by name."""
    name, path = settings.source, Path(settings.source)
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
    if is_idx_folder(path):
        return _Loaded(idx_tables(datasets, path), files_of(path)[0])
    is_saved = any((path / file).exists() for file in ("state.json", "dataset_dict.json"))
    if (path.exists() and not is_saved) or pattern:
        return Layout.of(datasets, settings)
    with by_datasets(name):
        if is_saved:
            loaded, files = datasets.load_from_disk(name), files_of(path)[0]
        else:
            loaded, files = datasets.load_dataset(name, settings.source_config), []
    return _Loaded(
        {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded), files
    )


Chosen = dict[str, tuple[str, tuple[str | None, str | None], str]]


def _usual_splits(given: dict[str, Any], settings: PrepareSettings) -> list[str]:
    """Train and validation, or a test split like train; without train the first alone."""
    usual = [name for name in SPLITS if name in given]
    if usual == ["train"] and _TEST in given:
        test = given[_TEST]
        if test.features == given["train"].features:
            label = find_labels(test.features, settings.label_column)
            if label is None or not {-1, None}.issuperset(test.unique(label)):  # none are hidden
                usual.append(f"validation={_TEST}")
    return usual if "train" in given else [f"train={next(iter(given))}"]


def _choose_splits(given: dict[str, Any], typed: Sequence[str]) -> Chosen:
    """Our name: their name, from where to where, and how it was given."""
    chosen: Chosen = {}
    for text in typed:
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
        chosen[ours] = (theirs, (start, end), text)
    return chosen


def _cut(table: Any, part: tuple[str | None, str | None]) -> Any:
    """Rows from and up to; 5% is of all."""
    if part == (None, None):
        return table

    def position(text: str | None) -> int | None:
        if text is None:
            return None
        return int(text[:-1]) * len(table) // 100 if text.endswith("%") else int(text)

    rows = range(len(table))[position(part[0]) : position(part[1])]
    return table.select(range(rows.start, rows.stop) if len(rows) else [])
