"""How the latent interface starts, tried: held-out loss by budget at equal training FLOPs.

python benchmarks/interface_start.py --data FOLDER --starts plain before default --lr 6e-3 1.5e-2

FOLDER has the four idx files of Fashion-MNIST. Each start is one training of about a minute on a
core, as `elit reproduce --scale small` has it; the same command again goes on where it was stopped.
"""

import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import nn

from elit._tables import format_table
from elit.interface.initial import open_gates
from elit.reproduce.measure import Bench
from elit.reproduce.runs import SHOWN_BUDGETS, VARIANTS, Trainings
from elit.reproduce.scales import SCALES
from elit.training.build import build_model
from elit.training.config import DataConfig
from elit.training.loop import train

# Standard deviations of learned vectors and values of gates, where they are not the default.
STARTS: dict[str, dict[str, float]] = {
    "plain": {},
    "default": {},
    "before": {
        "latents": 0.02, "index": 0.02, "read_place": 0.02, "write_place": 0.02, "read_gate": 0.0,
        "write_gate": 0.0,
    },
    "latents .02": {"latents": 0.02},
    "index .02": {"index": 0.02},
    "Read's places .02": {"read_place": 0.02},
    "Write's places .02": {"write_place": 0.02},
    "Read's gate 0": {"read_gate": 0.0},
    "Write's gate 0": {"write_gate": 0.0},
    "Write's gate .3": {"write_gate": 0.3},
    "Write's gate 1": {"write_gate": 1.0},
    "latents, index .3": {"latents": 0.3, "index": 0.3},
}  # fmt: skip


def build_started(start: dict[str, float], *args: Any) -> Any:
    """A run's model, started otherwise."""
    model = build_model(*args)
    read, write = model.read, model.write
    vectors = {
        "latents": read.latents, "index": read.latent_index, "read_place": read.token_place,
        "write_place": write.token_place,
    }  # fmt: skip
    for name, value in start.items():
        if name in vectors:
            nn.init.normal_(vectors[name], std=value)
        else:
            open_gates({"read_gate": read, "write_gate": write}[name].modulation, value)
    return model


def main() -> None:
    """Train what was not trained yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--out", default="runs/interface-start")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), metavar="NAME")
    parser.add_argument("--lr", nargs="+", type=float, default=[1.5e-2])
    parser.add_argument("--steps", type=int, default=600, help="of the plain model")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(1)
    data = DataConfig("fashion-mnist", {"path": args.data})
    bench, rows = Bench(Trainings(SCALES["small"], Path(args.out), data)), []
    for name in args.starts:
        for lr in args.lr:
            size = replace(SCALES["small"].sizes[0], steps=args.steps, lr=lr)
            folder = Path(args.out) / f"{name.replace(' ', '-')}-{lr:g}-{args.steps}"
            trainings = Trainings(replace(SCALES["small"], sizes=(size,)), folder, data)
            variant = "dit" if name == "plain" else "elit-mb"
            losses: list[list[float]] = []
            for seed in range(args.seeds):
                config = trainings.config(trainings.training(variant, seed))
                train(
                    config,
                    make_model=partial(build_started, STARTS[name]) if STARTS[name] else None,
                )
                model_class = VARIANTS[variant].model_class
                model = model_class.from_pretrained(Path(config.output_dir) / "transformer")
                budgets = SHOWN_BUDGETS if model.is_elastic else (1.0,)
                found = bench.losses(
                    model, [{"num_latents": model.resolve_budget(b)} for b in budgets]
                )
                losses.append([float(loss.mean()) for loss in found])
            cells = [f"{sum(x) / len(x):.4f}" for x in zip(*losses, strict=True)]
            rows.append([name, f"{lr:g}", *cells, *[""] * (len(SHOWN_BUDGETS) - len(cells))])
            print(format_table(["start", "lr", "1", "1/2", "1/4", "1/8", "1/16"], rows), flush=True)


if __name__ == "__main__":
    main()
