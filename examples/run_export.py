"""Draw with a file of `elit export`, without elit: numpy, and onnxruntime or torch, are enough.

python examples/run_export.py runs/quickstart/export/transformer.onnx --labels 3 7 --budget 0.25
"""

import argparse
import hashlib
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
    for name, default in {"budget": 1.0, "scale": 1.0, "guide-budget": None}.items():
        parser.add_argument(f"--{name}", type=float, default=default)
    for name, default in {"steps": None, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    about = json.loads(Path(f"{a.file}.json").read_text())
    if hashlib.sha256(Path(a.file).read_bytes()).hexdigest() != about["sha256"]:
        raise SystemExit(f"{a.file} is not the file that {a.file}.json is of; export again")
    if not (0 < a.budget <= 1 and {*a.labels} <= {*range(about["null_label"])}):
        raise SystemExit(f"give a budget in (0, 1], and labels below {about['null_label']}")
    x = (len(a.labels), *about["inputs"][0]["shape"][1:])
    x = np.random.default_rng(a.seed).standard_normal(x, np.float32)
    what, null = ([np.resize(n, len(x))] for n in (a.labels, about["null_label"]))
    settings = a.budget, a.steps, a.scale, a.guide_budget
    np.save(a.out, sample(load(a.file, about), about, x, what, null, *settings))
    print(a.out)
