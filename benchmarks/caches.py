"""Step caches: speed-up and what it does to the images, of trained pipelines side by side.

    python benchmarks/caches.py runs/digits runs/plain
    python benchmarks/caches.py runs/digits --budgets 1 0.25 --guidance 3 --steps 28

Every cache is calibrated first, on other noise than what is drawn then. A speed-up is the median
of ratios of neighbouring runs with and without the cache, so that a noisy machine slows both
alike. The difference is the root mean square of what changes in the samples, over that of the
samples without a cache, from the same noise. For comparison: fewer steps without a cache.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig

from elit import CFG, load_pipeline
from elit.caching.calibration import Calibration, calibrate_cache

Cache = Callable[[Calibration], Any]


@dataclass(frozen=True)
class Drawer:
    """Draws the same images again and again, from a pipeline at a budget."""

    pipe: Any
    labels: Sequence[int]
    budget: float
    guidance: Any
    steps: int

    def draw(self, seed: int = 0, steps: int | None = None) -> torch.Tensor:
        """Samples (B, C, h, w)."""
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(self.labels))]
        return self.pipe(
            self.labels, budget=self.budget, num_inference_steps=steps or self.steps,
            guidance=self.guidance, generator=generators, output_type="latent",
        ).images  # fmt: skip

    def timed(self, steps: int | None = None) -> tuple[torch.Tensor, float]:
        """Samples, and the seconds that they took."""
        self._wait()
        started = time.perf_counter()
        images = self.draw(steps=steps)
        self._wait()
        return images, time.perf_counter() - started

    def _wait(self) -> None:
        if self.pipe.device.type == "cuda":
            torch.cuda.synchronize()

    def compare(self, config: Any, repeats: int, steps: int | None = None) -> str:
        """Cells of the table: steps computed, speed-up, difference."""
        model, ratios = self.pipe.transformer, []
        for _ in range(repeats):
            plain, seconds = self.timed()
            if config is not None:
                model.enable_cache(config)
            cached, faster = self.timed(steps)
            computed, skipped = model.cache_counts()
            model.disable_cache()
            ratios.append(seconds / faster)
        calls = self.steps * computed / (computed + skipped) if config is not None else steps
        difference = float((cached - plain).square().mean().sqrt() / plain.square().mean().sqrt())
        return f"{calls:.0f} | {statistics.median(ratios):.2f}x | {difference:.1%}"


def table(drawers: dict[str, Drawer], args: argparse.Namespace) -> None:
    """Print the table as Markdown."""
    calibrations = {
        name: calibrate_cache(drawer.pipe.transformer, lambda d=drawer: d.draw(seed=10_000))
        for name, drawer in drawers.items()
    }
    rows: list[tuple[str, Cache | None, int | None]] = []
    for threshold in args.first_block:
        rows.append((f"FirstBlockCache {threshold:g}", _first_block(threshold), None))
    for threshold in args.mag:
        rows.append((f"MagCache {threshold:g}", _mag(threshold), None))
    for threshold in args.tea:
        rows.append((f"TeaCache {threshold:g}", _tea(threshold), None))
    for steps in args.fewer:
        rows.append((f"no cache, {steps} steps", None, steps))

    print("|  | " + " | ".join(f"{name}: steps | speed | difference" for name in drawers) + " |")
    print("| --- |" + " ---: | ---: | ---: |" * len(drawers))
    for label, cache, steps in rows:
        cells = [
            drawer.compare(cache and cache(calibrations[name]), args.repeats, steps)
            for name, drawer in drawers.items()
        ]
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def _first_block(threshold: float) -> Cache:
    return lambda _: FirstBlockCacheConfig(threshold)


def _mag(threshold: float) -> Cache:
    return lambda calibration: calibration.magcache(threshold, max_skip_steps=4)


def _tea(threshold: float) -> Cache:
    return lambda calibration: calibration.teacache(threshold)


def parse() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("pipelines", nargs="+", help="folders of class-conditional pipelines")
    add("--budgets", type=float, nargs="+", default=[1.0], help="of the elastic ones")
    add("--labels", type=int, nargs="+", default=list(range(10)) * 2)
    add("--steps", type=int, default=40)
    add("--guidance", type=float, default=1.0, help="scale of CFG; 1 is none")
    add("--first-block", type=float, nargs="*", default=[0.05, 0.1, 0.2], metavar="THRESHOLD")
    add("--mag", type=float, nargs="*", default=[0.05, 0.1, 0.2], metavar="THRESHOLD")
    add("--tea", type=float, nargs="*", default=[0.1, 0.2, 0.4], metavar="THRESHOLD")
    add("--fewer", type=int, nargs="*", default=[30, 20, 12], metavar="STEPS")
    add("--repeats", type=int, default=5)
    add("--threads", type=int, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Open the pipelines, print the table."""
    args = parse()
    torch.set_num_threads(args.threads)
    drawers = {}
    for folder in args.pipelines:
        pipe = load_pipeline(folder).to(args.device)
        pipe.set_progress_bar_config(disable=True)
        guidance = None if args.guidance == 1 else CFG(args.guidance)
        for budget in args.budgets if pipe.transformer.is_elastic else [1.0]:
            name = folder.rstrip("/").rpartition("/")[2]
            name += f" at {budget:g}" if pipe.transformer.is_elastic else ""
            drawers[name] = Drawer(pipe, args.labels, budget, guidance, args.steps)
    table(drawers, args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    print(f"\n{device}, {args.threads} thread(s), PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
