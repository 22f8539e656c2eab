"""Training: what the paper's runs will take, and time and memory of steps measured here.

python benchmarks/training.py --paper                     # the table of docs/training.md
python benchmarks/training.py                             # steps of a small model on this CPU
python benchmarks/training.py --device cuda               # XL/2 at 256 and 512 px: samples/s, MFU

A step is forward, backward, clipping, AdamW and the moving average, on random latents. Memory on a
CPU is the peak of a process of its own beyond what it held before the model was made.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from diffusers.training_utils import EMAModel

from elit import create_model
from elit.cost.devices import peak_flops
from elit.cost.flops import forward_flops, on_meta
from elit.cost.memory import saved_bytes
from elit.flow.objective import flow_matching_loss
from elit.models.presets import preset_config, preset_model
from elit.training.config_files import built_in_configs, load_config
from elit.training.estimate import estimate

MANY_GPUS = 64  # for Qwen-Image, which 8 do not hold
STATE_COPIES = 5  # weights, gradients, two moments, averages


@dataclass(frozen=True)
class Case:
    """A training step to measure: of what model, on what batch, how.

    Attributes:
        preset: the model.
        resolution: in pixels.
        batch: samples.
        kept: latents per group, of as many steps in turn; empty of a plain model.
    """

    preset: str
    resolution: int
    batch: int
    kept: tuple[int, ...] = ()
    precision: str = "fp32"
    checkpointing: bool = False
    compile: bool = False
    device: str = "cpu"
    steps: int = 5


# ---- the paper's runs ----


def paper_rows(names: list[str] | None = None) -> Iterator[list[str]]:
    """A row for each of the paper's runs."""
    known = built_in_configs()
    for name in names or [name for name in known if "/" in name]:
        gpus = MANY_GPUS if name.startswith("qwen") else 8
        found = estimate(load_config(name, {}), gpus)
        figures = re.search(r"FID (\d+\.\d), FDD (\d+\.\d), (?:IS|FVD) (\d+\.\d)", top_of(name))
        yield [
            f"`{name}`",
            f"{found['parameters'] / 1e6:.0f} M",
            f"{found['step_tflops']:.0f}",
            f"{found['total_eflops']:.0f}",
            f"{found['hours']:.1f}",
            f"{gpus} x {found['samples']}",
            f"{found['memory_gb']:.0f}",
            f"{found['memory_checkpointed_gb']:.0f}",
            " / ".join(figures.groups()) if figures else "",
        ]


def top_of(name: str) -> str:
    """The comment that a config begins with."""
    text = built_in_configs()[name].read_text().partition("\nbase:")[0]
    return text.replace("\n# ", " ")


PAPER_HEADER = (
    "config",
    "parameters",
    "TFLOPs a step",
    "EFLOPs",
    "hours",
    "GPUs x samples",
    "GB",
    "GB checkpointed",
    "FID / FDD / IS",
)


