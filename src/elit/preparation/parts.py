"""One part of the source, from pictures to shards on the disk and the record that says so.

The empty text, encoded, is written once, by the process that makes the first part.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from elit._files import save_tensors, sha256_of, write_json
from elit._plain import from_plain
from elit.data.manifest import (
    CAPTION_ENDS,
    CAPTIONS,
    FLIPPED,
    LABELS,
    NULL,
    NULL_RECORD,
    ROWS,
    Shard,
    size_name,
)
from elit.data.shards import what_is_wrong
from elit.preparation.autoencoder import Encoder
from elit.preparation.reading import Chunk, Size
from elit.preparation.settings import DTYPES
from elit.preparation.texts import TextEncoder

logger = logging.getLogger(__name__)

_Plain = TypeVar("_Plain")

_COMPUTED, _STORED = 1, 2  # what made numbers not finite
_MANY, _SHARE = 8, 0.05  # rows of a part that are skipped: from here on it is told at once


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


def stem(split: str, number: int) -> str:
    """Beginning of the names of a part's files."""
    return f"{split}-{number:05d}"


def _read(path: Path, kind: type[_Plain]) -> _Plain | None:
    """Content of a record's file, None where it is not there or damaged."""
    try:
        return from_plain(kind, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def read_record(folder: Path, split: str, number: int, rows: range) -> Record | None:
    """The record of a part, None if it is not done or what it wrote is not there in full."""
    record = _read(folder / f"{stem(split, number)}.json", Record)
    if record is None or (record.start, record.stop) != (rows.start, rows.stop):
        return None
    try:
        sizes = [(folder / shard.file).stat().st_size for shard in record.shards]
    except OSError:
        return None
    return record if sizes == [shard.bytes for shard in record.shards] else None


@dataclass
class _Samples:
    """The samples of one size."""

    waiting: list[Tensor] = field(default_factory=list)  # pictures that are not encoded yet
    encoded: list[Tensor] = field(default_factory=list)
    flipped: list[Tensor] = field(default_factory=list)
    faults: list[Tensor] = field(default_factory=list)
    at: list[int] = field(default_factory=list)  # positions in the part's rows


class Part:
    """Gathers the rows of a part: encodes their pictures as they come, and writes them at its end.

    Batches never reach over a part's end, so that its bytes are the same whoever makes it.
    """

    def __init__(
        self,
        split: str,
        number: int,
        rows: range,
        encoder: Encoder,
        texts: TextEncoder | None,
        batch_size: int,
        flips: bool,
        seen: str | None = None,
    ):
        self.split, self.number, self.span = split, number, rows
        self.encoder, self.texts = encoder, texts
        self.batch_size, self.flips, self.seen = batch_size, flips, seen
        self.rows: list[int] = []
        self.labels: list[int | None] = []
        self.captions: list[str | None] = []
        self.skipped: list[tuple[int, str]] = []
        self.digests: list[str] = []
        self.cut: dict[str, int] = {}
        self.taken = 0  # rows of the source
        self._sizes: dict[Size, _Samples] = {}
        self._sums = [0.0, 0.0, 0]

    def add(self, chunk: Chunk) -> None:
        """Take the next rows."""
        offset = len(self.rows)
        self.taken += chunk.count
        self.rows += chunk.rows
        self.labels += chunk.labels
        self.captions += chunk.captions
        self.skipped += chunk.skipped
        self.digests += chunk.digests
        for size, (positions, pictures) in chunk.pictures.items():
            samples = self._sizes.setdefault(size, _Samples())
            samples.at += [offset + position for position in positions]
            samples.waiting.append(pictures)
            while sum(map(len, samples.waiting)) >= self.batch_size:
                self._encode(samples)

    def _encode(self, samples: _Samples) -> None:
        """Encode a batch of what is waiting."""
        waiting = torch.cat(samples.waiting)
        pictures, rest = waiting[: self.batch_size], waiting[self.batch_size :]
        samples.waiting = [rest] if len(rest) else []
        fault = torch.zeros(len(pictures), dtype=torch.int64)
        for is_stored, out in ((True, samples.encoded), (self.flips, samples.flipped)):
            if is_stored:
                encoded = self.encoder(pictures)
                stored = self.encoder.stored(encoded)
                fault = torch.where(fault == 0, faults(encoded, stored), fault)
                for i, value in enumerate(self.encoder.sums(encoded[fault == 0])):
                    self._sums[i] += value
                out.append(stored)
                pictures = pictures.flip(-2)
        samples.faults.append(fault)

    def finish(self) -> dict[Size, dict[str, Tensor]]:
        """Encode what is left and the texts; what to write, by size."""
        for samples in self._sizes.values():
            while samples.waiting:
                self._encode(samples)
        encoding, of_texts, which = self._encode_texts()
        good = self._good(of_texts[which])
        return {
            size: self._tensors(samples, encoding, which, good)
            for size, samples in sorted(self._sizes.items())
            if any(good[at] for at in samples.at)
        }

    def _encode_texts(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Encodings (texts, ...) by name, the fault (texts,) of each, and the text of each row."""
        if self.texts is None or not self.rows:
            return {}, torch.zeros(1, dtype=torch.int64), torch.zeros(len(self.rows)).long()
        texts = list(dict.fromkeys(caption or "" for caption in self.captions))
        number = {text: i for i, text in enumerate(texts)}
        batches, fault = [], []
        cut: dict[str, list[bool]] = {}
        for start in range(0, len(texts), self.batch_size):
            computed = self.texts(texts[start : start + self.batch_size])
            batches.append(self.texts.stored(computed))
            each = [faults(x, batches[-1][name]) for name, x in computed.items()]
            fault.append(torch.stack(each).amax(0))
            for where, which_are in self.texts.cut().items():
                cut.setdefault(where, []).extend(which_are)
        encoding = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        which = torch.tensor([number[caption or ""] for caption in self.captions])
        self.cut = {where: int(torch.tensor(are)[which].sum()) for where, are in cut.items()}
        return encoding, torch.cat(fault), which

    def _good(self, of_texts: Tensor) -> list[bool]:
        """Tell which rows are finite; the others are skipped.

        Raises:
            ValueError: if no row of many is.
        """
        of_pictures = torch.zeros_like(of_texts)
        for samples in self._sizes.values():
            of_pictures[samples.at] = of_pictures[samples.at].maximum(torch.cat(samples.faults))
        dtypes = self.encoder.dtype, self.encoder.store
        reasons = {
            at: reason_of_fault(whose, int(fault[at]), *dtypes)
            for whose, fault in (("text encoder", of_texts), ("autoencoder", of_pictures))
            for at in fault.nonzero().flatten().tolist()
        }
        name = stem(self.split, self.number)
        if len(reasons) == len(self.rows) >= _MANY:
            raise ValueError(f"no row of the part {name} can be stored: {reasons[0]}")
        unreadable = dict(self.skipped)
        skipped = {self.rows[at]: reason for at, reason in reasons.items()} | unreadable
        self.skipped = sorted(skipped.items())
        if len(self.skipped) >= max(_MANY, _SHARE * len(self.span)):
            logger.warning(
                "%s skips %d of its %d rows, such as row %d: %s",
                name, len(self.skipped), len(self.span), *self.skipped[0],
            )  # fmt: skip
        return [at not in reasons for at in range(len(self.rows))]

    def _tensors(
        self, samples: _Samples, encoding: dict[str, Tensor], which: Tensor, good: list[bool]
    ) -> dict[str, Tensor]:
        """Tensors of a shard."""
        keep = torch.tensor([good[at] for at in samples.at])
        at = [at for at in samples.at if good[at]]
        kind = self.encoder.kind
        tensors = {kind: torch.cat(samples.encoded)[keep]}
        if self.flips:
            tensors[kind + FLIPPED] = torch.cat(samples.flipped)[keep]
        tensors[ROWS] = torch.tensor([self.rows[i] for i in at])
        if at and self.labels[at[0]] is not None:
            tensors[LABELS] = torch.tensor([self.labels[i] for i in at])
        if at and self.captions[at[0]] is not None:
            texts = [(self.captions[i] or "").encode() for i in at]
            joined = bytearray(b"".join(texts) or b" ")  # no tensor is made of nothing
            tensors[CAPTIONS] = torch.frombuffer(joined, dtype=torch.uint8)
            tensors[CAPTION_ENDS] = torch.tensor(list(map(len, texts))).cumsum(0)
        return tensors | {name: x[which[at]] for name, x in encoding.items()}

    def write(self, folder: Path, tensors: dict[Size, dict[str, Tensor]]) -> Record:
        """Write the shards, then the record."""
        name = stem(self.split, self.number)
        shards = tuple(
            write_shard(folder, f"{name}-{size_name(size)}.safetensors", size, content)
            for size, content in tensors.items()
        )
        total, squares, count = self._sums
        record = Record(
            self.span.start, self.span.stop, shards, tuple(self.skipped),
            (float(total), float(squares), int(count)), self.cut, tuple(self.digests), self.seen,
        )  # fmt: skip
        write_json(folder / f"{name}.json", asdict(record))
        return record


def write_shard(folder: Path, name: str, size: Size, tensors: dict[str, Tensor]) -> Shard:
    """Write tensors (n, ...) into a file that is whole or not there."""
    path = folder / name
    save_tensors(path, tensors)
    count = next(len(x) for key, x in tensors.items() if key != CAPTIONS)
    return Shard(name, size, count, path.stat().st_size, sha256_of(path))


def parts_of(split: str, rows: int, part_size: int) -> Sequence[tuple[str, int, range]]:
    """Split, number and rows of each part of a split."""
    return [
        (split, number, range(start, min(rows, start + part_size)))
        for number, start in enumerate(range(0, rows, part_size))
    ]


# ---- the empty text ----


def read_null(folder: Path) -> Shard | None:
    """File of the empty text, None if it is not there in full."""
    shard = _read(folder / NULL_RECORD, Shard)
    return None if shard is None or what_is_wrong(folder, shard) else shard


def make_null(folder: Path, texts: TextEncoder, dtype: torch.dtype, verify: bool) -> None:
    """Write it, and then its record, unless both are there; `verify` compares the checksum too."""
    shard = read_null(folder)
    reason = what_is_wrong(folder, shard, sha256_of) if shard is not None and verify else None
    if shard is not None and reason is None:
        return
    if reason is not None:
        logger.warning("%s is damaged: %s; it is made again", NULL, reason)
    computed = texts([""])
    stored = texts.stored(computed)
    for name, x in computed.items():
        if fault := int(faults(x, stored[name])):
            raise ValueError(
                f"the empty text: {reason_of_fault('text encoder', fault, dtype, texts.store)}"
            )
    write_json(folder / NULL_RECORD, asdict(write_shard(folder, NULL, (), stored)))


# ---- numbers that are not finite ----


def faults(computed: Tensor, stored: Tensor) -> Tensor:
    """Causes (n,) of rows that are not finite: 0 for none, _COMPUTED or _STORED."""
    if not stored.is_floating_point():
        return torch.zeros(len(stored), dtype=torch.int64)
    bad, bad_stored = (~x.isfinite().flatten(1).all(1) for x in (computed, stored))
    return torch.where(bad, _COMPUTED, _STORED * bad_stored.long())


def reason_of_fault(whose: str, fault: int, dtype: torch.dtype, store: torch.dtype) -> str:
    """The reason why a row was skipped, and what helps in a new folder."""
    compute_word, store_word = (
        next(word for word, name in DTYPES.items() if getattr(torch, name) == x)
        for x in (dtype, store)
    )
    if fault == _STORED:
        return (
            f"the {whose}'s numbers are beyond {store_word}, which they are stored in; give "
            f"--store-dtype {'bf16 or fp32' if store_word == 'fp16' else 'fp32'} and a new folder"
        )
    reason = f"the {whose} computes numbers that are not finite in {compute_word}; "
    if compute_word == "fp32":
        return f"{reason}look at its weights"
    helps = "bf16 or fp32" if compute_word == "fp16" else "fp32"
    return f"{reason}give --dtype {helps} and a new folder"
