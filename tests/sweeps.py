"""Reports as `elit sweep` writes them, with made-up scores that behave like real ones."""

import copy
import math
import random
from typing import Any

from elit.viz.sweeps import SCORES

GUIDES: list[dict[str, Any]] = [
    {"guidance": "none", "scale": None, "guide_budget": None},
    {"guidance": "cfg", "scale": 1.5, "guide_budget": None},
    {"guidance": "cfg", "scale": 3.0, "guide_budget": None},
    {"guidance": "ag", "scale": 2.0, "guide_budget": 1 / 16},
    {"guidance": "ccfg", "scale": 1.5, "guide_budget": 1 / 16},
    {"guidance": "ccfg", "scale": 3.0, "guide_budget": 1 / 16},
]


def sweep_report(
    path: str = "runs/digits",
    budgets: tuple[float, ...] = (1 / 16, 1 / 4, 1),
    steps: tuple[int, ...] = (5, 10, 20, 40),
    guides: list[dict[str, Any]] = GUIDES,
    scores: tuple[str, ...] = ("fid", "is", "accuracy"),
    timed: bool = True,
    seed: int = 0,
    eflops: float | None = 0.0012,
) -> dict[str, Any]:
    """A row for each budget, number of steps and guide."""
    draw = random.Random(seed)
    rows = [
        _row(draw, budget, count, guide, scores, timed)
        for budget in budgets
        for count in steps
        for guide in guides
    ]
    network = {"name": "classifier", "weights": "sha256:77aa", "preprocessing": "16 px, grey"}
    return {
        "format": 1,
        "model": {
            "path": path, "class": "DiT", "weights": f"ab12{seed}", "parameters": 428_000,
            "elastic": len(budgets) > 1, "max_latents": 16 if len(budgets) > 1 else None,
            "training": None if eflops is None else {"steps": 1600, "eflops": eflops},
        },
        "settings": {
            "samples": 1000, "seed": 0, "drawn": "classes, balanced",
            "sampler": "FlowMatchEulerDiscreteScheduler", "dtype": "float32", "batch_size": 32,
            "size": [16, 16], "eight_bit": True, "vae": None, "networks": [network],
            "reference": {"name": "digits train", "digest": "c0ffee", "images": 1500},
            "device": "cpu", "device_name": "a processor",
            "versions": {"elit": "0.1.0", "torch": "2.13.0"},
        },
        "ranked_by": scores[0], "lower_is_better": SCORES[scores[0]].lower_is_better,
        "rows": rows,
    }  # fmt: skip


def _row(draw, budget, steps, guide, scores, timed) -> dict[str, Any]:
    second = {"none": 0.0, "cfg": budget}.get(guide["guidance"], guide["guide_budget"])
    flops = 0.045 * steps * (0.3 + 0.7 * budget + (0 if second == 0 else 0.3 + 0.7 * second))
    scale = guide["scale"] or 1.0
    gap = 60 / steps + 14 * (1 - budget) ** 2 + 6 * (scale - 2.2) ** 2 + draw.uniform(0, 2)
    made = {
        "is": 9.5 - gap / 12, "accuracy": 1 / (1 + math.exp(gap / 15 - 4)),
        "precision": 0.9 - gap / 120, "recall": 0.8 - gap / 150 - 0.05 * scale,
        "kid": gap / 4000 - 0.002, "density": 1.1 - gap / 90, "coverage": 0.95 - gap / 90,
        "clip": 31 - gap / 9,
    }  # fmt: skip
    return {
        "budget": budget, "num_latents": max(1, round(16 * budget)), "steps": steps,
        "sampler": "FlowMatchEulerDiscreteScheduler", "interval": None, **copy.deepcopy(guide),
        "calls": steps * (1 if second == 0 else 2), "gflops_per_image": flops,
        "ms_per_image": 9 * flops + 4 + draw.uniform(0, 1) if timed else None,
        "scores": {name: made.get(name, 2 + gap) for name in scores},
        "front_flops": False, "front_ms": False,
    }  # fmt: skip
