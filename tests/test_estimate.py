"""Estimates of a run: what accelerators can do, FLOPs, memory."""

import pytest

from elit.evaluation.devices import accelerator, peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("h100", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_peaks_are_found_by_short_names_and_by_those_of_pytorch(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flops("cpu") is peak_flops("Quadro K600") is None


def test_an_a100_comes_with_two_memories() -> None:
    assert accelerator("NVIDIA A100-SXM4-40GB").memory == 40
    assert accelerator("NVIDIA A100-SXM4-80GB").memory == accelerator("a100").memory == 80
