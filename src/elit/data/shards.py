"""Reading a prepared folder: which shards are whole, and the tensors that they hold, mapped."""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from elit.data.manifest import CAPTION_ENDS, CAPTIONS, LABELS, RESERVED, Shard

_MOST_OPEN = 512  # mapped at a time by one process
MEND = "run its `elit prepare SOURCE OUT` again with --verify, which makes it anew"
Tensors = dict[str, Tensor]


def what_is_wrong(
    folder: Path, shard: Shard, checksum: Callable[[Path], str] | None = None
) -> str | None:
    """Why a shard can't be read, or None.

    Args:
        folder: that it is in.
        shard: as the manifest or a record has it.
        checksum: makes the SHA-256 of a file, which is read whole for it; None doesn't compare it.
    """
    path = folder / shard.file
    try:
        found = path.stat()
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it can't be read ({error.strerror})"
    if found.st_size != shard.bytes:
        return f"it has {found.st_size} bytes instead of {shard.bytes}"
    try:
        with safe_open(path, framework="pt"):
            pass  # reads the header and compares the file's length with it
    except (SafetensorError, OSError) as error:
        return f"its header is broken ({error})"
    if checksum is not None and checksum(path) != shard.sha256:
        return "its checksum is wrong"
    return None


def damage_error(path: Path, reason: str) -> ValueError:
    """The error for a shard that can't be read."""
    return ValueError(
        f"{path} is damaged: {reason}; {MEND}, or go on without it: data.options.damaged=skip"
    )


class ShardReader:
    """Tensors of shards, mapped when they are first asked for, in each process for itself.

    Args:
        folder: that they are in.
        shards: all of them.
        kind: of tensor that a shard must hold.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], kind: str):
        self.folder, self.shards, self.kind = folder, shards, kind
        self._open: OrderedDict[int, Tensors] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}  # no mapping goes to another process

    def __getitem__(self, number: int) -> Tensors:
        """All tensors of a shard, by name."""
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
        if self.kind not in tensors:
            raise damage_error(path, f"it has no {self.kind}, but {', '.join(sorted(tensors))}")
        for name, tensor in tensors.items():
            if name != CAPTIONS and (not tensor.ndim or len(tensor) != shard.count):
                shape = tuple(tensor.shape)
                raise damage_error(path, f"{name} is {shape}, not of {shard.count} samples")
        return tensors

    def labels(self, number: int) -> Tensor:
        """Class labels (n,) of a shard; zeros where it has none."""
        found = self[number].get(LABELS)
        return torch.zeros(self.shards[number].count, dtype=torch.long) if found is None else found

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


def encodings_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Encoded texts of a shard: the shape of one sample's, by name."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: tuple(entry["shape"][1:])
        for name, entry in header.items()
        if name not in (*RESERVED, "__metadata__")
    }
