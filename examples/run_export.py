"""Draw with a file of `elit export`, without elit: numpy, and onnxruntime or torch, are enough.

python examples/run_export.py runs/quickstart/export/transformer.onnx --labels 3 7 --budget 0.25
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np


def load(file, about):
    """The velocity as a function of arrays, in the order of the inputs of the manifest."""
    names = [entry["name"] for entry in about["inputs"]]
    if about["format"] == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file)
        return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]
    import torch

    is_aoti, package = about["format"] == "aoti", torch._inductor
    run = package.aoti_load_package(file) if is_aoti else torch.export.load(file).module()
    types = [getattr(torch, entry["dtype"]) for entry in about["inputs"]]
    return torch.no_grad()(lambda *arrays: run(*(
        torch.tensor(a).to(about["device"], t) for a, t in zip(arrays, types, strict=True)
    )).float().cpu().numpy())  # fmt: skip


def sample(velocity, about, x, what, null, budget=1, steps=None, scale=1, guide_budget=None):
    """Euler from noise x (B, ...); `what` and `null` are the inputs that say what to draw."""
    levels = about["levels"]
    if steps and not np.allclose(levels, np.linspace(1, 0, len(levels))):
        raise ValueError(f"its levels are shifted; run `elit export` with --steps {steps}")
    levels = np.linspace(1, 0, steps + 1).tolist() if steps else levels
    most, budgets = about["max_latents"], (budget, guide_budget or budget)
    kept, of_guide = ([np.arange(max(1, round(b * most)))] if most else [] for b in budgets)
    for sigma, to in pairwise(levels):
        level = np.full(len(x), sigma, np.float32)
        v = velocity(x, level, *what, *kept)
        if scale != 1:
            v += (scale - 1) * (v - velocity(x, level, *null, *of_guide))
        x = x + np.float32(to - sigma) * v
    return x


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--labels", type=int, nargs="+", default=[0], help="classes to draw")
    parser.add_argument("--out", default="samples.npy", help="(B, C, h, w), not yet decoded")
    for name in ("budget", "steps", "scale", "guide-budget", "seed"):
        parser.add_argument(f"--{name}", type=int if name in ("steps", "seed") else float)
    a = parser.parse_args()
    about = json.loads(Path(f"{a.file}.json").read_text())
    x = (len(a.labels), *about["inputs"][0]["shape"][1:])
    x = np.random.default_rng(a.seed or 0).standard_normal(x, np.float32)
    what, null = ([np.resize(n, len(x))] for n in (a.labels, about["null_label"]))
    settings = a.budget or 1, a.steps, a.scale or 1, a.guide_budget
    np.save(a.out, sample(load(a.file, about), about, x, what, null, *settings))
