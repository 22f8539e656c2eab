"""Devices by their names, and the one way to float64 on the sampling path."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def usable_cores() -> int:
    """Processors that this process may use: of a container or a job, fewer than there are."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return count or 1


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of an accelerator."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def pick_device(name: str, local_rank: int = 0, *, share: bool = False) -> torch.device:
    """Device of that name; "auto" is the accelerator if there is one.

    Args:
        name: such as "cuda", of which each process of a machine takes its own, or "cuda:1".
        local_rank: number of this process on its machine.
        share: whether processes may share a GPU where there are fewer, or each is shown one alone.
    """
    import torch

    if name == "auto":
        accelerators = {"cuda": torch.cuda, "mps": torch.backends.mps}
        name = next((n for n, module in accelerators.items() if module.is_available()), "cpu")
    if name == "cuda" and share:
        local_rank %= max(1, torch.cuda.device_count())
    try:
        device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} is not usable ({reason}); use auto or cpu") from error
    return device


def wide(device: torch.device) -> dict[str, Any]:
    """`device` and `dtype` of exact tensors: float64 there, or on the CPU where MPS has none."""
    import torch

    place = torch.device("cpu") if device.type == "mps" else device
    return {"device": place, "dtype": torch.float64}
