"""Files of many rows: parquet and arrow by datasets, tar files as WebDataset has them."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from elit._files import digest_of, sha256_of
from elit._hub import hub_reason, not_fetched
from elit._listing import is_hidden, stamp
from elit.preparation.tables import as_table, columns_of

_TEXTS = ("cls", "json", "txt", "text", "caption")
BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}  # of datasets
OFFSET = "offset"  # a column with it holds places in tar files


def read_tars(datasets: Any, paths: list[Path], pictures: frozenset[str], left: list[str]) -> Any:
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
    columns = columns_of(rows)
    shown = [n for n in columns if any(isinstance(v, dict) for v in columns[n])]
    if len(shown) > 1 and all(sum(name in row for name in shown) < 2 for row in rows):
        columns = {name: columns[name] for name in columns if name not in shown}
        columns["image"] = [next((row[n] for n in shown if n in row), None) for row in rows]
    return as_table(datasets, columns, paths[0], left)


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
                found = json.loads(text) if kind == "json" else {kind: text.strip()}
            except ValueError as error:
                raise ValueError(f"{member.name}: {error}") from error
            if not isinstance(found, dict):
                raise ValueError(f"{member.name} is no JSON object")
            if kind == "cls" and text.strip().removeprefix("-").isdecimal():
                found = {kind: int(text)}
            rows.setdefault(f"{folder}/{key}", {}).update(found)
        else:
            left.append(f"{path.name}/{member.name}")
    return list(rows.values())


def load_files(datasets: Any, kind: str, files: Sequence[Path]) -> Any:
    """Rows of parquet or arrow files, by datasets, which keeps a copy for each state of theirs."""
    if kind == ".parquet":
        from pyarrow import ArrowInvalid, parquet

        about = []
        for file in files:
            try:
                about.append(parquet.ParquetFile(file))
            except ArrowInvalid as error:
                raise ValueError(f"{file} is no whole parquet file ({error})") from error
    state = stamp(files) or digest_of([sha256_of(file) for file in files])
    paths = {"train": [escape(str(file)) for file in files]}
    with by_datasets(str(files[0])):
        builder = BUILDERS[kind]
        table = datasets.load_dataset(builder, name=f"elit-{state}", data_files=paths)["train"]
    if kind == ".parquet":
        first = set(about[0].schema_arrow.names)
        for file, one in zip(files, about, strict=True):
            if differ := first ^ set(one.schema_arrow.names):
                raise ValueError(
                    f"{file} and {files[0]} differ in the column {sorted(differ)[0]!r}; give files "
                    f"of the same columns"
                )
        listed = sum(one.metadata.num_rows for one in about)
        if listed != len(table):
            raise ValueError(f"{len(table)} of the {listed} rows of {files[0].parent} were read")
    return table


@contextmanager
def by_datasets(name: str) -> Iterator[None]:
    """Turns what datasets raises, of many kinds, into a ValueError about a source."""
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
