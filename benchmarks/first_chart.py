"""The chart of README's first screen: one elastic model against separate plain DiTs.

python benchmarks/first_chart.py --out runs/first-chart --seeds 3 --whole --picture first.png

All are trained on the quickstart's digits as the quickstart trains. The plain DiTs, of several
depths, share the FLOPs that the elastic model takes; with --whole there are others too, each of
which takes all of them for itself. The loss is that of held-out digits. The same command again goes
on where it was stopped.
"""

import argparse
import os
from pathlib import Path
from statistics import mean, stdev

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from elit import ElitPipeline
from elit._tables import format_table
from elit.cost.flops import cost_of
from elit.interface.budget import format_budget
from elit.training.config import TrainConfig
from elit.training.config_files import load_config
from elit.training.estimate import estimate
from elit.training.loop import train
from elit.training.metrics import FILE, read_metrics
from elit.viz.charts import Chart, Line, picture
from elit.viz.sheet import save_image

Points = dict[str, tuple[float, list[float]]]  # MFLOPs of a forward, and the loss of each seed


def config_of(
    folder: Path, name: str, seed: int, flops: float, blocks: int | None = None
) -> TrainConfig:
    """The quickstart's run for these FLOPs; if `blocks` are given, of a plain DiT."""
    plain = {} if blocks is None else {
        "model.preset": "dit-tiny/4",
        "model.overrides": f"{{hidden_size: 48, depth: {blocks}}}",
    }  # fmt: skip
    settings = plain | {
        "output_dir": str(folder / f"{name}-{seed}"), "seed": str(seed), "train.sample_every": "0",
        "train.checkpoint_every": "0",
    }  # fmt: skip
    steps = round(flops / 1e12 / estimate(load_config("digits", settings), 1)["step_tflops"])
    counts = {"train.steps": str(steps), "train.validate_every": str(steps)}
    return load_config("digits", settings | counts)


def add_points(points: Points, config: TrainConfig, name: str) -> None:
    """Train a model unless it is there, and add its last losses."""
    train(config)
    model = ElitPipeline.from_pretrained(config.output_dir).transformer
    metrics, flops = read_metrics(Path(config.output_dir) / FILE), cost_of(model).flops
    for key in (key for key in metrics if key.startswith("validation/loss")):
        budget = key.removeprefix("validation/loss").removeprefix("_")
        kept = None
        if not name:
            kept = next(
                n for n in range(1, model.max_latents + 1)
                if format_budget(model.budget_of(n)) == budget
            )  # fmt: skip
        label = name or budget
        losses = points.setdefault(label, (flops(kept) / 1e6, []))[1]
        losses.append(metrics[key][-1][1])


def line_of(points: Points, name: str, texts: list[str], **look: str) -> Line:
    """Mean losses over FLOPs, with the standard deviation over the seeds."""
    several = all(len(losses) > 1 for _, losses in points.values())
    return Line(
        [mflops for mflops, _ in points.values()], [mean(losses) for _, losses in points.values()],
        name, error=[stdev(losses) for _, losses in points.values()] if several else (),
        texts=texts, **look,
    )  # fmt: skip


def main() -> None:
    """Train what was not trained yet, print the table, draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/first-chart", help="folder of the runs")
    parser.add_argument("--picture", default="first.png", help="chart to write")
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 4, 8], help="of plain DiTs")
    parser.add_argument("--steps", type=int, default=1500, help="of the elastic model")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="plain DiTs with all FLOPs too")
    args = parser.parse_args()

    folder, blocks = Path(args.out), args.blocks
    flops = 1e12 * args.steps * estimate(load_config("digits", {}), 1)["step_tflops"]
    elastic, split, whole = Points(), Points(), Points()
    for seed in range(args.seeds):
        add_points(elastic, config_of(folder, "elastic", seed, flops), "")
        for depth in blocks:
            config = config_of(folder, f"split-{depth}", seed, flops / len(blocks), depth)
            add_points(split, config, f"{depth} blocks")
        for depth in blocks if args.whole else []:
            config = config_of(folder, f"plain-{depth}", seed, flops, depth)
            add_points(whole, config, f"{depth} blocks")
    named = {
        "one elastic model, by budget": elastic,
        f"{len(blocks)} plain DiTs, as many FLOPs in all": split,
        f"plain DiTs, as many FLOPs each, {len(blocks)} times in all": whole,
    }
    rows = [
        (kind, name, f"{mflops:.1f}", f"{mean(losses):.4f}", " ".join(f"{x:.4f}" for x in losses))
        for kind, points in named.items()
        for name, (mflops, losses) in points.items()
    ]
    print(format_table(("", "", "MFLOPs", "loss", "of each seed"), rows))
    styles = "-", "", ""
    lines = [
        line_of(points, kind, list(points), style=style)
        for (kind, points), style in zip(named.items(), styles, strict=True)
        if points
    ]
    chart = Chart(
        "The same training FLOPs: one elastic model, or several plain ones",
        "MFLOPs of a forward (log scale)", "loss on held-out digits (lower is better)", lines,
        log_x=True, labels="right",
    )  # fmt: skip
    save_image(picture([chart], size=(8.0, 3.6)), Path(args.picture))


if __name__ == "__main__":
    main()