def markdown(header: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table, its first column to the left."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- steps ----


def make_step(case: Case) -> Callable[[int], None]:
    """A training step, called with its number."""
    torch.manual_seed(0)
    device = torch.device(case.device)
    model = create_model(case.preset, case.resolution).to(device)
    if case.checkpointing:
        model.enable_gradient_checkpointing()
    if case.compile:
        model.compile_repeated_blocks(fullgraph=True)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ema = EMAModel(parameters, decay=0.9999, foreach=True)
    data = torch.randn(case.batch, model.in_channels, *model.sample_size, device=device)
    condition = {k: v.to(device) for k, v in model.example_condition(case.batch).items()}
    half = case.precision != "fp32"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")

    def step(number: int) -> None:
        latents = {"num_latents": case.kept[number % len(case.kept)]} if case.kept else {}
        noise, sigma = torch.randn_like(data), torch.rand(case.batch, device=device)

        def velocity(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return model(x, s, **condition, **latents).sample

        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = flow_matching_loss(velocity, data, noise, sigma).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)

    return step


def measure(case: Case) -> dict[str, float]:
    """Seconds of a step, mean over the budgets of medians, and bytes at the peak."""
    on_gpu = case.device == "cuda"
    before = resident_bytes()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = make_step(case)
    kinds = max(1, len(case.kept))
    for number in range(2 * kinds if case.compile else kinds):  # compile, and fill AdamW's moments
        step(number)
    seconds: list[list[float]] = [[] for _ in range(kinds)]
    for number in range(case.steps * kinds):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step(number)
        if on_gpu:
            torch.cuda.synchronize()
        seconds[number % kinds].append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes() - before
    return {"seconds": statistics.mean(map(statistics.median, seconds)), "bytes": peak}


def resident_bytes() -> int:
    """Memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_resident_bytes() -> int:
    """The most that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(case: Case) -> dict[str, float]:
    """Measure in a process of its own, whose peak is this case's."""
    command = [sys.executable, __file__, "--one", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def counted_bytes(case: Case) -> float:
    """What `elit plan` says of a case's memory."""
    config = preset_config(case.preset, case.resolution)
    model = on_meta(preset_model(case.preset), config)
    most = max(case.kept, default=None)
    kept = saved_bytes(
        preset_model(case.preset), config, case.batch, most, case.precision, case.device
    )
    states = STATE_COPIES * 4 * sum(p.numel() for p in model.parameters())
    return states + (kept.checkpointed if case.checkpointing else kept.whole)


def step_flops(case: Case) -> float:
    """Of a step, mean over its budgets."""
    model = on_meta(preset_model(case.preset), preset_config(case.preset, case.resolution))
    counts = [forward_flops(model, n) for n in case.kept or (None,)]
    return 3 * case.batch * statistics.mean(counts)


# ---- the two benchmarks ----


def cpu_table(preset: str, batch: int, steps: int) -> str:
    """A small model with and without checkpointing, bf16 and compile."""
    kept = (16,) if preset.startswith("elit-") else ()
    given = {"preset": preset, "resolution": 256, "batch": batch, "kept": kept, "steps": steps}
    ways: list[dict[str, Any]] = [
        {},
        {"checkpointing": True},
        {"compile": True},
        {"precision": "bf16"},
        {"precision": "bf16", "checkpointing": True},
    ]
    rows = []
    for way in ways:
        case = Case(**given, **way)
        found = in_a_process(case)
        name = ", ".join([case.precision, *(w for w in ("checkpointing", "compile") if way.get(w))])
        first = rows[0][1] if rows else f"{found['seconds']:.2f}"
        rows.append([
            name, f"{found['seconds']:.2f}", f"{found['seconds'] / float(first):.2f}",
            f"{found['bytes'] / 1e9:.2f}", f"{counted_bytes(case) / 1e9:.2f}",
        ])  # fmt: skip
        print(*rows[-1], file=sys.stderr, flush=True)
    header = (f"{preset}, batch {batch}", "s a step", "of fp32's", "peak GB", "counted GB")
    return markdown(header, rows)


def gpu_table(steps: int) -> str:
    """Plain, elastic and multi-budget XL/2 side by side."""
    peak = peak_flops(torch.cuda.get_device_name())
    rows = []
    for resolution, batch, full, several in (
        (256, 64, 16, (1, 4, 7, 10, 13, 16)),
        (512, 16, 64, (4, 16, 28, 40, 52, 64)),
    ):
        for what, preset, kept in (
            ("DiT", "dit-xl/2", ()),
            ("ELIT", "elit-dit-xl/2", (full,)),
            ("ELIT-MB", "elit-dit-xl/2", several),
        ):
            case = Case(
                preset, resolution, batch, kept, "bf16", compile=True, device="cuda", steps=steps
            )
            found, flops = measure(case), step_flops(case)
            torch.compiler.reset()
            speed = flops / found["seconds"]
            rows.append([
                f"{what}, {resolution} px, batch {batch}", f"{1000 * found['seconds']:.0f}",
                f"{batch / found['seconds']:.0f}", f"{flops / 1e12:.1f}", f"{speed / 1e12:.0f}",
                "unknown" if peak is None else f"{speed / peak:.3f}",
                f"{found['bytes'] / 1e9:.1f}", f"{counted_bytes(case) / 1e9:.1f}",
            ])  # fmt: skip
            print(*rows[-1], file=sys.stderr, flush=True)
    header = ("XL/2, bf16, compiled", "ms a step", "samples/s", "TFLOPs", "TFLOP/s", "MFU", "GB",
              "counted GB, eager")  # fmt: skip
    return f"{torch.cuda.get_device_name()}\n\n{markdown(header, rows)}"


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paper", action="store_true", help="count the paper's runs")
    parser.add_argument("--configs", nargs="+", help="of these alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="dit-s/2", help="of the steps on a CPU")
    parser.add_argument("--batch-size", type=int, default=8, help="of the steps on a CPU")
    parser.add_argument("--steps", type=int, default=5, help="timed ones of each case and budget")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        given = json.loads(args.one)
        print(json.dumps(measure(Case(**given | {"kept": tuple(given["kept"])}))))
    elif args.paper:
        print(markdown(PAPER_HEADER, list(paper_rows(args.configs))))
    elif args.device == "cuda":
        print(gpu_table(args.steps))
    else:
        print(cpu_table(args.model, args.batch_size, args.steps))


if __name__ == "__main__":
    main()
