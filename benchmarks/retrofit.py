"""What a retrofit loses and how fast it learns, lossless start against the paper's.

python benchmarks/retrofit.py runs/plain0 runs/plain1 --out runs/retrofit

Each BASE is the output_dir of a plain DiT that `elit train` trained. It is fine-tuned for shares of
its own steps; losses are of held-out data, accuracies of 200 images drawn with cheap guidance. The
same command again goes on where it was stopped.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from PIL import Image

from elit import CFG, CheapCFG, ElitPipeline, elasticize
from elit._tables import format_table
from elit.data import load_dataset
from elit.interface.budget import format_budget
from elit.networks.classifier import fit_classifier
from elit.pipelines.budgets import draw_budgets
from elit.training.build import build_parts, sigma_density
from elit.training.config import TrainConfig
from elit.training.config_files import load_config, read_yaml
from elit.training.distributed import World
from elit.training.loop import train
from elit.training.validation import validation_losses
from elit.viz.sheet import contact_sheet, save_image

SHARES = (0.02, 0.05, 0.10)
KEPT = (16, 8, 4, 2, 1)
BUDGETS_SHOWN = (1, 1 / 4, 1 / 16)
EACH = 20  # images of each class
# Name: settings beside those of configs/finetune.yaml.
RECIPES = {
    "identity": {},
    "learned": {
        "retrofit.init": "learned", "retrofit.train": "all", "optimizer.lr": "6e-3",
        "latents.draws": "1", "retrofit.features": "0",
    },
    "learned, features": {
        "retrofit.init": "learned", "retrofit.train": "all", "optimizer.lr": "6e-3",
        "latents.draws": "1",
    },
}  # fmt: skip


def config_of(base: Path, out: Path, recipe: str, steps: int) -> TrainConfig:
    """A fine-tuning of so many steps."""
    trained = read_yaml(base / "config.yaml")
    under = {key: trained[key] for key in ("data", "text", "objective", "seed")}
    folder = out / base.name / f"{recipe.replace(', ', '-')}-{steps}"
    settings = {
        "output_dir": str(folder), "train.steps": str(steps), "train.validate_every": str(steps),
        "optimizer.warmup_steps": str(max(3, steps // 10)), "train.sample_every": "0",
        "train.checkpoint_every": str(steps),
    }  # fmt: skip
    under["retrofit"] = {"base": str(base)}
    return load_config("finetune", settings | RECIPES[recipe], under)


def losses_after(config: TrainConfig) -> list[float]:
    """Held-out losses at the numbers of latents KEPT, after training, or before it at 0 steps."""
    if config.train.steps > 1:
        train(config)
        lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
        last = [json.loads(line) for line in lines if "validation" in line][-1]
        return [last[f"validation/loss_{format_budget(n / KEPT[0])}"] for n in KEPT]
    dataset = load_dataset(config.data.name, "validation", **config.data.options)
    world = World(0, 1, torch.device("cpu"))
    model, conditioning, *_ = build_parts(config, dataset, world)
    density = sigma_density(config)
    losses = validation_losses(
        model.eval(), dataset, conditioning, density, KEPT, config.seed, world
    )
    return [losses[n].mean().item() for n in KEPT]


def accuracies(folder: Path, config: TrainConfig, untrained: bool) -> list[float]:
    """Shares of drawn images that a classifier takes for what was asked, at KEPT."""
    pipeline = ElitPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if untrained:
        elasticize(pipeline.transformer, 2, 2, 4)
    judge = fit_classifier(load_dataset(config.data.name, **config.data.options))
    labels = list(range(pipeline.transformer.config.num_classes)) * EACH
    shares = []
    for n in KEPT:
        images = pipeline(
            labels,
            budget=n / KEPT[0],
            num_inference_steps=config.sample.steps,
            guidance=CheapCFG(config.sample.guidance_scale),
            generator=[torch.Generator().manual_seed(i) for i in range(len(labels))],
            output_type="pt",
        ).images  # (B, C, H, W) in [0, 1]
        shares.append(judge.accuracy(images * 2 - 1, torch.tensor(labels)))
    return shares


def picture(base: Path, tuned: dict[str, Path]) -> Image.Image:
    """The base right after `elasticize`, and what was fine-tuned, a row for each budget.

    With plain classifier-free guidance: a cheap guide would change full budget too.
    """
    rows, names = [], []
    for name, folder in {"before": base, **tuned}.items():
        pipeline = ElitPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        if folder is base:
            torch.manual_seed(0)
            elasticize(pipeline.transformer, 2, 2, 4)
        drawn = draw_budgets(
            pipeline, range(10), BUDGETS_SHOWN, range(10), num_inference_steps=40,
            guidance=CFG(3.0),
        )  # fmt: skip
        rows += [images for images, _ in drawn]
        names += [f"{name}, {format_budget(budget)}" for budget in BUDGETS_SHOWN]
    return contact_sheet(rows, names, [*map(str, range(10))], corner="start, budget")


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bases", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/retrofit"))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--picture", type=Path, help="file to draw the first base's digits into")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[Any]] = []
    for base in args.bases:
        total = read_yaml(base / "config.yaml")["train"]["steps"]
        for recipe in args.recipes:
            shares = [0, *SHARES, *(() if recipe == "identity" else [3 * s for s in SHARES])]
            for share in dict.fromkeys(round(share, 2) for share in shares):
                steps = round(share * total)
                config = config_of(base, args.out, recipe, max(1, steps))
                file = Path(f"{config.output_dir}.json")
                if not file.exists():
                    found = {"losses": losses_after(config)}
                    if recipe == "identity" and share in (0, SHARES[-1]):
                        folder = base if share == 0 else Path(config.output_dir)
                        found["accuracies"] = accuracies(folder, config, share == 0)
                    elif share == SHARES[-1]:
                        found["accuracies"] = accuracies(Path(config.output_dir), config, False)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(found))
                found = json.loads(file.read_text())
                cells = [f"{loss:.4f}" for loss in found["losses"]]
                drawn = " ".join(f"{a:.2f}" for a in found.get("accuracies", []))
                rows.append([base.name, recipe, f"{share:.0%}", *cells, drawn])
                print("  ".join(rows[-1]), flush=True)
    print(format_table(["base", "start", "steps", *(f"n={n}" for n in KEPT), "accuracy"], rows))
    if args.picture is not None:
        base, share = args.bases[0], SHARES[-1]
        steps = round(share * read_yaml(base / "config.yaml")["train"]["steps"])
        tuned = {
            f"{recipe}, {share:.0%}": Path(config_of(base, args.out, recipe, steps).output_dir)
            for recipe in args.recipes
        }
        save_image(picture(base, tuned), args.picture)


if __name__ == "__main__":
    main()
