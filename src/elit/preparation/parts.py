"""One part of the source, from pictures to shards on the disk and the record that says so."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from elit._files import as_os_error, sha256_of, write_file, write_json
from elit.data.manifest import (
    CAPTION_ENDS,
    CAPTIONS,
    FLIPPED,
    LABELS,
    ROWS,
    Shard,
    size_name,
)
from elit.preparation.autoencoder import Encoder
from elit.preparation.finite import faults, reason_of_fault
from elit.preparation.reading import Chunk, Size
from elit.preparation.texts import TextEncoder

logger = logging.getLogger(__name__)

_MANY, _SHARE = 8, 0.05  # rows of a part that are skipped: from here on it is told at once


@dataclass(frozen=True)
class Record:
    """What a finished part holds."""

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


def read_record(folder: Path, split: str, number: int, rows: range) -> Record | None:
    """The record of a part, None if it is not done or what it wrote is not there in full."""
    try:
        content = json.loads((folder / f"{stem(split, number)}.json").read_text(encoding="utf-8"))
        shards = tuple(Shard(**{**s, "size": tuple(s["size"])}) for s in content["shards"])
        skipped = tuple((int(row), str(reason)) for row, reason in content["skipped"])
        total, squares, count = content["sums"]
        record = Record(
            content["start"], content["stop"], shards, skipped, (total, squares, count),
            dict(content.get("cut", {})), tuple(content.get("content", ())), content.get("seen"),
        )  # fmt: skip
        sizes = [(folder / shard.file).stat().st_size for shard in shards]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = sizes == [shard.bytes for shard in shards]
    return record if whole and (record.start, record.stop) == (rows.start, rows.stop) else None


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
        for wanted, out in ((True, samples.encoded), (self.flips, samples.flipped)):
            if wanted:
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
        """Whether all of a row is finite; the others are skipped.

        Raises:
            ValueError: if no row of many is.
        """
        found = {"text encoder": of_texts, "autoencoder": torch.zeros_like(of_texts)}
        for samples in self._sizes.values():
            fault = torch.cat(samples.faults)
            found["autoencoder"][samples.at] = found["autoencoder"][samples.at].maximum(fault)
        dtypes = self.encoder.dtype, self.encoder.store
        reasons = {
            at: reason_of_fault(whose, int(fault[at]), *dtypes)
            for whose, fault in found.items()
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
        """What a shard holds."""
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
    about = []

    def write(aside: Path) -> None:
        try:
            save_file({name: x.contiguous() for name, x in tensors.items()}, aside)
        except SafetensorError as error:
            raise as_os_error(error, folder / name) from error
        about.append((aside.stat().st_size, sha256_of(aside)))

    write_file(folder / name, write)
    count = next(len(x) for name, x in tensors.items() if name != CAPTIONS)
    return Shard(name, size, count, *about[0])


def parts_of(split: str, rows: int, part_size: int) -> Sequence[tuple[str, int, range]]:
    """Split, number and rows of each part of a split."""
    return [
        (split, number, range(start, min(rows, start + part_size)))
        for number, start in enumerate(range(0, rows, part_size))
    ]
