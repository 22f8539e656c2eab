"""The one way to float64 on the sampling path: never on a device that has none."""

from typing import Any

import torch


def wide(device: torch.device) -> dict[str, Any]:
    """`device` and `dtype` of exact tensors: float64 there, or on the CPU where MPS has none."""
    place = torch.device("cpu") if device.type == "mps" else device
    return {"device": place, "dtype": torch.float64}
