"""The FLOPs of the presets beside the paper's figures: the tables of docs/flops.md.

python benchmarks/flops.py
"""

import argparse
import functools
from typing import Any

from elit.cost.flops import flops_report
from elit.cost.formulas import ModelCost
from elit.models.presets import preset_class, preset_config

PAPER_BUDGETS = (1, 3 / 4, 1 / 2, 1 / 4)
# Backbone, resolution, and the paper's training TFLOPs: plain, elastic, multi-budget.
TRAINING = (
    ("DiT", 256, 182, 188, 190),
    ("DiT", 512, 806, 831, 804),
    ("UViT", 256, 196, 202, 204),
    ("UViT", 512, 861, 886, 858),
    ("HDiT", 256, 182, 188, 191),
    ("HDiT", 512, 776, 801, 791),
)
BUDGETS = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
QWEN_TEXT = 128  # tokens of a text
QWEN_BUDGETS = (1, 1 / 2, 1 / 4, 1 / 8)


@functools.cache
def report(name: str, resolution: int) -> dict[str, Any]:
    """Cost of a preset."""
    cost = ModelCost(preset_class(name), preset_config(name, resolution))
    budgets = (*PAPER_BUDGETS, *BUDGETS) if cost.is_elastic else None
    return flops_report(cost, name, resolution, budgets)


def gflops(name: str, resolution: int, budget: float = 1) -> float:
    """GFLOPs of one forward."""
    rows = report(name, resolution)["rows"]
    return next(row["gflops"] for row in rows if row["budget"] == budget)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [header, ("---", *("---:",) * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def deviation(ours: float, paper: float) -> str:
    """Percent, without a minus before zero."""
    return f"{round(100 * (ours / paper - 1), 1) + 0.0:+.1f} %"


def beside_the_paper() -> str:
    """Every figure of the paper that is a count."""
    plain, elastic = "DiT-XL/2", "ELIT-DiT-XL/2"
    figures = [
        (f"{name}, parameters", "M", paper, report(name.lower(), 256)["parameters"] / 1e6)
        for name, paper in ((plain, 675), (elastic, 698))
    ]
    for side, paper in ((256, 237.2), (512, 1049.0)):
        what = f"{plain} at {side} px, forward"
        figures.append((what, "GFLOPs", paper, gflops("dit-xl/2", side)))
    for budget, paper in zip(PAPER_BUDGETS, (1083, 877, 685, 503), strict=True):
        what = f"{elastic} at 512 px, forward, budget {budget:g}"
        figures.append((what, "GFLOPs", paper, gflops("elit-dit-xl/2", 512, budget)))
    for name, side, baseline, single, multi in TRAINING:
        what, ours = (
            f"{name}-XL/2 at {side} px, training step",
            report(f"{name}-xl/2".lower(), side),
        )
        figures.append((what, "TFLOPs", baseline, ours["train_tflops"]))
        what, ours = f"ELIT-{what}", report(f"elit-{name}-xl/2".lower(), side)
        figures.append((what, "TFLOPs", single, ours["train_tflops"]))
        figures.append(
            (f"{what}, multi-budget", "TFLOPs", multi, ours["train_tflops_multi_budget"])
        )
    rows = [
        (what, unit, f"{paper:g}", f"{ours:.1f}", deviation(ours, paper))
        for what, unit, paper, ours in figures
    ]
    return table(("", "unit", "paper", "here", "deviation"), rows)


def qwen_image() -> str:
    """Sampling with cheap CFG, relative to the plain model's with CFG, beside the paper's."""
    counts = {}
    for name in ("mmdit-qwen/2", "elit-mmdit-qwen/2"):
        cost = ModelCost("MMDiT", preset_config(name, 1024), text_tokens=QWEN_TEXT)
        budgets = QWEN_BUDGETS if cost.is_elastic else None
        counts[name] = flops_report(cost, name, 1024, budgets)["rows"]
    (plain,) = counts["mmdit-qwen/2"]
    guide = counts["elit-mmdit-qwen/2"][-1]["gflops"]
    rows = []
    for row, paper in zip(counts["elit-mmdit-qwen/2"], (0.69, 0.49, 0.41, 0.37), strict=True):
        share = (row["gflops"] + guide) / (2 * plain["gflops"])
        latents, cost = str(int(4096 * row["budget"])), f"{row['gflops'] / 1e3:.1f}"
        rows.append((latents, cost, f"{paper}", f"{share:.3f}"))
    header = ("latents at 1024 px", "TFLOPs of a forward", "share of CFG, paper", "here")
    return table(header, rows)


def sizes() -> str:
    """Forwards of some sizes at 256 px, plain and elastic."""
    header = ("GFLOPs at 256 px", "plain", *(f"budget {b:g}" for b in BUDGETS))
    rows = []
    for name in (
        "DiT-S/2",
        "DiT-B/2",
        "DiT-XL/2",
        "UViT-B/2",
        "UViT-XL/2",
        "HDiT-B/2",
        "HDiT-XL/2",
        "MMDiT-B/2",
        "Video-DiT-XL/2",
    ):
        costs = [gflops(name.lower(), 256)]
        costs += [gflops(f"elit-{name.lower()}", 256, budget) for budget in BUDGETS]
        rows.append((name, *(f"{cost:.2f}" for cost in costs)))
    return table(header, rows)


def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(beside_the_paper(), qwen_image(), sizes(), sep="\n\n")


if __name__ == "__main__":
    main()
