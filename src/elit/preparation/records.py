"""Records of what a folder holds, and whether its files and its source's pictures are still so."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from elit._files import sha256_of, write_json
from elit._plain import from_plain
from elit.data.manifest import NULL, NULL_RECORD, SETTINGS, Shard, read_manifest
from elit.data.shards import what_is_wrong
from elit.preparation.source import Rows

logger = logging.getLogger(__name__)

_Plain = TypeVar("_Plain")

# Where things lie may differ from run to run; what they hold may not.
_FREE = tuple((what, "name") for what in ("source", "autoencoder", "text_encoder", "features"))


@dataclass(frozen=True)
class Piece:
    """Rows of a split that are done or undone together."""

    split: str
    number: int
    rows: range

    @property
    def name(self) -> str:
        """Beginning of the names of its files."""
        return f"{self.split}-{self.number:05d}"


@dataclass(frozen=True)
class Record:
    """Content of a finished part."""

    start: int  # its first row of the source
    stop: int  # the row after its last
    shards: tuple[Shard, ...]  # its files
    skipped: tuple[tuple[int, str], ...]  # row and reason of what could not be read
    # sum, sum of squares and count of its latents, scaled as training draws them
    sums: tuple[float, float, int]
    cut: dict[str, int] = field(default_factory=dict)  # captions that were cut off, by where
    # checksum of each row's picture in the source; none of an older elit's
    content: tuple[str, ...] = ()
    seen: str | None = None  # state of the source's files before they were read, see `Rows.seen`


def read_record(folder: Path, piece: Piece) -> Record | None:
    """The record of a part, None if it is not done or what it wrote is not there in full."""
    record = _read(folder / f"{piece.name}.json", Record)
    if record is None or (record.start, record.stop) != (piece.rows.start, piece.rows.stop):
        return None
    return record if _is_full(folder, record.shards) else None


def read_null(folder: Path) -> Shard | None:
    """File of the empty text, None if it is not there in full."""
    shard = _read(folder / NULL_RECORD, Shard)
    return shard if shard is not None and _is_full(folder, [shard]) else None


def _read(path: Path, kind: type[_Plain]) -> _Plain | None:
    try:
        return from_plain(kind, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _is_full(folder: Path, shards: Sequence[Shard]) -> bool:
    try:
        return all((folder / shard.file).stat().st_size == shard.bytes for shard in shards)
    except OSError:
        return False


def verify(folder: str | Path) -> dict[str, str]:
    """Name and reason of every file of a finished folder that is damaged or missing."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    files = [shard for split in manifest.splits.values() for shard in split.shards]
    files += [manifest.null] if manifest.null else []
    reasons = {file.file: what_is_wrong(folder, file, sha256_of) for file in files}
    if manifest.text_encoder is not None and manifest.null is None:
        reasons[NULL] = "the manifest has no checksum of it"
    return {name: reason for name, reason in reasons.items() if reason}


def forget_damaged(folder: Path, pieces: Sequence[Piece], null: bool) -> None:
    """Remove the records of damaged shards, so that they are made again."""
    records = {
        f"{piece.name}.json": record.shards
        for piece in pieces
        if (record := read_record(folder, piece)) is not None
    }
    if null and (shard := read_null(folder)) is not None:
        records[NULL_RECORD] = (shard,)
    for name, shards in records.items():
        for shard in shards:
            if reason := what_is_wrong(folder, shard, sha256_of):
                logger.warning("%s is damaged: %s; it is made again", shard.file, reason)
                (folder / name).unlink(missing_ok=True)


def check_content(folder: Path, piece: Piece, rows: Rows, verify: bool) -> None:
    """Raise a ValueError if the source's pictures are not those that a finished part was made of.

    Where sizes and times are as they were, the pictures are read for it only to `verify`.
    """
    record = read_record(folder, piece)
    if record is None:
        return
    seen, path = rows.seen(piece.rows), folder / piece.name
    if seen is not None and seen == record.seen and not verify:
        return
    if len(record.content) != len(piece.rows):
        raise ValueError(
            f"{path}.json does not tell the content of the pictures that it was made of, "
            f"as it is of an older elit: train on it as it is, or prepare into another folder"
        )
    for row, digest in zip(piece.rows, record.content, strict=True):
        if rows.digest(row) != digest:
            raise ValueError(
                f"{rows.name(row) or f'row {row}'} of {piece.split} is another picture than the "
                f"one that {path} was made of; prepare into another folder"
            )
    if seen is not None:
        write_json(Path(f"{path}.json"), asdict(replace(record, seen=seen)))


def check_same(folder: Path, content: dict[str, Any]) -> bool:
    """Tell whether a folder was begun with these settings; False if it is empty.

    Raises:
        ValueError: if it was begun with others, or holds something else.
    """
    path = folder / SETTINGS
    # Looked for first: the settings of a process that starts just now come before all else
    other = next((p.name for p in sorted(folder.iterdir()) if not p.name.startswith(".")), None)
    if not path.exists():
        if other is not None:
            raise ValueError(
                f"{folder} holds other things, such as {other}; give a new folder, or an empty one"
            )
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); prepare into another folder") from error
    differ = sorted(_differences(before, content, ()))
    differ.sort(key=lambda one: one[0].endswith(".fingerprint"))  # it follows from others
    if differ:
        name, was, now = differ[0]
        more = f", and {len(differ) - 1} more" if len(differ) > 1 else ""
        if name.endswith(".fingerprint"):
            raise ValueError(
                f"{folder} was begun with other pictures, labels or captions in "
                f"{name.split('.')[-2]} than its source has now; prepare into another folder"
            )
        raise ValueError(
            f"{folder} was begun with {name}={was:.80}, not {now:.80}{more}; give the same source "
            f"and settings to go on, or another folder"
        )
    return True


def _differences(before: Any, now: Any, place: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Name, value before and value now of everything that differs."""
    if place in _FREE or before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for key in sorted({*before, *now})
            for difference in _differences(before.get(key), now.get(key), (*place, key))
        ]
    return [(".".join(place), json.dumps(before), json.dumps(now))]
