"""elit.choose: does what it chooses keep within the cap, measured?

    elit sweep runs/quickstart
    python benchmarks/operating_points.py runs/quickstart
    python benchmarks/operating_points.py runs/quickstart --device cuda --batch-size 64 --caps 50

Random caps in milliseconds, between the cheapest and the dearest point of a sweep: what was chosen,
and the median of what drawing with it took. Say on how idle a machine.
"""

import argparse
import os
import random
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from elit import choose, load_pipeline
from elit._devices import pick_device
from elit.choosing.points import OperatingPoint
from elit.choosing.sweep_file import SWEEP_FILE, read_sweep
from elit.choosing.timing import CallTimes, device_name


def main() -> None:
    """Choose and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a swept run")
    parser.add_argument("--caps", type=int, default=20, help="random caps (default: 20)")
    parser.add_argument("--batch-size", type=int, default=32, help="images at once (default: 32)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="of the caps (default: 0)")
    args = parser.parse_args()

    pipe = load_pipeline(args.run).to(pick_device(args.device))
    pipe.set_progress_bar_config(disable=True)
    points = map(OperatingPoint.from_dict, read_sweep(Path(args.run) / SWEEP_FILE)["rows"])
    times = CallTimes(pipe, args.batch_size)
    all_ms = times.ms_of_runs([pipe.calls(**point.arguments()) for point in points])
    print(f"{len(all_ms)} points, {min(all_ms):.2f} to {max(all_ms):.2f} ms an image, "
          f"{device_name(pipe.transformer.device)}, torch {torch.__version__}\n")  # fmt: skip
    print("| cap, ms | chosen | measured, ms | measured / cap |\n| ---: | --- | ---: | ---: |")
    draw, ratios = random.Random(args.seed), []
    for _ in range(args.caps):
        cap = draw.uniform(min(all_ms), max(all_ms))
        point = choose(pipe, max_ms=cap, what=args.batch_size)
        seconds = []
        for _ in range(args.repeats):
            started = time.perf_counter()
            images = pipe(times.what, **point.arguments(), output_type="latent").images
            images.sum().item()  # waits for the device
            seconds.append(time.perf_counter() - started)
        ms = 1000 * statistics.median(seconds) / args.batch_size
        ratios.append(ms / cap)
        print(f"| {cap:.2f} | {point} | {ms:.2f} | {ms / cap:.3f} |", flush=True)
    within = sum(ratio <= 1.15 for ratio in ratios)
    print(f"\n{within} of {args.caps} within 15 % above their cap, at most {max(ratios):.3f}")


if __name__ == "__main__":
    main()
