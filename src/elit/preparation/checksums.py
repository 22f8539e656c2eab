"""Whether a prepared folder still holds what was written."""

import logging
from collections.abc import Iterable
from pathlib import Path

from elit._files import sha256_of
from elit.data.manifest import NULL, read_manifest
from elit.data.shards import what_is_wrong
from elit.preparation.parts import read_record, stem

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


def forget_damaged(folder: Path, parts: Iterable[tuple[str, int, range]]) -> None:
    """Remove the records of those parts whose shards are damaged, so that they are made again."""
    for part in parts:
        record = read_record(folder, *part)
        for shard in record.shards if record else ():
            if reason := what_is_wrong(folder, shard, sha256_of):
                logger.warning("%s is damaged: %s; it is made again", shard.file, reason)
                (folder / f"{stem(*part[:2])}.json").unlink(missing_ok=True)
