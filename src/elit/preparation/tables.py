"""Tables as people write them, CSV, JSON and JSON lines, and folders of idx files."""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from elit.data.fashion_mnist import CLASS_NAMES
from elit.data.idx import read_split
from elit.preparation.columns import CAPTION_NAMES, LABEL_NAMES

TABLES = (".csv", ".json", ".jsonl")
Columns = dict[str, list[Any]]
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
        reader = csv.DictReader(file, strict=True)
        names = list(reader.fieldnames or ())
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


def columns_of(rows: Sequence[dict[str, Any]]) -> Columns:
    """The rows' values by column; None where one has none."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def as_table(
    datasets: Any, columns: Columns, where: Path, left: list[str], image: str | None = None
) -> Any:
    """A table of datasets, or a ValueError that names a column of several types.

    Args:
        datasets: the module.
        columns: their values.
        where: they were read from.
        left: what was left out; a column of several types that has no usual name is added.
        image: the column of paths of pictures, if there is one.
    """
    import pyarrow as pa

    arrays, kinds = {}, {}
    for name, values in columns.items():
        try:
            arrays[name] = pa.array(values)
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


def file_column(names: Iterable[str], where: Path) -> str:
    """The column of a metadata file that names the pictures."""
    names = list(names)
    columns = ["file_name"] if "file_name" in names else []
    columns = columns or [name for name in names if name.endswith("_file_name")]
    if len(columns) != 1:
        raise ValueError(
            f"{where} must have one column file_name, with paths from its folder; it has "
            f"{', '.join(names) or 'none'}"
        )
    return columns[0]


def idx_tables(datasets: Any, folder: Path) -> dict[str, Any]:
    """Splits "train" and "test" of a folder as `datasets` would read them from the hub.

    Each picture is a PGM file in memory: a header in front of its pixels, which costs no encoding.
    """
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
