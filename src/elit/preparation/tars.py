"""Tar files as WebDataset has them: names that are alike up to their first dot are of one row."""

import json
import tarfile
from pathlib import Path
from typing import Any

from elit.preparation.listing import is_hidden
from elit.preparation.tables import as_table, columns_of

_TEXTS = ("cls", "json", "txt", "text", "caption")
OFFSET = "offset"  # a column with it holds places in tar files


def read_tars(datasets: Any, paths: list[Path], pictures: frozenset[str], left: list[str]) -> Any:
    """A table of the rows of tar files, whose pictures stay where they are."""
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
            text = file.read().decode("utf-8-sig") if file else ""
            found = json.loads(text) if kind == "json" else {kind: text.strip()}
            if not isinstance(found, dict):
                raise ValueError(f"{member.name} is no JSON object")
            if kind == "cls" and text.strip().removeprefix("-").isdecimal():
                found = {kind: int(text)}
            rows.setdefault(f"{folder}/{key}", {}).update(found)
        else:
            left.append(f"{path.name}/{member.name}")
    return list(rows.values())
