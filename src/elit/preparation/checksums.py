"""Whether a prepared folder still holds what was written."""

import logging
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from elit.data.manifest import NULL, Shard, read_manifest
from elit.preparation.parts import read_record, sha256_of, stem

logger = logging.getLogger(__name__)


def verify(folder: str | Path) -> dict[str, str]:
    """Name and reason of every file of a finished folder that is damaged or missing."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    damaged = {}
    for split in manifest.splits.values():
        for shard in split.shards:
            if reason := damage(folder, shard):
                damaged[shard.file] = reason
    if manifest.text_encoder is not None and (reason := _null_damage(folder)):
        damaged[NULL] = reason
    return damaged


def damage(folder: Path, shard: Shard) -> str | None:
    """What is wrong with a shard, or None."""
    path = folder / shard.file
    if not path.is_file():
        return "it is missing"
    if (found := path.stat().st_size) != shard.bytes:
        return f"it has {found} bytes instead of {shard.bytes}"
    return None if sha256_of(path) == shard.sha256 else "its checksum is wrong"


def _null_damage(folder: Path) -> str | None:
    try:
        with safe_open(folder / NULL, framework="pt"):
            return None
    except (OSError, SafetensorError) as error:
        return str(error)


def remove_damaged(folder: Path, parts: Iterable[tuple[str, int, range]]) -> None:
    """Forget those of some parts whose shards are damaged, so that they are made again."""
    if _null_damage(folder):
        (folder / NULL).unlink(missing_ok=True)
    for part in parts:
        record = read_record(folder, *part)
        for shard in record.shards if record else ():
            if reason := damage(folder, shard):
                logger.warning("%s is damaged: %s; it is made again", shard.file, reason)
                (folder / f"{stem(*part[:2])}.json").unlink(missing_ok=True)
