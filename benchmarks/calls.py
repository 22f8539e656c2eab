"""Time of one guided step and of a whole call of a pipeline.

    python benchmarks/calls.py
    python benchmarks/calls.py --model elit-dit-tiny/2 --batch-size 1 8 --steps 20 --rounds 9

Where a model is small or a batch is one image, much of the time is no arithmetic: Python, checks,
small kernels. Every round times each way for `--least` ms, in an order drawn anew; the table has
the medians in ms. A step is one velocity of `Guidance.velocity`, a call is noise to samples, with
no VAE. With one CPU thread the time is the thread's own: what else runs there counts little. Two
commits are compared, round by round, by

    OMP_NUM_THREADS=1 python benchmarks/calls.py --against other/src
"""

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import torch

import elit
from elit import CFG, CheapCFG, ElitPipeline, create_model, make_scheduler
from elit.flow.guidance import Guidance
from elit.models.presets import preset_inputs

GUIDANCES = {"CFG": CFG(3.0), "CheapCFG": CheapCFG(3.0)}
Way = Callable[[], object]
Key = TypeVar("Key")


def make(name: str, device: str) -> ElitPipeline:
    """A pipeline whose weights are no zeros."""
    torch.manual_seed(0)
    model = create_model(name, min(preset_inputs(name)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    pipeline = ElitPipeline(model.eval(), make_scheduler("euler")).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def step(pipeline: ElitPipeline, guidance: Guidance, count: int) -> Way:
    """One guided step."""
    model, device = pipeline.transformer, pipeline.device
    x = torch.randn(count, model.in_channels, *model.sample_size, device=device)
    labels = torch.zeros(count, dtype=torch.long, device=device)
    condition, null = ({"class_labels": labels + n} for n in (0, pipeline.null_label))
    ((kept, guide),) = pipeline.latents_of_steps(1.0, 1, guidance)
    mixes = pipeline.mixes_budgets(2 * count, model.sample_size)

    def predict(x: torch.Tensor, sigma: float, given: dict, num_latents: object) -> torch.Tensor:
        level = torch.full((len(x),), sigma, device=device)
        return model(x, level, **given, num_latents=num_latents, return_dict=False)[0]

    return lambda: guidance.velocity(predict, x, 0.5, condition, null, kept, guide, mixes)


def call(
    pipeline: ElitPipeline, guidance: Guidance, count: int, steps: int
) -> Callable[[], object]:
    """One call."""
    return lambda: pipeline(
        [0] * count, num_inference_steps=steps, guidance=guidance, seed=0, output_type="latent"
    )


def ways_of(args: argparse.Namespace, name: str, count: int) -> dict[str, Way]:
    """What to time, by its name."""
    pipeline = make(name, args.device)
    ways: dict[str, Way] = {}
    for words, guidance in GUIDANCES.items():
        ways[f"{words}, a step"] = step(pipeline, guidance, count)
        ways[f"{words}, a call"] = call(pipeline, guidance, count, args.steps)
    return ways


def timed(way: Way, args: argparse.Namespace) -> float:
    """Milliseconds of one call, waiting for an accelerator."""
    on_gpu = args.device.startswith("cuda")
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    own_time = not on_gpu and torch.get_num_threads() == 1
    clock = time.thread_time if own_time else time.perf_counter
    wait()
    started, calls, took = clock(), 0, 0.0
    while took < args.least:
        with torch.no_grad():
            way()
        wait()
        calls, took = calls + 1, 1000 * (clock() - started)
    return took / calls


def medians(keys: Collection[Key], time: Callable[[Key], float], rounds: int) -> dict[Key, float]:
    """Median time of each over rounds, every one of which times all in an order drawn anew."""
    times: dict[Key, list[float]] = {key: [] for key in keys}
    for _ in range(rounds):
        for key in random.sample(list(keys), len(keys)):
            times[key].append(time(key))
    return {key: statistics.median(ms) for key, ms in times.items()}


def answer(args: argparse.Namespace) -> None:
    """Time what each line of the standard input names, for a `Side`."""
    ways = ways_of(args, args.model[0], args.batch_size[0])
    for line in sys.stdin:
        sys.stdout.write(f"{timed(ways[line.strip()], args)}\n")
        sys.stdout.flush()


class Side:
    """A process that times the ways of one source, when asked to."""

    def __init__(self, args: argparse.Namespace, source: Path, name: str, count: int):
        options = ["--model", name, "--batch-size", str(count), "--steps", str(args.steps)]
        options += ["--least", str(args.least)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--answer", *options, "--device", args.device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(source)},
        )  # fmt: skip

    def time(self, way: str) -> float:
        """Milliseconds of one call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{way}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def measure(args: argparse.Namespace, name: str, count: int) -> None:
    """Print the rows of one model and batch size."""
    here = Path(elit.__file__).parents[1]
    sources = {"there": args.against, "here": here} if args.against else {"here": here}
    sides = {side: Side(args, source, name, count) for side, source in sources.items()}
    ways = [f"{words}, a {what}" for words in GUIDANCES for what in ("step", "call")]
    pairs = [(way, side) for way in ways for side in sides]
    for way, side in pairs:
        sides[side].time(way)
    times = medians(pairs, lambda pair: sides[pair[1]].time(pair[0]), args.rounds)
    for way in ways:
        own = [times[way, side] for side in sides]
        cells = "".join(f"{ms:10.2f}" for ms in own)
        ratio = f"{own[-1] / own[0]:8.3f}" if args.against else ""
        print(f"{name:18}{count:6}  {way:18}{cells}{ratio}", flush=True)
    for side in sides.values():
        side.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = ["elit-dit-tiny/2", "elit-dit-s/2", "elit-dit-b/2"]
    parser.add_argument("--model", nargs="+", default=models, help="names of elastic presets")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=20, help="of a call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--least", type=float, default=100, help="ms of a round of a way")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--against", type=Path, help="src folder of another commit")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        answer(args)
        return
    where = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    titles = f"{'there':>10}{'here':>10}{'ratio':>8}" if args.against else f"{'ms':>10}"
    print(f"{'model':18}{'batch':>6}  {'':18}{titles}")
    for name in args.model:
        for count in args.batch_size:
            measure(args, name, count)


if __name__ == "__main__":
    main()
