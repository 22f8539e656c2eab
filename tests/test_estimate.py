"""Estimates of a run: what accelerators can do, FLOPs, memory."""

import json

import pytest
import torch

from elit import create_model
from elit.cli.main import main
from elit.cost.devices import accelerator, peak_flops
from elit.cost.flops import cost_of, forward_flops, mean_flops, on_meta
from elit.cost.memory import SavedBytes, count_saved, saved_bytes
from elit.interface.budget import TailDropping
from elit.models.dit import DiT
from elit.models.presets import preset_config, preset_model
from elit.training.config import TrainConfig
from elit.training.config_files import load_config
from elit.training.estimate import estimate


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
    assert peak_flops("cpu") is peak_flops("Quadro K600") is None
    assert accelerator("NVIDIA A100-SXM4-40GB").memory == 40
    assert accelerator("NVIDIA A100-SXM4-80GB").memory == accelerator("a100").memory == 80


# ---- memory ----


def real_saved(name: str, batch: int, num_latents: int | None, precision: str) -> SavedBytes:
    """The same count of a real forward on the CPU."""
    model = create_model(name)
    sample = torch.randn(batch, model.in_channels, *model.sample_size)
    latents = {} if num_latents is None else {"num_latents": num_latents}

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            condition = model.example_condition(batch)
            return model(sample, torch.zeros(batch), **condition, **latents).sample

    return count_saved(model, model.blocks, forward)


KEPT = {
    "dit-tiny/2": None, "elit-dit-tiny/2": 5, "elit-uvit-tiny/2": 16, "elit-hdit-tiny/2": 3,
    "elit-mmdit-tiny/2": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kept", "precision"),
    [
        pytest.param(
            *given, precision,
            marks=pytest.mark.slow if precision == "bf16" and given[0] != "elit-dit-tiny/2" else [],
        )
        for given in KEPT.items()
        for precision in ("fp32", "bf16")
    ],
)  # fmt: skip
def test_what_is_counted_is_what_a_real_forward_keeps(name, kept, precision) -> None:
    given = preset_model(name), preset_config(name)
    counted = saved_bytes(*given, 3, kept, precision, device="cpu")
    assert counted == real_saved(name, 3, kept, precision)


def test_checkpointing_keeps_what_enters_a_block() -> None:
    """One block more keeps its input, (B, N, D) of float32, and no more."""
    found = [
        saved_bytes(DiT, preset_config("dit-tiny/2", overrides={"depth": depth}), 3, None, "fp32")
        for depth in (4, 5)
    ]
    assert found[1].checkpointed - found[0].checkpointed == 3 * 64 * 64 * 4
    assert found[1].whole - found[0].whole > 10 * 3 * 64 * 64 * 4
    assert found[0].checkpointed < found[0].whole


def test_autocast_on_cuda_keeps_norms_in_float32() -> None:
    given = DiT, preset_config("dit-tiny/2"), 3, None
    cpu, cuda = (saved_bytes(*given, "bf16", device) for device in ("cpu", "cuda"))
    # Two layer norms a block and the last: input and output of each in four bytes, not two.
    assert cuda.whole - cpu.whole >= 9 * 3 * 64 * 64 * 2
    assert saved_bytes(*given, "fp32", "cpu").whole > cpu.whole


def test_weights_gathered_in_16_bits_need_no_copies() -> None:
    given = DiT, preset_config("dit-tiny/2"), 3, None, "bf16"
    weights = sum(p.numel() for p in create_model("dit-tiny/2").parameters() if p.ndim == 2)
    saving = saved_bytes(*given).whole - saved_bytes(*given, half_weights=True).whole
    assert saving == pytest.approx(2 * weights, rel=0.1)


# ---- a run ----


def config(**changes: str) -> TrainConfig:
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    given = {
        "data.batch_size": "64",
        "train.steps": "1000",
        "model.overrides.depth": "3",
        "latents.min": "4",
        "latents.max": "4",
    }
    return load_config(None, given | keys)


