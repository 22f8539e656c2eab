"""What accelerators can do at most: the denominator of model FLOPs utilisation (MFU)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """An accelerator by its makers' figures.

    Attributes:
        tflops: dense bf16 with float32 accumulation, without sparsity, in TFLOP/s.
        memory: in 10^9 bytes.
        words: what its name as PyTorch gives it holds, in lower case.
    """

    tflops: float
    memory: float
    words: tuple[str, ...]


# In this order a name is compared: the more special first.
ACCELERATORS = {
    "h100-pcie": Accelerator(756, 80, ("h100 pcie",)),
    "h100": Accelerator(989, 80, ("h100",)),
    "h200": Accelerator(989, 141, ("h200", "gh200")),
    "b200": Accelerator(2250, 192, ("b200",)),
    "a100-40gb": Accelerator(312, 40, ("a100-sxm4-40gb", "a100-pcie-40gb")),
    "a100": Accelerator(312, 80, ("a100",)),
    "l40s": Accelerator(362, 48, ("l40s",)),
    "rtx4090": Accelerator(165, 24, ("rtx 4090",)),
    "mi300x": Accelerator(1307, 192, ("mi300x",)),
}


def accelerator(name: str) -> Accelerator | None:
    """An accelerator by its short name, or by its name as `torch.cuda.get_device_name` has it."""
    wanted = " ".join(name.lower().split())
    if wanted in ACCELERATORS:
        return ACCELERATORS[wanted]
    found = (a for a in ACCELERATORS.values() if any(word in wanted for word in a.words))
    return next(found, None)


def known_accelerator(name: str) -> Accelerator:
    """An accelerator by its short name, or a ValueError."""
    chip = accelerator(name)
    if chip is None:
        raise ValueError(f"gpu {name!r} is unknown; give one of {', '.join(ACCELERATORS)}")
    return chip


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of an accelerator, or None where it is not in the table.

    Args:
        device_name: such as "h100" or "NVIDIA H100 80GB HBM3".
    """
    found = accelerator(device_name)
    return None if found is None else found.tflops * 1e12
