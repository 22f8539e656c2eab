"""Which process of how many this is."""

import os
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """One of several that share the work and never talk to each other."""

    rank: int = 0  # its number, from 0
    world: int = 1  # how many there are
    local_rank: int = 0  # its number on this machine
    local_world: int = 1  # how many there are on this machine


def this_process() -> Process:
    """As torchrun's variables say, or Slurm's within a step that srun started."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    # SLURM_NTASKS alone is set in a batch script too, which runs once.
    by_slurm = "WORLD_SIZE" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ
    if by_slurm:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    rank, world = (_number(name, default) for name, default in zip(names[:2], (0, 1), strict=True))
    if not 0 <= rank < world:
        raise ValueError(f"{names[0]}={rank} of {names[1]}={world} processes; count them from 0")
    here = _tasks_on_this_node(world) if by_slurm else _number("LOCAL_WORLD_SIZE", world)
    return Process(rank, world, _number(names[2], rank), max(1, here))


def _tasks_on_this_node(world: int) -> int:
    """How many processes of a Slurm step run here, of "4(x2),3": four on two nodes, then three."""
    name = next(
        (n for n in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if os.environ.get(n)),
        "SLURM_NTASKS_PER_NODE",
    )
    text = os.environ.get(name) or str(world)
    matches = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    counts = [int(m[1]) for m in matches if m for _ in range(int(m[2] or 1))]
    if not all(matches):
        raise ValueError(f"the variable {name} is {text!r}; it must be as Slurm's, such as 4(x2),3")
    node = _number("SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else max(counts)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise ValueError(f"the variable {name} is {text!r}; it must be a whole number") from None
