"""One part of the source, from pictures to shards on the disk and the record that says so."""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from elit._files import save_tensors, sha256_of, write_json
from elit.data.manifest import (
    CAPTION_ENDS,
    CAPTIONS,
    FEATURES,
    FLIPPED,
    LABELS,
    NULL,
    NULL_RECORD,
    ROWS,
    Shard,
    size_name,
)
from elit.preparation.autoencoder import Encoder
from elit.preparation.features import FeatureEncoder
from elit.preparation.reading import Chunk, Size
from elit.preparation.records import Piece, Record
from elit.preparation.settings import DTYPES, PrepareSettings
from elit.preparation.source import Row
from elit.preparation.texts import TextEncoder

logger = logging.getLogger(__name__)

_COMPUTED, _STORED = 1, 2  # what made numbers not finite
_WHOSE = ("autoencoder", "vision model")  # what looks at pictures
_MANY, _SHARE = 8, 0.05  # rows of a part that are skipped: from here on it is told at once


@dataclass
class _Samples:
    """The samples of one size."""

    waiting: list[Tensor] = field(default_factory=list)  # pictures that are not encoded yet
    encoded: dict[str, list[Tensor]] = field(default_factory=dict)  # by the name of the tensor
    faults: dict[str, list[Tensor]] = field(default_factory=dict)  # by whose they are
    at: list[int] = field(default_factory=list)  # positions in the part's rows


class Part:
    """Gathers the rows of a part: encodes their pictures as they come, and writes them at its end.

    Batches never reach over a part's end, so that its bytes are the same whoever makes it.
    """

    def __init__(
        self,
        piece: Piece,
        seen: str | None,
        encoder: Encoder,
        texts: TextEncoder | None,
        settings: PrepareSettings,
        features: FeatureEncoder | None = None,
    ):
        self.features = features
        self.piece, self.seen, self.encoder, self.texts = piece, seen, encoder, texts
        self.batch_size, self.flips = settings.batch_size, settings.flips
        self.rows: list[Row] = []
        self.skipped: dict[int, str] = {}
        self.digests: list[str] = []
        self.cut: dict[str, int] = {}
        self._sizes: dict[Size, _Samples] = {}
        self._sums = 0.0, 0.0, 0

    def add(self, chunk: Chunk) -> bool:
        """Take the next rows; whether they were the last."""
        offset = len(self.rows)
        self.rows += chunk.rows
        self.skipped |= chunk.skipped
        self.digests += chunk.digests
        for size, (positions, pictures) in chunk.pictures.items():
            samples = self._sizes.setdefault(size, _Samples())
            samples.at += [offset + position for position in positions]
            samples.waiting.append(pictures)
            while sum(map(len, samples.waiting)) >= self.batch_size:
                self._encode(samples)
        return len(self.digests) == len(self.piece.rows)

    def _encode(self, samples: _Samples) -> None:
        """Encode a batch of what is waiting."""
        waiting = torch.cat(samples.waiting)
        pictures, rest = waiting[: self.batch_size], waiting[self.batch_size :]
        samples.waiting = [rest] if len(rest) else []
        fault = {whose: torch.zeros(len(pictures), dtype=torch.int64) for whose in _WHOSE}

        def keep(whose: str, name: str, encoded: Tensor, stored: Tensor) -> None:
            fault[whose] = torch.where(fault[whose] == 0, faults(encoded, stored), fault[whose])
            samples.encoded.setdefault(name, []).append(stored)

        for end in ("", FLIPPED) if self.flips else ("",):
            encoded = self.encoder(pictures)
            keep("autoencoder", self.encoder.kind + end, encoded, self.encoder.stored(encoded))
            total, squares, count = self.encoder.sums(encoded[fault["autoencoder"] == 0])
            self._sums = self._sums[0] + total, self._sums[1] + squares, self._sums[2] + count
            if self.features is not None:
                maps = self.features(pictures)
                keep("vision model", FEATURES + end, maps, maps.to(self.features.store))
            pictures = pictures.flip(-2)
        for whose, of_batch in fault.items():
            samples.faults.setdefault(whose, []).append(of_batch)

    def finish(self) -> dict[Size, dict[str, Tensor]]:
        """Encode what is left and the texts; what to write, by size."""
        for samples in self._sizes.values():
            while samples.waiting:
                self._encode(samples)
        encoding, of_texts = self._encode_texts()
        good = self._good(of_texts)
        return {
            size: self._tensors(samples, encoding, good)
            for size, samples in sorted(self._sizes.items())
            if good[samples.at].any()
        }

    def _encode_texts(self) -> tuple[dict[str, Tensor], Tensor]:
        """Encodings (rows, ...) by name, and the fault (rows,) of each; each text goes in once."""
        if self.texts is None or not self.rows:
            return {}, torch.zeros(len(self.rows), dtype=torch.int64)
        number: dict[str, int] = {}
        which = torch.tensor([number.setdefault(r.caption or "", len(number)) for r in self.rows])
        texts, batches, fault = list(number), [], []
        cut: dict[str, list[bool]] = {}
        for start in range(0, len(texts), self.batch_size):
            computed = self.texts(texts[start : start + self.batch_size])
            batches.append(self.texts.stored(computed))
            each = [faults(x, batches[-1][name]) for name, x in computed.items()]
            fault.append(torch.stack(each).amax(0))
            for where, which_are in self.texts.cut().items():
                cut.setdefault(where, []).extend(which_are)
        self.cut = {where: int(torch.tensor(are)[which].sum()) for where, are in cut.items()}
        encoding = {name: torch.cat([batch[name] for batch in batches])[which] for name in computed}
        return encoding, torch.cat(fault)[which]

    def _good(self, of_texts: Tensor) -> Tensor:
        """Mark the rows that are finite, (rows,) bool; the others are skipped.

        Raises:
            ValueError: if no row of many is.
        """
        found = {"text encoder": of_texts} | {w: torch.zeros_like(of_texts) for w in _WHOSE}
        for samples in self._sizes.values():
            for whose, of_batches in samples.faults.items():
                of_row = found[whose]
                of_row[samples.at] = of_row[samples.at].maximum(torch.cat(of_batches))
        dtypes = self.encoder.dtype, self.encoder.store
        reasons = {
            at: reason_of_fault(whose, int(fault[at]), *dtypes)
            for whose, fault in found.items()
            for at in fault.nonzero().flatten().tolist()
        }
        name, count = self.piece.name, len(self.piece.rows)
        if len(reasons) == len(self.rows) >= _MANY:
            raise ValueError(f"no row of the part {name} can be stored: {reasons[0]}")
        unreadable = self.skipped
        self.skipped = {self.rows[at].number: reason for at, reason in reasons.items()} | unreadable
        if len(self.skipped) >= max(_MANY, _SHARE * count):
            logger.warning(
                "%s skips %d of its %d rows, such as row %d: %s",
                name, len(self.skipped), count, *min(self.skipped.items()),
            )  # fmt: skip
        return torch.stack(list(found.values())).amax(0) == 0

    def _tensors(
        self, samples: _Samples, encoding: dict[str, Tensor], good: Tensor
    ) -> dict[str, Tensor]:
        """Tensors of a shard."""
        keep = good[samples.at]
        at = torch.tensor(samples.at)[keep]
        rows = [self.rows[i] for i in at.tolist()]
        tensors = {name: torch.cat(parts)[keep] for name, parts in samples.encoded.items()}
        tensors[ROWS] = torch.tensor([row.number for row in rows])
        if rows[0].label is not None:
            tensors[LABELS] = torch.tensor([row.label for row in rows])
        if rows[0].caption is not None:
            texts = [(row.caption or "").encode() for row in rows]
            joined = bytearray(b"".join(texts) or b" ")  # no tensor is made of nothing
            tensors[CAPTIONS] = torch.frombuffer(joined, dtype=torch.uint8)
            tensors[CAPTION_ENDS] = torch.tensor(list(map(len, texts))).cumsum(0)
        return tensors | {name: x[at] for name, x in encoding.items()}

    def write(self, folder: Path, tensors: dict[Size, dict[str, Tensor]]) -> None:
        """Write the shards, then the record."""
        name, rows = self.piece.name, self.piece.rows
        shards = tuple(
            write_shard(folder, f"{name}-{size_name(size)}.safetensors", size, content)
            for size, content in tensors.items()
        )
        record = Record(
            rows.start, rows.stop, shards, tuple(sorted(self.skipped.items())), self._sums,
            self.cut, tuple(self.digests), self.seen,
        )  # fmt: skip
        write_json(folder / f"{name}.json", asdict(record))


