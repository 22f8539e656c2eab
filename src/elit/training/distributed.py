"""One process or several under `torchrun`, and what they say to each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from elit._devices import pick_device

# A process that waits longer for another one gives up: something hangs. Writing a checkpoint may
# take longer, on a slow disk.
PATIENCE, WRITING_PATIENCE = timedelta(minutes=10), timedelta(hours=1)


class ProcessLostError(RuntimeError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process raised it."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value = value / self.size
        return value

    def gather(self, value: int) -> list[int]:
        """The value of every process, by rank."""
        if self.size == 1:
            return [value]
        mine = torch.tensor([value], device=self.device)
        values = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(values, mine)
        return [int(v) for v in values]

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of all processes, (processes * n, ...) by rank; n is one for all."""
        if self.size == 1:
            return rows
        mine = rows.to(self.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return torch.cat(parts).to(rows.device)

    def barrier(self, group: dist.ProcessGroup | None = None) -> None:
        """Wait for all processes, for as long as a group's patience lasts."""
        if self.size > 1:
            dist.barrier(group)

    def new_cpu_group(self) -> dist.ProcessGroup | None:
        """A group of all processes for tensors on the CPU, with an order of messages of its own."""
        return dist.new_group(backend="gloo", timeout=WRITING_PATIENCE) if self.size > 1 else None


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute on `count` CPU threads; None leaves their number as it is."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def matrix_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Let products of fp32 matrices round to TF32 on a GPU, or not; elsewhere leave them alone."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def distributed_world(device: str) -> Iterator[World]:
    """Join the other processes that `torchrun` started, if it did, and leave them at the end."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    picked = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if size == 1:
        yield World(0, 1, picked)
        return
    if picked.type not in ("cpu", "cuda") or device.startswith("cuda:"):
        raise ValueError(
            f"{size} processes cannot share the device {device!r}; "
            f"use cuda, where each process takes a GPU of its own, or cpu"
        )
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    dist.init_process_group("nccl" if picked.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(rank, size, picked)
    except RuntimeError as error:
        if not is_of_connection(error):
            raise
        raise ProcessLostError(
            f"process {rank} of {size} lost another one, which was killed, failed (it says why) or "
            f"hangs; all stop, and the same command goes on at the last checkpoint "
            f"({' '.join(str(error).split())[:160]})"
        ) from error
    finally:
        dist.destroy_process_group()


def is_of_connection(error: RuntimeError) -> bool:
    """Whether an error is of messages between processes; gloo's are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
