"""Budgets over the steps of a run: does the table predict, and what is a plan worth?

    elit schedule runs/quickstart
    python benchmarks/schedules.py runs/quickstart --scale 1.5

The first table compares predicted and measured end errors of random schedules; the second one ways
to draw at equal FLOPs. An error is the mean square by which samples differ from those of the full
budget, from the same noise, over the samples' own mean square. "vs long" is against the full budget
with four times the steps: what fewer steps lose is in it too.
"""

import argparse
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from elit import CFG, load_pipeline, load_schedule
from elit.scheduling.schedule import Schedule, call_weights

Pairs = list[tuple[int, int]]  # latents of each call and of its guide, 0 for none


@dataclass(frozen=True)
class Drawer:
    """Draws the same images again and again."""

    pipe: Any
    schedule: Schedule
    labels: Sequence[int]
    scale: float
    steps: int
    seed: int

    @property
    def guidance(self) -> Any:
        return None if self.scale == 1 else CFG(self.scale)

    def draw(self, pairs: Pairs | None = None, steps: int | None = None) -> torch.Tensor:
        """Samples (B, C, h, w)."""
        most, options = self.schedule.max_latents, {}
        if pairs is not None:
            options["budgets_of_steps"] = [n / most for n, _ in pairs]
            if self.guidance is not None:
                options["guide_budgets_of_steps"] = [m / most if m else None for _, m in pairs]
        return self.pipe(
            self.labels, num_inference_steps=steps or self.steps, guidance=self.guidance,
            output_type="latent", seed=self.seed, **options,
        ).images  # fmt: skip

    def flops(self, pairs: Pairs) -> int:
        """Of an image."""
        cost = self.pipe.forward_cost()
        return sum(cost.flops(n) for pair in pairs for n in pair if n)


def error(samples: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean square of the difference, over that of the reference."""
    return float((samples - reference).square().mean() / reference.square().mean())


def random_pairs(drawer: Drawer, calls: int, rng: random.Random) -> Pairs:
    """Budgets that change at a few places, or at all."""
    numbers = [*drawer.schedule.latents, drawer.schedule.max_latents]

    def curve(options: list[int]) -> list[int]:
        parts = min(rng.choice([1, 2, 3, 4, calls]), calls)
        cuts = [0, *sorted(rng.sample(range(1, calls), parts - 1)), calls]
        return [
            n for a, b in itertools.pairwise(cuts)
            for n in [rng.choice(options)] * (b - a)
        ]  # fmt: skip

    guides = [0] * calls if drawer.guidance is None else curve([0, *numbers])
    return list(zip(curve(numbers), guides, strict=True))


def ranks(values: Sequence[float]) -> np.ndarray:
    """Rank of each value."""
    return np.argsort(np.argsort(values)).astype(float)


def predictions(drawer: Drawer, count: int, seed: int) -> None:
    """Print how predicted and measured errors of random schedules agree."""
    rng = random.Random(seed)
    levels = drawer.pipe.start(drawer.steps, "cpu")
    weights = call_weights(drawer.pipe.scheduler)
    full, predicted, measured = drawer.draw(), [], []
    power = float(full.square().mean())
    for _ in range(count):
        pairs = random_pairs(drawer, len(levels), rng)
        guess = drawer.schedule.error(levels, weights, pairs, drawer.guidance)
        predicted.append(guess / power)
        measured.append(error(drawer.draw(pairs), full))
    rank = np.corrcoef(ranks(predicted), ranks(measured))[0, 1]
    kept = [(p, m) for p, m in zip(predicted, measured, strict=True) if p > 0 and m > 0]
    ratio = np.exp(np.median([np.log(m / p) for p, m in kept]))
    print(
        "| scale | schedules | rank correlation | measured / predicted, median |\n|---|---|---|---|"
    )
    print(f"| {drawer.scale:g} | {count} | {rank:.3f} | {ratio:.2f} |\n")


def ways(drawer: Drawer, share: float) -> dict[str, tuple[Pairs, int]]:
    """Ways to draw at a share of full budget's FLOPs: calls, and steps, by name."""
    schedule, steps = drawer.schedule, drawer.steps
    most, numbers = schedule.max_latents, [*schedule.latents, schedule.max_latents]
    calls = len(drawer.pipe.start(steps, "cpu"))
    guided = drawer.guidance is not None
    cap = share * drawer.flops([(most, most if guided else 0)] * calls)
    found: dict[str, tuple[Pairs, int]] = {}
    constant = [[(n, n if guided else 0)] * calls for n in range(1, most + 1)]
    within = [pairs for pairs in constant if drawer.flops(pairs) <= cap]
    if within:
        found["constant budget"] = within[-1], steps
    if guided:
        cheap = [[(n, m)] * calls for n in numbers for m in (0, *numbers)]
        cheap = [pairs for pairs in cheap if drawer.flops(pairs) <= cap]
        full = drawer.draw()
        best = min(cheap, key=lambda pairs: error(drawer.draw(pairs), full), default=None)
        if best is not None:
            found["best constant pair of budgets, measured"] = best, steps
    for by in ("spectrum", "errors"):
        for fewer in (1.0, 0.75, 0.6) if by == "errors" else (1.0,):
            try:
                plan = schedule.plan(
                    drawer.pipe, cap, None, drawer.guidance, round(fewer * steps), by=by
                )
            except ValueError:  # below the cheapest
                continue
            name = {"spectrum": "spectral", "errors": "derived"}[by]
            name += "" if fewer == 1 else f", {round(fewer * steps)} steps"
            found[name] = list(zip(plan.latents, plan.guides, strict=True)), round(fewer * steps)
    fewer = max(n for n in range(1, steps + 1) if len(drawer.pipe.start(n, "cpu")) <= share * calls)
    length = len(drawer.pipe.start(fewer, "cpu"))
    found["fewer steps"] = [(most, most if guided else 0)] * length, fewer
    return found


def compare(drawer: Drawer, share: float) -> None:
    """Print the table of a share of the FLOPs."""
    full, long = drawer.draw(), drawer.draw(steps=4 * drawer.steps)
    most, calls = drawer.schedule.max_latents, len(drawer.pipe.start(drawer.steps, "cpu"))
    whole = drawer.flops([(most, most if drawer.guidance else 0)] * calls)
    print(
        f"| at {share:.0%}, scale {drawer.scale:g} | FLOPs | error | vs long |\n|---|---|---|---|"
    )
    print(f"| full budget | 100% | 0 | {error(full, long):.2%} |")
    for name, (pairs, steps) in ways(drawer, share).items():
        samples = drawer.draw(pairs, steps)
        cost = drawer.flops(pairs) / whole
        print(f"| {name} | {cost:.0%} | {error(samples, full):.2%} | {error(samples, long):.2%} |")
    print()


def main() -> None:
    """Print all tables as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--scale", type=float, nargs="+", default=[1.5])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--schedules", type=int, default=40)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--seed", type=int, default=5000)
    args = parser.parse_args()
    pipe = load_pipeline(args.run)
    pipe.set_progress_bar_config(disable=True)
    schedule, classes = load_schedule(args.run), pipe.transformer.config.num_classes
    labels = [i % classes for i in range(args.images)]
    for scale in args.scale:
        drawer = Drawer(pipe, schedule, labels, scale, args.steps, args.seed)
        predictions(drawer, args.schedules, args.seed)
        for share in args.shares:
            compare(drawer, share)


if __name__ == "__main__":
    main()
