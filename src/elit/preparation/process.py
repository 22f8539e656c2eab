"""Which process of how many this is, its device, and how it ends when told to."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch


@dataclass(frozen=True)
class Process:
    """One of several that share the work and never talk to each other.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local_rank: its number on this machine.
        local_world: how many there are on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def this_process() -> Process:
    """As torchrun's variables say, or Slurm's within a step that srun started."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    # SLURM_NTASKS alone is set in a batch script too, which runs once.
    if "WORLD_SIZE" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    rank, world = (_number(name, default) for name, default in zip(names[:2], (0, 1), strict=True))
    local, local_world = _number(names[2], rank), _number(names[3], world)
    if not 0 <= rank < world:
        raise ValueError(f"{names[0]}={rank} of {names[1]}={world} processes; count them from 0")
    return Process(rank, world, local, max(1, local_world))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise ValueError(f"the variable {name} is {text!r}; it must be a whole number") from None


def pick_device(name: str, process: Process) -> torch.device:
    """Device of that name; of several GPUs each process of a machine has its own."""
    if name == "auto":
        accelerators = {"cuda": torch.cuda, "mps": torch.backends.mps}
        name = next((n for n, module in accelerators.items() if module.is_available()), "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            count = max(1, torch.cuda.device_count())  # 1 where each process is shown its own
            device = torch.device("cuda", process.local_rank % count)
        torch.zeros(1, device=device).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} is not usable ({reason}); use auto or cpu") from error
    return device


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """SIGTERM, which Slurm and torchrun send, ends the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> NoReturn:
        del number, frame
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
