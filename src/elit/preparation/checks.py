"""Checks of a folder: that it may be written to, and holds what was written."""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from elit._files import sha256_of, write_json
from elit.data.manifest import NULL, SETTINGS, read_manifest
from elit.data.shards import what_is_wrong
from elit.preparation.parts import read_record, stem
from elit.preparation.source import Rows

logger = logging.getLogger(__name__)

# Where things lie may differ from run to run; what they hold may not.
_FREE = (("source", "name"), ("autoencoder", "name"), ("text_encoder", "name"))


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


def json_types(value: Any) -> Any:
    """Convert a value to what JSON would give back."""
    return json.loads(json.dumps(value))


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