def test_flops_and_hours() -> None:
    found = estimate(config(), gpus=2, gpu="a100", mfu=0.25)
    model = on_meta(DiT, preset_config("elit-dit-tiny/2", overrides={"depth": 3}))
    forward = forward_flops(model, 4)
    assert found["step_tflops"] == pytest.approx(64 * 3 * forward / 1e12)
    assert found["total_eflops"] == pytest.approx(1000 * 64 * 3 * forward / 1e18)
    assert found["hours"] == pytest.approx(1000 * 64 * 3 * forward / (2 * 312e12 * 0.25) / 3600)
    assert found["samples"] == 32


@pytest.mark.slow
def test_the_mean_is_over_what_training_draws() -> None:
    model = on_meta(DiT, preset_config("elit-dit-tiny/2"))
    dropping, cost = TailDropping(2, 9, 16), cost_of(model)
    costs = {n: cost.flops(n) for n in range(2, 10)}
    assert mean_flops(cost, dropping) == pytest.approx(sum(costs.values()) / 8)
    draw = torch.Generator().manual_seed(0)
    drawn = [n for _ in range(5000) for n in dropping.draw_strata(2, draw)]
    assert mean_flops(cost, dropping, draws=2) == pytest.approx(
        sum(costs[n] for n in drawn) / len(drawn), rel=3e-3
    )
    assert mean_flops(cost, None) == forward_flops(model)


@pytest.mark.slow
def test_state_is_shared_out() -> None:
    found = {
        kind: estimate(config(**changes), gpus=4)
        for kind, changes in {
            "ddp": {},
            "fsdp": {"train__parallel": "fsdp"},
            "hsdp": {"train__parallel": "hsdp", "train__shard_size": "2"},
        }.items()
    }
    whole = 20 * found["ddp"]["parameters"] / 1e9  # bytes
    states = {kind: one["state_gb"] / whole for kind, one in found.items()}
    assert states == pytest.approx({"ddp": 1, "fsdp": 1 / 4, "hsdp": 1 / 2})
    assert found["ddp"]["gathered_gb"] == 0 < found["fsdp"]["gathered_gb"]
    for one in found.values():
        assert one["memory_gb"] > one["memory_checkpointed_gb"] > one["state_gb"]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"gpu": "h10"}, r"gpu 'h10' is unknown; give one of h100-pcie, h100, "),
        ({}, {"gpus": 5}, r"data.batch_size=64 cannot be cut into 5 GPUs x 1 micro-batches"),
        ({"train__accumulation": "3"}, {"gpus": 2}, r"into 2 GPUs x 3 micro-batches"),
        ({}, {"mfu": 0.0}, r"mfu=0.0 is not allowed; give a share above 0"),
        ({"train__parallel": "hsdp", "train__shard_size": "3"}, {"gpus": 4}, "shard_size=3"),
        ({"model__overrides.hiden_size": "8"}, {}, r"'hiden_size' of model.overrides.*hidden_size"),
        (
            {"retrofit__base": "runs/x", "model__overrides": "{}"}, {},
            r"the size of retrofit.base=runs/x is not known here",
        ),
        (
            {"data__name": "prepared", "data__options.path": "no/folder",
             "data__options.resolution": "64"},
            {},
            r"data.options.resolution=64 is none that 'elit-dit-tiny/2' was made for \(16, 32\)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_estimated(changes, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(config(**changes), **{"gpus": 1} | options)


def test_plan_prints_what_is_counted(capsys) -> None:
    line = ["plan", "digits", "--gpus", "2", "--gpu", "l40s", "--mfu", "0.4"]
    line += ["--model.overrides.depth", "3", "--latents.min", "4", "--latents.max", "4"]
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory_gb"] == pytest.approx(found["state_gb"] + found["activations_gb"])
    assert main(line) == 0
    out = capsys.readouterr().out
    assert f"{found['step_tflops'] * 1e6:.4g} MFLOPs" in out
    assert "2 x l40s, 362 TFLOP/s each at MFU 0.4" in out
    assert "checkpointed" in out
