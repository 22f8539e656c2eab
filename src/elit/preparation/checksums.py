"""Whether a prepared folder still holds what was written."""

import logging
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from elit._files import sha256_of, write_json
from elit.data.manifest import NULL, read_manifest
from elit.data.shards import what_is_wrong
from elit.preparation.parts import read_record, stem
from elit.preparation.source import Rows

logger = logging.getLogger(__name__)


def verify(folder: str | Path) -> dict[str, str]:
    """Name and reason of every file of a finished folder that is damaged or missing."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    files = [shard for split in manifest.splits.values() for shard in split.shards]
    files += [manifest.null] if manifest.null else []
    found = {file.file: what_is_wrong(folder, file, sha256_of) for file in files}
    if manifest.text_encoder is not None and manifest.null is None:
        found[NULL] = "the manifest has no checksum of it"
    return {name: reason for name, reason in found.items() if reason}


def check_content(folder: Path, part: tuple[str, int, range], rows: Rows, verify: bool) -> None:
    """Raise a ValueError if the source's pictures are not those that a finished part was made of.

    Where sizes and times are as they were, the pictures are read for it only to `verify`.
    """
    record = read_record(folder, *part)
    if record is None:
        return
    seen, name = rows.seen(part[2]), stem(*part[:2])
    if seen is not None and seen == record.seen and not verify:
        return
    if len(record.content) != len(part[2]):
        raise ValueError(
            f"{folder / name}.json does not tell the content of the pictures that it was made of, "
            f"as it is of an older elit: train on it as it is, or prepare into another folder"
        )
    for row, digest in zip(part[2], record.content, strict=True):
        if rows.digest(row) != digest:
            raise ValueError(
                f"{rows.name(row) or f'row {row}'} of {part[0]} is another picture than the one "
                f"that {folder / name} was made of; prepare into another folder"
            )
    if seen is not None:
        write_json(folder / f"{name}.json", asdict(replace(record, seen=seen)))


def forget_damaged(folder: Path, parts: Iterable[tuple[str, int, range]]) -> None:
    """Remove the records of those parts whose shards are damaged, so that they are made again."""
    for part in parts:
        record = read_record(folder, *part)
        for shard in record.shards if record else ():
            if reason := what_is_wrong(folder, shard, sha256_of):
                logger.warning("%s is damaged: %s; it is made again", shard.file, reason)
                (folder / f"{stem(*part[:2])}.json").unlink(missing_ok=True)
