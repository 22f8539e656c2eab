"""Shards of a prepared folder: which are whole, where each sample stands, and what is there."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from elit.data.manifest import CAPTION_ENDS, CAPTIONS, LABELS, Headers, Shard
from elit.data.order import Array

_MOST_OPEN = 512  # mapped at a time by one process
MEND = "run its `elit prepare SOURCE OUT` again with --verify, which makes it anew"
Tensors = dict[str, Tensor]


def what_is_wrong(
    folder: Path,
    shard: Shard,
    checksum: Callable[[Path], str] | None = None,
    misfit: Callable[[Shard, Headers], str | None] | None = None,
) -> str | None:
    """The reason why a shard can't be read, or None.

    A `checksum` reads the file whole and is compared; `misfit` says what of the types and shapes of
    its tensors is wrong, or None.
    """
    path = folder / shard.file
    try:
        about = path.stat()
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it can't be read ({error.strerror})"
    if about.st_size != shard.bytes:
        return f"it has {about.st_size} bytes instead of {shard.bytes}"
    try:
        with safe_open(path, framework="pt") as file:  # which compares its length with its header
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {n: (t.get_dtype(), tuple(t.get_shape())) for n, t in parts.items()}
    except (SafetensorError, OSError) as error:
        return f"its header is broken ({error})"
    if misfit is not None and (reason := misfit(shard, tensors)):
        return reason
    if checksum is not None and checksum(path) != shard.sha256:
        return "its checksum is wrong"
    return None


def damage_error(path: Path, reason: str) -> ValueError:
    """The error for a shard that can't be read."""
    return ValueError(
        f"{path} is damaged: {reason}; {MEND}, or go on without it: data.options.damaged=skip"
    )


class Shards:
    """Samples of one split: where each stands, and its shard, mapped by each process for itself.

    Where every k-th is held out, sample u of the others, counted over the whole split, stands at
    u + u // (k - 1).
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        whole: Sequence[bool],  # whether each can be read
        hold_out: int | None,  # k
        is_held: bool,  # whether these are the held-out samples, or all others
        num_classes: int,
    ):
        self.folder, self.num_classes, self.is_held = folder, num_classes, is_held
        self.hold_out = hold_out or 2**62  # beyond any split: none
        counts = np.array([shard.count for shard in shards], dtype=np.int64)
        first = counts.cumsum() - counts  # damaged ones count: what is held out stays the same
        phase = first % self.hold_out
        held = (phase + counts) // self.hold_out
        counts = (held if is_held else counts - held) * np.array(whole, dtype=np.int64)
        some = np.flatnonzero(counts)
        self.files = [shards[n] for n in some.tolist()]
        self.counts, self.phase = counts[some], phase[some]
        self.ends = self.counts.cumsum()
        self._open: OrderedDict[int, Tensors] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}  # no mapping goes to another process

    def __len__(self) -> int:
        return int(self.counts.sum())

    def locate(self, index: Array) -> tuple[Array, Array]:
        """Shard and row of each sample."""
        numbers = np.searchsorted(self.ends, index, side="right")
        place = index - (self.ends - self.counts)[numbers]
        return numbers, self._rows(place, self.phase[numbers])

    def rows_of(self, number: int) -> Array:
        """Rows of a shard that are of this split."""
        return self._rows(np.arange(self.counts[number]), self.phase[number])

    def _rows(self, place: Array, phase: Array) -> Array:
        if self.is_held:
            return place * self.hold_out + self.hold_out - 1 - phase
        nth = phase + place
        return nth + nth // (self.hold_out - 1) - phase

    def __getitem__(self, number: int) -> Tensors:
        """Tensors of a shard, by name."""
        if number not in self._open:
            self._open[number] = self._load(self.files[number])
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _load(self, shard: Shard) -> Tensors:
        path = self.folder / shard.file
        try:
            tensors = load_file(path)  # mapped, not read
        except (SafetensorError, OSError) as error:
            raise damage_error(path, str(error)) from error
        labels, ends = tensors.get(LABELS), tensors.get(CAPTION_ENDS)
        if self.num_classes and labels is not None:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                reason = f"labels {low} to {high} are not all of {self.num_classes} classes"
                raise damage_error(path, reason)
        if ends is not None:
            steps = ends.diff(prepend=ends.new_zeros(1))
            if steps.min() < 0 or ends[-1] != len(tensors[CAPTIONS]):
                raise damage_error(path, f"{CAPTION_ENDS} don't fit its captions")
        return tensors

    def labels(self) -> Tensor:
        """Class labels (n,) of all samples; zeros where there are none."""
        parts = []
        for number, shard in enumerate(self.files):
            labels = self[number].get(LABELS, torch.zeros(shard.count, dtype=torch.long))
            parts.append(labels[torch.from_numpy(self.rows_of(number))])
        return torch.cat(parts)

    def caption(self, number: int, row: int) -> str:
        """Text of a row of a shard."""
        ends, captions = self[number][CAPTION_ENDS], self[number][CAPTIONS]
        start = int(ends[row - 1]) if row else 0
        try:
            return bytes(captions[start : int(ends[row])].numpy()).decode()
        except UnicodeDecodeError as error:
            path = self.folder / self.files[number].file
            raise damage_error(path, f"its captions can't be read ({error})") from error
