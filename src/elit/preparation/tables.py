"""Files of many rows as tables of datasets: parquet, arrow, tar, CSV, JSON, idx.

Tar files, as WebDataset has them, are read by hand: datasets copies all their pictures.
"""

import csv
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from elit._files import digest_of, sha256_of
from elit._hub import hub_reason, not_fetched
from elit._listing import is_hidden, stamp
from elit.data.fashion_mnist import CLASS_NAMES
from elit.data.idx import read_split
from elit.preparation.columns import CAPTION_NAMES, LABEL_NAMES

TABLES = (".csv", ".json", ".jsonl")
_TEXTS = ("cls", "json", "txt", "text", "caption")  # endings in tar files
BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}  # of datasets
OFFSET = "offset"  # a column with it holds places in tar files
_WHOLE = re.compile(r"0|-?[1-9]\d{0,17}")  # as Python writes it, so that nothing is lost


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, or a ValueError that says what is wrong with its file.

    Of CSV all are texts, `null` and `NA` too, but for columns of whole numbers alone.
    """
    try:
        if path.suffix.lower() == ".csv":
            return _read_csv(path)
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        return _read_json(path)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}); mend or remove it") from error


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        separator = max(",;\t", key=file.readline().count)  # as spreadsheets write them
        file.seek(0)
        reader = csv.DictReader(file, strict=True, delimiter=separator, skipinitialspace=True)
        names = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"two of its columns have one name: {', '.join(names)}")
        rows: list[dict[str, Any]] = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has not as many fields as the first")
            rows.append(row)
    for name in names:
        values = {row[name] for row in rows} - {""}
        if values and all(map(_WHOLE.fullmatch, values)):
            for row in rows:
                row[name] = int(row[name]) if row[name] else None
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
        rows = [rows] if isinstance(rows, dict) and path.suffix.lower() == ".jsonl" else rows
    except ValueError:  # a row a line
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError('it is no list of rows; write one as {"file_name": "0.png", ...} a line')
    return rows


def as_table(
    rows: Sequence[dict[str, Any]], where: Path, left: list[str], image: str | None = None
) -> Any:
    """A table of datasets, with the column `image` of paths, if there is one.

    A column of several types is an error where its name is that of labels or captions; else it is
    added to what is `left` out.
    """
    import datasets
    import pyarrow as pa

    arrays, kinds = {}, {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            arrays[name] = pa.array([row.get(name) for row in rows])
        except UnicodeEncodeError as error:
            raise ValueError(f"{error.object!r} is no UTF-8; give the file such a name") from error
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            if name.lower() in (*LABEL_NAMES, *CAPTION_NAMES):
                raise ValueError(
                    f"the column {name!r} of {where} holds several types ({error}); give all its "
                    f"values one, such as text"
                ) from error
            left.append(f"the column {name} of {where.name}, of several types")
            continue
        kinds[name] = datasets.features.features.generate_from_arrow_type(arrays[name].type)
    if image is not None:
        kinds[image] = datasets.Image(decode=False)
    return datasets.Dataset.from_dict(arrays, features=datasets.Features(kinds))


def file_column(rows: Sequence[dict[str, Any]], where: Path) -> str:
    """The column of a metadata file that names the pictures."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [name for name in names if name == "file_name"] or [
        name for name in names if name.endswith("_file_name")
    ]
    if len(columns) != 1:
        raise ValueError(
            f"{where} must have one column file_name, with paths from its folder; it has "
            f"{', '.join(names) or 'no rows'}"
        )
    return columns[0]


def idx_tables(folder: Path) -> dict[str, Any]:
    """Splits "train" and "test" of a folder as `datasets` would read them from the hub.

    Each picture is a PGM file in memory: a header in front of its pixels, which costs no encoding.
    """
    import datasets

    columns = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=list(CLASS_NAMES))
    )
    tables = {}
    for name, split in (("train", "train"), ("test", "validation")):
        images, labels = read_split(folder, split, len(CLASS_NAMES))
        header = "P5 {1} {0} 255\n".format(*images.shape[1:]).encode()
        pictures = [{"bytes": header + pixels.tobytes(), "path": None} for pixels in images]
        rows = {"image": pictures, "label": labels.tolist()}
        tables[name] = datasets.Dataset.from_dict(rows, features=columns)
    return tables


