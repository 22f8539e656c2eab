"""The empty text, encoded: written once, by the process that makes the first part."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch

from elit._files import sha256_of, write_json
from elit.data.manifest import NULL, NULL_RECORD, Shard
from elit.data.shards import what_is_wrong
from elit.preparation.finite import faults, reason_of_fault
from elit.preparation.parts import write_shard
from elit.preparation.texts import TextEncoder

logger = logging.getLogger(__name__)


def read_null(folder: Path) -> Shard | None:
    """Its file, None if it is not there in full."""
    try:
        content = json.loads((folder / NULL_RECORD).read_text(encoding="utf-8"))
        shard = Shard(**{**content, "size": tuple(content["size"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if what_is_wrong(folder, shard) else shard


def make_null(folder: Path, texts: TextEncoder, dtype: torch.dtype, verify: bool) -> None:
    """Write it, and then its record, unless both are there; `verify` compares the checksum too."""
    found = read_null(folder)
    if found is not None and verify and (reason := what_is_wrong(folder, found, sha256_of)):
        logger.warning("%s is damaged: %s; it is made again", NULL, reason)
        found = None
    if found is not None:
        return
    computed = texts([""])
    stored = texts.stored(computed)
    for name, x in computed.items():
        if fault := int(faults(x, stored[name])):
            raise ValueError(
                f"the empty text: {reason_of_fault('text encoder', fault, dtype, texts.store)}"
            )
    write_json(folder / NULL_RECORD, asdict(write_shard(folder, NULL, (), stored)))