def write_shard(folder: Path, name: str, size: Size, tensors: dict[str, Tensor]) -> Shard:
    """Write tensors (n, ...) into a file that is whole or not there."""
    path = folder / name
    save_tensors(path, tensors)
    count = next(len(x) for key, x in tensors.items() if key != CAPTIONS)
    return Shard(name, size, count, path.stat().st_size, sha256_of(path))


def make_null(folder: Path, texts: TextEncoder, dtype: torch.dtype) -> None:
    """Write the empty text, encoded, and then its record."""
    computed = texts([""])
    stored = texts.stored(computed)
    for name, x in computed.items():
        if fault := int(faults(x, stored[name])):
            raise ValueError(
                f"the empty text: {reason_of_fault('text encoder', fault, dtype, texts.store)}"
            )
    write_json(folder / NULL_RECORD, asdict(write_shard(folder, NULL, (), stored)))


def faults(computed: Tensor, stored: Tensor) -> Tensor:
    """Causes (n,) of rows that are not finite: 0 for none, _COMPUTED or _STORED."""
    if not stored.is_floating_point():
        return torch.zeros(len(stored), dtype=torch.int64)
    bad, bad_stored = (~x.isfinite().flatten(1).all(1) for x in (computed, stored))
    return torch.where(bad, _COMPUTED, _STORED * bad_stored.long())


def reason_of_fault(whose: str, fault: int, dtype: torch.dtype, store: torch.dtype) -> str:
    """The reason why a row was skipped, and what helps in a new folder."""
    words = {getattr(torch, name): word for word, name in DTYPES.items()}
    word = words[store if fault == _STORED else dtype]
    helps = "bf16 or fp32" if word == "fp16" else "fp32"
    if fault == _STORED:
        return (
            f"the {whose}'s numbers are beyond {word}, which they are stored in; give "
            f"--store-dtype {helps} and a new folder"
        )
    advice = "look at its weights" if word == "fp32" else f"give --dtype {helps} and a new folder"
    return f"the {whose} computes numbers that are not finite in {word}; {advice}"