def read_tars(paths: list[Path], pictures: frozenset[str], left: list[str]) -> Any:
    """A table of the rows of tar files, whose pictures stay where they are.

    Names that are alike up to their first dot are of one row.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            with tarfile.open(path, "r:") as tar:
                rows += _rows_of(tar, path, pictures, left)
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); copy or pack it again") from error
    shown = {n for row in rows for n, v in row.items() if isinstance(v, dict) and OFFSET in v}
    if len(shown) > 1 and all(len(shown & row.keys()) < 2 for row in rows):
        rows = [{"image" if n in shown else n: v for n, v in row.items()} for row in rows]
    return as_table(rows, paths[0], left)


def _rows_of(
    tar: tarfile.TarFile, path: Path, pictures: frozenset[str], left: list[str]
) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for member in tar:
        folder, _, name = member.name.removeprefix("./").rpartition("/")
        key, _, kind = name.partition(".")
        kind = kind.lower()
        if not member.isfile():
            continue
        if any(map(is_hidden, (*folder.split("/"), name))):
            left.append(f"{path.name}/{member.name}, hidden")
        elif f".{kind.rpartition('.')[2]}" in pictures:
            row = rows.setdefault(f"{folder}/{key}", {})
            if kind in row:
                raise ValueError(f"it has {member.name} twice")
            row[kind] = {
                "path": f"{path}/{member.name}", "tar": str(path), OFFSET: member.offset_data,
                "size": member.size,
            }  # fmt: skip
        elif kind in _TEXTS:
            file = tar.extractfile(member)
            try:
                text = file.read().decode("utf-8-sig") if file else ""
                columns = json.loads(text) if kind == "json" else {kind: text.strip()}
            except ValueError as error:
                raise ValueError(f"{member.name}: {error}") from error
            if not isinstance(columns, dict):
                raise ValueError(f"{member.name} is no JSON object")
            if kind == "cls" and text.strip().removeprefix("-").isdecimal():
                columns = {kind: int(text)}
            rows.setdefault(f"{folder}/{key}", {}).update(columns)
        else:
            left.append(f"{path.name}/{member.name}")
    if len(folders := sorted({name.rpartition("/")[0] for name in rows})) > 1:
        left.append(f"the folders in {path.name}, {folders[0] or '.'} to {folders[-1]}, as classes")
    return list(rows.values())


def load_files(kind: str, files: Sequence[Path]) -> Any:
    """Rows of parquet or arrow files, by datasets, which keeps a copy for each state of theirs."""
    import datasets

    counts = _count_rows(files) if kind == ".parquet" else dict.fromkeys(files, 1)
    state = stamp(files) or digest_of([sha256_of(file) for file in files])
    paths = {"train": [escape(str(file)) for file, count in counts.items() if count]}
    with by_datasets(str(files[0])):
        builder = BUILDERS[kind]
        table = datasets.load_dataset(builder, name=f"elit-{state}", data_files=paths)["train"]
    if kind == ".parquet" and (total := sum(counts.values())) != len(table):
        raise ValueError(f"{len(table)} of the {total} rows of {files[0].parent} were read")
    return table


def _count_rows(files: Sequence[Path]) -> dict[Path, int]:
    """Rows of parquet files; a ValueError unless all have the same columns, types and classes."""
    from pyarrow import ArrowInvalid, parquet

    counts: dict[Path, int] = {}
    first, wanted = files[0], dict[str, Any]()
    for file in files:
        try:
            about = parquet.ParquetFile(file)
        except ArrowInvalid as error:
            raise ValueError(f"{file} is no whole parquet file ({error}); copy it again") from error
        counts[file] = about.metadata.num_rows
        if not counts[file]:
            continue
        schema = about.schema_arrow
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = features.get("info", {}).get("features", {})
        columns = {
            name: (schema.field(name).type, features.get(name, {}).get("names"))
            for name in schema.names
        }
        if not wanted:
            first, wanted = file, columns
        if differ := sorted(n for n in wanted | columns if wanted.get(n) != columns.get(n)):
            raise ValueError(
                f"{file} and {first} differ in the column {differ[0]!r}; give files of the same "
                f"columns, types and classes"
            )
    if not any(counts.values()):
        raise ValueError(f"{files[0]} has no rows; give one with pictures in it")
    return counts


@contextmanager
def by_datasets(name: str) -> Iterator[None]:
    """Turn what datasets raises, of many kinds, into a ValueError about a source."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # a full disk has its own message
            raise
        if not Path(name).exists() and hub_reason(error) is not None:
            raise ValueError(not_fetched(name, error)) from error
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise ValueError(
            f"{name} cannot be read by datasets ({reason}); give a folder of pictures, of parquet "
            f"or of tar files, such a file, or a name on the hub"
        ) from error
