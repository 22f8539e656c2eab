"""One part of the source, from pictures to shards on the disk and the record that says so."""

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

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
from elit.preparation.reading import Chunk, Size
from elit.preparation.texts import TextEncoder


@dataclass(frozen=True)
class Record:
    """What a finished part holds.

    Attributes:
        start: its first row of the source.
        stop: the row after its last.
        shards: its files.
        skipped: row and reason of what could not be read.
        sums: sum, sum of squares and count of its latents, scaled as training draws them.
    """

    start: int
    stop: int
    shards: tuple[Shard, ...]
    skipped: tuple[tuple[int, str], ...]
    sums: tuple[float, float, int]


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
        record = Record(content["start"], content["stop"], shards, skipped, (total, squares, count))
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
    finite: list[Tensor] = field(default_factory=list)
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
    ):
        self.split, self.number, self.span = split, number, rows
        self.encoder, self.texts = encoder, texts
        self.batch_size, self.flips = batch_size, flips
        self.rows: list[int] = []
        self.labels: list[int | None] = []
        self.captions: list[str | None] = []
        self.skipped: list[tuple[int, str]] = []
        self._sizes: dict[Size, _Samples] = {}
        self._sums = [0.0, 0.0, 0]

    def add(self, chunk: Chunk) -> None:
        """Take the next rows."""
        offset = len(self.rows)
        self.rows += chunk.rows
        self.labels += chunk.labels
        self.captions += chunk.captions
        self.skipped += chunk.skipped
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
        finite = torch.ones(len(pictures), dtype=torch.bool)
        for wanted, out in ((True, samples.encoded), (self.flips, samples.flipped)):
            if wanted:
                encoded = self.encoder(pictures)
                stored = self.encoder.stored(encoded)
                if stored.is_floating_point():
                    finite &= stored.isfinite().flatten(1).all(1)
                for i, value in enumerate(self.encoder.sums(encoded[finite])):
                    self._sums[i] += value
                out.append(stored)
                pictures = pictures.flip(-2)
        samples.finite.append(finite)

    def finish(self) -> dict[Size, dict[str, Tensor]]:
        """Encode what is left and the texts; what to write, by size."""
        for samples in self._sizes.values():
            while samples.waiting:
                self._encode(samples)
        encoding = self._encode_texts()
        good = self._good(encoding)
        return {
            size: self._tensors(samples, encoding, good)
            for size, samples in sorted(self._sizes.items())
            if any(good[at] for at in samples.at)
        }

    def _encode_texts(self) -> dict[str, Tensor]:
        """Encodings (rows, ...) of all texts, by name."""
        if self.texts is None or not self.rows:
            return {}
        captions = [caption or "" for caption in self.captions]
        batches = [
            self.texts(captions[start : start + self.batch_size])
            for start in range(0, len(captions), self.batch_size)
        ]
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def _good(self, encoding: dict[str, Tensor]) -> list[bool]:
        """Whether all of a row is finite; the others are skipped."""
        good = [True] * len(self.rows)
        dtype = str(self.encoder.store).removeprefix("torch.")
        for samples in self._sizes.values():
            for at, finite in zip(samples.at, torch.cat(samples.finite).tolist(), strict=True):
                good[at] &= finite
        reasons = dict.fromkeys(
            (at for at, fine in enumerate(good) if not fine),
            f"the autoencoder's numbers are not finite in {dtype}",
        )
        for x in encoding.values():
            if x.is_floating_point():
                for at in (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
                    good[at] = False
                    reasons.setdefault(at, f"the text encoder's numbers are not finite in {dtype}")
        self.skipped += [(self.rows[at], reason) for at, reason in reasons.items()]
        self.skipped.sort()
        return good

    def _tensors(
        self, samples: _Samples, encoding: dict[str, Tensor], good: list[bool]
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
        return tensors | {name: x[at] for name, x in encoding.items()}

    def write(self, folder: Path, tensors: dict[Size, dict[str, Tensor]]) -> Record:
        """Write the shards, then the record."""
        shards = []
        for size, content in tensors.items():
            name = f"{stem(self.split, self.number)}-{size_name(size)}.safetensors"
            length, sha256 = write_tensors(folder / name, content)
            shards.append(Shard(name, size, len(content[ROWS]), length, sha256))
        total, squares, count = self._sums
        record = Record(
            self.span.start, self.span.stop, tuple(shards), tuple(self.skipped),
            (float(total), float(squares), int(count)),
        )  # fmt: skip
        write_synced(folder / f"{stem(self.split, self.number)}.json", asdict(record))
        return record


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file that is whole or not there; its length and checksum."""
    aside = _aside(path)
    try:
        try:
            save_file({name: x.contiguous() for name, x in tensors.items()}, aside)
        except SafetensorError as error:
            raise _as_os_error(error, path) from error
        with aside.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            length = os.fstat(file.fileno()).st_size
            os.fsync(file.fileno())
        _settle(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)  # makes room on a full disk
        raise
    return length, sha256


def write_synced(path: Path, value: Any) -> None:
    """Write plain types as JSON, so that they are on the disk when this returns."""
    aside = _aside(path)
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        _settle(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.part{path.suffix}")


def _settle(aside: Path, path: Path) -> None:
    """Give a file its name, on the disk too."""
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _as_os_error(error: SafetensorError, path: Path) -> Exception:
    """A full disk as Python has it; safetensors tells it in words alone."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if f"os error {number}" in str(error):
            return OSError(number, os.strerror(number), str(path))
    return OSError(f"{path} cannot be written: {error}")


def sha256_of(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parts_of(split: str, rows: int, part_size: int) -> Sequence[tuple[str, int, range]]:
    """Split, number and rows of each part of a split."""
    return [
        (split, number, range(start, min(rows, start + part_size)))
        for number, start in enumerate(range(0, rows, part_size))
    ]
