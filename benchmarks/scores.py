"""Scores: seconds and memory of the statistics, on random features of the usual size.

python benchmarks/scores.py                        # a quarter of an hour on two cores
python benchmarks/scores.py --samples 5000 --real 2000 --width 512

No network is run: features are drawn, and those of the moments in batches, as a network gives them.
Each row is measured in a process of its own. Processor seconds hold on a machine that others use
too. Memory is the peak beyond what the process held before, features and all; on a GPU, what
PyTorch took there.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

from elit._devices import pick_device
from elit.evaluation.frechet import Moments, frechet_distance
from elit.evaluation.scores import inception_score, kernel_distance, precision_recall

BATCH = 500  # images that a network looks at at once
CLASSES = 1008  # of the Inception network
Score = tuple[list[Tensor], Callable[..., object]]  # what it is given, and the function


def draw(count: int, width: int, device: torch.device) -> Tensor:
    """Features (n, d), float32, of decaying variance as those of a network are."""
    scale = torch.logspace(0, -2, width, device=device)
    return torch.randn(count, width, device=device).mul_(scale)


def stream(count: int, width: int, device: torch.device) -> Moments:
    """Moments of features that come in batches."""
    moments = Moments()
    for start in range(0, count, BATCH):
        moments.update(draw(min(BATCH, count - start), width, device))
    return moments


def frechet(count: int, width: int, device: torch.device) -> Score:
    """Between the statistics of two draws."""
    a, b = (stream(count, width, device) for _ in range(2))
    return [a.mean, a.covariance, b.mean, b.covariance], frechet_distance


def cases(args: argparse.Namespace) -> dict[str, Callable[[torch.device], Score]]:
    """Each row's name, and what makes its features on a device."""
    n, m, width = args.samples, args.real, args.width

    def pair(count: int, score: Callable[..., object]) -> Callable[[torch.device], Score]:
        return lambda device: ([draw(m, width, device), draw(count, width, device)], score)

    def all_pairs(real: Tensor, generated: Tensor) -> object:
        return kernel_distance(real, generated, subsets=0)

    return {
        f"Moments of {n} x {width}, streamed": lambda d: ([], lambda: stream(n, width, d)),
        f"Frechet distance at {width}": lambda d: frechet(2 * width, width, d),
        f"Frechet distance at {width}, half the rank": lambda d: frechet(width // 2, width, d),
        f"Inception Score of {n} x {CLASSES}": lambda d: ([draw(n, CLASSES, d)], inception_score),
        f"precision and recall, {m} real, {m} generated": pair(m, precision_recall),
        f"precision and recall, {m} real, {n} generated": pair(n, precision_recall),
        f"KID, {m} real, {n} generated, 100 subsets": pair(n, kernel_distance),
        f"KID, {m} real, {m} generated, all pairs": pair(m, all_pairs),
    }


def held(device: torch.device) -> int:
    """Bytes at the peak until now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: torch.device) -> None:
    """Begin a new peak; on systems other than Linux that of making the features stays."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif (peak := Path("/proc/self/clear_refs")).exists():
        peak.write_text("5")


def measure(make: Callable[[torch.device], Score], device: torch.device) -> dict[str, float]:
    """Seconds, those of processors, bytes of the features, and peak bytes beyond them."""
    torch.manual_seed(0)
    given, score = make(device)
    warm_up = torch.eye(64, device=device, dtype=torch.float64)
    torch.linalg.eigh(warm_up @ warm_up)  # libraries are loaded on first use
    forget_peak(device)
    before, started, used = held(device), time.perf_counter(), time.process_time()
    score(*given)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, busy = time.perf_counter() - started, time.process_time() - used
    given_bytes, extra = sum(x.nbytes for x in given), held(device) - before
    return {"seconds": seconds, "busy": busy, "given": given_bytes, "extra": extra}


def in_a_process(number: int) -> dict[str, float]:
    """Measure in a process of its own, whose peak is this row's."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50000, help="generated ones")
    parser.add_argument("--real", type=int, default=10000, help="real ones")
    parser.add_argument("--width", type=int, default=2048, help="of a feature")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = cases(args)
    if args.one is not None:
        print(json.dumps(measure(list(rows.values())[args.one], pick_device(args.device))))
        return
    print(f"{args.device}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs\n")
    print("| score | seconds | CPU seconds | features, MB | beyond them, MB |")
    print("|---|---:|---:|---:|---:|")
    for number, name in enumerate(rows):
        found = in_a_process(number)
        sizes = (f"{found[key] / 1e6:.0f}" for key in ("given", "extra"))
        times = (f"{found[key]:.1f}" for key in ("seconds", "busy"))
        print(f"| {' | '.join((name, *times, *sizes))} |", flush=True)


if __name__ == "__main__":
    main()
