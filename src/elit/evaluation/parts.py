"""Work that any number of processes share without talking: part by part, each in a file.

A part's content depends on its number alone, never on which process made it: the whole is the
same on one process or eight, and a killed run goes on with what is missing.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from elit._files import remove_leftovers, save_tensors
from elit._process import Process

PATIENCE = 600.0  # seconds without a new part, or five times what one takes: then it is given up
_GLANCE = 0.5  # seconds between two looks for the parts of others


class Parts:
    """Tensors of samples 0..count-1, in files of `size` samples each, the last perhaps of fewer."""

    def __init__(self, folder: Path, count: int, size: int):
        self.folder, self.count, self.size = folder, count, size
        self._longest = 0.0  # seconds that a part took here

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def path(self, number: int) -> Path:
        """File of a part."""
        return self.folder / f"part-{number:05d}.safetensors"

    def samples(self, number: int) -> range:
        """Samples of a part."""
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there."""
        return [number for number in range(len(self)) if not self.path(number).exists()]

    def todo(self) -> int:
        """Samples of the parts that are not there."""
        return sum(len(self.samples(number)) for number in self.missing())

    def make(
        self,
        make: Callable[[range], dict[str, Tensor]],
        process: Process,
        bar: tqdm,
        offset: int = 0,
        origin: str = "",
        done: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make this process's share of what is missing, until `done`.

        An `offset` shifts the shares, so that many short runs keep all processes busy. The
        parts tell their `origin`.
        """
        remove_leftovers(self.folder)
        for number in self.missing():
            if done():
                return
            if (number + offset) % process.world != process.rank or self.path(number).exists():
                continue
            started = time.monotonic()
            save_tensors(self.path(number), make(self.samples(number)), {"origin": origin})
            self._longest = max(self._longest, time.monotonic() - started)
            bar.update(len(self.samples(number)))

    def wait(self, bar: tqdm, done: Callable[[], bool] = lambda: False) -> None:
        """Wait for the parts of other processes, or until `done`."""
        known, since = self.todo(), time.monotonic()
        patience = max(PATIENCE, 5 * self._longest)
        while (missing := self.missing()) and not done():
            if (todo := self.todo()) < known:
                bar.update(known - todo)
                known, since = todo, time.monotonic()
            elif time.monotonic() - since > patience:
                raise ValueError(
                    f"no part came into {self.folder} for {patience / 60:.0f} minutes, but "
                    f"{len(missing)} are missing: another process was killed or hangs; the same "
                    f"command goes on where it was"
                )
            time.sleep(_GLANCE)
        bar.update(known)

    @contextmanager
    def _open(self, number: int) -> Iterator[Any]:
        path = self.path(number)
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); remove it, and the same command makes it anew"
            ) from error

    def read(self, name: str) -> Iterator[Tensor]:
        """One tensor of each part, in order."""
        for number in range(len(self)):
            with self._open(number) as file:
                tensor = file.get_tensor(name)
            yield tensor

    def whole(self, name: str) -> Tensor:
        """One tensor of all samples, (count, ...)."""
        return torch.cat(list(self.read(name)))

    def origins(self) -> list[str]:
        """Origins of the parts, each once."""
        origins = set()
        for number in range(len(self)):
            with self._open(number) as file:
                origins.add((file.metadata() or {}).get("origin", ""))
        return sorted(origins)

    def remove(self) -> None:
        """Remove all parts, and what killed processes left of them."""
        remove_leftovers(self.folder)
        for path in self.folder.glob("part-*.safetensors"):
            path.unlink(missing_ok=True)


def part_size(count: int, batch_size: int, most: int = 512) -> int:
    """Samples of a part: whole batches, at most about `most`, and several parts of a small set."""
    batches = max(1, min(most // batch_size, count // (8 * batch_size)))
    return batches * batch_size


def batches(samples: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    """Consecutive batches of some samples."""
    for first in range(0, len(samples), batch_size):
        yield samples[first : first + batch_size]
