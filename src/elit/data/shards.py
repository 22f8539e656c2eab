"""Reading a prepared folder: which shards are whole, and the tensors that they hold, mapped."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from elit.data.manifest import CAPTION_ENDS, CAPTIONS, LABELS, Headers, Shard

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


class ShardReader:
    """Tensors of shards, mapped when they are first asked for, in each process for itself."""

    def __init__(self, folder: Path, shards: Sequence[Shard], num_classes: int):
        self.folder, self.shards, self.num_classes = folder, shards, num_classes
        self._open: OrderedDict[int, Tensors] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}  # no mapping goes to another process

    def __getitem__(self, number: int) -> Tensors:
        """Tensors of a shard, by name."""
        tensors = self._open.get(number)
        if tensors is None:
            tensors = self._load(number)
            self._open[number] = tensors
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return tensors

    def _load(self, number: int) -> Tensors:
        shard = self.shards[number]
        path = self.folder / shard.file
        try:
            tensors = load_file(path)  # mapped, not read
        except (SafetensorError, OSError) as error:
            raise damage_error(path, str(error)) from error
        labels, ends = tensors.get(LABELS), tensors.get(CAPTION_ENDS)
        if self.num_classes and labels is not None and len(labels):
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                reason = f"labels {low} to {high} are not all of {self.num_classes} classes"
                raise damage_error(path, reason)
        if ends is not None and len(ends):
            steps = ends.diff(prepend=ends.new_zeros(1))
            if steps.min() < 0 or ends[-1] != len(tensors[CAPTIONS]):
                raise damage_error(path, f"{CAPTION_ENDS} don't fit its captions")
        return tensors

    def labels(self, number: int) -> Tensor:
        """Class labels (n,) of a shard; zeros where it has none."""
        labels = self[number].get(LABELS)
        return (
            torch.zeros(self.shards[number].count, dtype=torch.long) if labels is None else labels
        )

    def caption(self, number: int, row: int) -> str:
        """Text of a row of a shard."""
        tensors = self[number]
        try:
            ends = tensors[CAPTION_ENDS]
            start = int(ends[row - 1]) if row else 0
            return bytes(tensors[CAPTIONS][start : int(ends[row])].numpy()).decode()
        except (KeyError, UnicodeDecodeError) as error:
            path = self.folder / self.shards[number].file
            raise damage_error(path, f"its captions can't be read ({error})") from error
