"""Muon against AdamW, each at the learning rate that suits it, at equal steps and at equal time.

    python benchmarks/optimizers.py --data data/fashion-mnist

ELIT-MB on Fashion-MNIST, width 64, 6 blocks (ELIT 1-4-1), batch 32: one seed chooses each rate, all
seeds compare them. The loss is that of 512 held-out pictures at full and at 1/8 budget.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from elit.reproduce.runs import Training, Trainings
from elit.reproduce.scales import SCALES
from elit.training.build import read_data
from elit.training.config import DataConfig, TrainConfig
from elit.training.loop import train
from elit.training.metrics import FILE, read_metrics

BUDGETS = (1.0, 1 / 8)


class Trials:
    """Trains with either optimiser."""

    def __init__(self, data: Path, folder: Path):
        scale = SCALES["tiny"]
        self.size, self.folder = scale.sizes[0], folder
        self.trainings = Trainings(scale, folder, DataConfig("fashion-mnist", {"path": str(data)}))
        self.data = read_data(self.config("adamw", 0.1, 0, 1))

    def config(self, optimizer: str, lr: float, seed: int, steps: int) -> TrainConfig:
        """The config of a training."""
        name = f"{optimizer}-{lr:g}-{seed}-{steps}"
        config = self.trainings.config(Training(name, "elit-mb", self.size, seed, steps, 0))
        config.optimizer = replace(config.optimizer, name=optimizer, lr=lr)  # type: ignore[arg-type]
        config.train = replace(config.train, validate_every=steps, checkpoint_every=0)
        config.sample = replace(config.sample, budgets=list(BUDGETS))
        return config

    def losses(self, optimizer: str, lr: float, seed: int, steps: int) -> tuple[list[float], float]:
        """Losses at the budgets, and CPU seconds of a step."""
        started = time.process_time()
        done = train(self.config(optimizer, lr, seed, steps), progress=False, data=self.data)
        seconds = (time.process_time() - started) / steps
        metrics = read_metrics(done.folder / FILE)
        found = [metrics[f"validation/loss_{name}"][-1][1] for name in ("1", "1/8")]
        print(f"{optimizer:6} {lr:<7g} seed {seed} {steps} steps {seconds:.3f} s/step {found}")
        return found, seconds

    def compare(self, optimizer: str, lr: float, seeds: Sequence[int], steps: int) -> list[str]:
        """Means and standard errors over the seeds."""
        runs = [self.losses(optimizer, lr, seed, steps)[0] for seed in seeds]
        spread = [statistics.stdev(x) / len(x) ** 0.5 for x in zip(*runs, strict=True)]
        means = map(statistics.mean, zip(*runs, strict=True))
        return [f"{mean:.4f} ± {error:.4f}" for mean, error in zip(means, spread, strict=True)]


def main() -> None:
    """Tune both, then compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/fashion-mnist"), help="folder of the idx files")
    add("--steps", type=int, default=300)
    add("--rates", type=float, nargs="+", default=[5e-3, 1e-2, 2e-2, 4e-2])
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="that compare; 0 chooses the rate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trials, best, seconds = Trials(args.data, Path(folder)), {}, {}
        for optimizer in ("adamw", "muon"):
            tried = {}
            for lr in args.rates:
                (loss, _), seconds[optimizer] = trials.losses(optimizer, lr, 0, args.steps)
                tried[lr] = loss
            best[optimizer] = min(tried, key=tried.__getitem__)
        ratio = seconds["muon"] / seconds["adamw"]
        rows = [
            ("adamw", args.steps), ("muon", args.steps), ("adamw", round(args.steps * ratio)),
        ]  # fmt: skip
        head = ["optimiser", "rate", "steps", "CPU s", "loss, full", "loss, 1/8"]
        print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for optimizer, steps in rows:
            lr, taken = best[optimizer], f"{seconds[optimizer] * steps:.0f}"
            words = [optimizer, f"{lr:g}", str(steps), taken]
            words += trials.compare(optimizer, lr, args.seeds, steps)
            print(f"| {' | '.join(words)} |")


if __name__ == "__main__":
    main()
