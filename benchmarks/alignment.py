"""Does representation alignment help an elastic model, and where? With controls, on Fashion-MNIST.

python benchmarks/alignment.py --data FOLDER --out runs/alignment

The features are of the small classifier, which was fitted on the labels: they leak them. So others
are compared too, with the same projector: of the network before it was fitted, which knows no
label; of another picture of the same class, which knows nothing else; and of another picture, which
must not help.
"""

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from elit.data import ImageDataset, load_dataset
from elit.networks.classifier import spatial_part, untrained_network
from elit.networks.feature_maps import Features, load_feature_maps
from elit.training.build import DataSets
from elit.training.config_files import load_config
from elit.training.loop import train
from elit.training.metrics import read_metrics

VARIANTS = {  # kind, where and whose features
    "base": None,
    "repa, tokens": ("repa", "tokens", "own"),
    "repa, latents": ("repa", "latents", "own"),
    "irepa, tokens": ("irepa", "tokens", "own"),
    "irepa, latents": ("irepa", "latents", "own"),
    "repa, tokens, unfitted network": ("repa", "tokens", "unfitted"),
    "irepa, tokens, unfitted network": ("irepa", "tokens", "unfitted"),
    "repa, tokens, another of the class": ("repa", "tokens", "class"),
    "repa, tokens, another picture": ("repa", "tokens", "other"),
    "irepa, tokens, another picture": ("irepa", "tokens", "other"),
    "repa, latents, another picture": ("repa", "latents", "other"),
}


class WithFeatures(ImageDataset):
    """A data set whose batches hold features, of each picture or of another one."""

    def __init__(self, dataset: ImageDataset, whose: str):
        self.dataset, maps = dataset, load_feature_maps("classifier", torch.device("cpu"), dataset)
        self.module, self.labels = maps.module, dataset.labels
        self.image_shape, self.class_names = dataset.image_shape, dataset.class_names
        self.split, self.aligned = dataset.split, dataset.aligned
        self.features: Features | None = maps.about
        if whose == "unfitted":
            self.module = spatial_part(untrained_network(dataset)).requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(0)
        self.of = torch.arange(len(dataset))
        if whose == "other":
            self.of = torch.randperm(len(dataset), generator=generator)
        elif whose == "class":
            for label in range(dataset.num_classes):
                (rows,) = (self.labels == label).nonzero(as_tuple=True)
                self.of[rows] = rows[torch.randperm(len(rows), generator=generator)]

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        rows = self._positions(indices)
        batch = self.dataset.batch(rows)
        if self.with_features:
            with torch.no_grad():
                pictures = self.dataset.batch(self.of[rows].tolist())["images"]
                batch["features"] = self.module(pictures)
        return batch


def measure(args: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """Held-out losses by budget, and the last loss of alignment."""
    variant, folder = VARIANTS[name], Path(args.out) / f"{name.replace(', ', '-')}-{seed}"
    overrides = {
        "data.options.path": args.data, "output_dir": str(folder), "seed": str(seed),
        "model.overrides.hidden_size": str(args.width), "train.steps": str(args.steps),
        "data.batch_size": str(args.batch_size), "train.validate_every": str(args.steps),
        "train.sample_every": "0", "train.checkpoint_every": "0", "train.log_every": "25",
    }  # fmt: skip
    data = DataSets(*(load_dataset("fashion-mnist", s, path=args.data) for s in DataSets._fields))
    if variant is not None:
        kind, where, whose = variant
        overrides |= {
            "alignment.weight": str(args.weight), "alignment.kind": kind,
            "alignment.where": where, "alignment.encoder": "prepared",
        }  # fmt: skip
        data = DataSets(WithFeatures(data.train, whose), data.validation)
    shutil.rmtree(folder, ignore_errors=True)
    if not train(load_config("fashion-mnist", overrides), progress=False, data=data).finished:
        raise SystemExit(f"{folder} was stopped")
    series = read_metrics(folder / "metrics.jsonl")
    shown = ("validation/loss_", "alignment")
    return {key: pairs[-1][1] for key, pairs in series.items() if key.startswith(shown)}


def main() -> None:
    """Train every variant and print a table in Markdown: means over the seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of Fashion-MNIST's files")
    parser.add_argument("--out", default="runs/alignment")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--weight", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    args = parser.parse_args()
    budgets: list[str] = []
    for name in args.variants:
        each = [measure(args, name, seed) for seed in args.seeds]
        mean = {key: sum(one[key] for one in each) / len(each) for key in each[0]}
        if not budgets:
            budgets = [key for key in mean if key.startswith("validation")]
            heads = [f"loss at {key.rpartition('_')[2]}" for key in budgets]
            print("| |", " | ".join([*heads, "alignment"]), "|")
            print("|---|", "---:|" * (len(budgets) + 1), sep="", flush=True)
        cells = [f"{mean[key]:.4f}" for key in budgets]
        cells.append(f"{mean['alignment']:.3f}" if "alignment" in mean else "")
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
