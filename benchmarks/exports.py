"""What exported models weigh, how far they are off, and their times beside eager and compiled.

python benchmarks/exports.py --models elit-dit-tiny/2 elit-dit-s/2
python benchmarks/exports.py --models elit-uvit-tiny/2 sit-tiny/2 --formats torch-export onnx
python benchmarks/exports.py --models elit-dit-s/2 --formats --compile blocks

"compiled" is the whole model with free lengths, "blocks" the blocks alone, for each of the lengths
that there are.
"""

import argparse
import copy
import os
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from elit import ElitPipeline, ElitTextPipeline, create_model, make_scheduler
from elit._tables import format_table
from elit.exporting.export import VelocityOf, compare, export
from elit.exporting.formats import SUFFIXES
from elit.interface.budget import format_budget

COLUMNS = ("model", "form", "MB", "s to make", "difference")
SHOWN = [(batch, kept) for batch in (1, 5) for kept in (1.0, 0.25, 0.0625)]


def random_pipeline(name: str) -> ElitPipeline | ElitTextPipeline:
    """A model with no closed gates."""
    model = create_model(name).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    kind = ElitTextPipeline if model.takes_text else ElitPipeline
    return kind(model, make_scheduler("euler"))


def compiled(velocity: VelocityOf, what: str) -> VelocityOf:
    """A model that is compiled at its first calls."""
    if what == "whole":
        return torch.compile(velocity, dynamic=True)
    torch._dynamo.config.recompile_limit = 64
    model = copy.deepcopy(velocity.model)
    model.compile_repeated_blocks(dynamic=False, fullgraph=True)
    return VelocityOf(model, velocity.size)


def main() -> None:
    """Print a row for each model and form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["elit-dit-tiny/2"])
    parser.add_argument("--formats", nargs="*", default=[*SUFFIXES], choices=[*SUFFIXES])
    parser.add_argument("--compile", nargs="*", default=["whole"], choices=["whole", "blocks"])
    args = parser.parse_args()
    print(
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch "
        f"{torch.__version__}; ms by batch and budget"
    )
    rows = []
    for name in args.models:
        pipeline = random_pipeline(name)
        velocity = VelocityOf(pipeline.transformer, pipeline.transformer.sample_size)
        for what in args.compile:
            start = time.perf_counter()
            checks = compare(velocity, compiled(velocity, what))
            took = time.perf_counter() - start
            rows.append(_row(name, "eager", "", "", checks, "eager_ms") | {"difference": ""})
            form = {"whole": "compiled", "blocks": "blocks"}[what]
            rows.append(_row(name, form, "", f"{took:.0f}", checks))
        for form in args.formats:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                found = export(pipeline, form, Path(folder))
                took = time.perf_counter() - start
            megabytes = f"{found['bytes'] / 1e6:.1f}"
            rows.append(_row(name, form, megabytes, f"{took:.0f}", found["checks"]))
    names = list(dict.fromkeys(key for row in rows for key in row))
    print(format_table(names, [[row.get(key, "") for key in names] for row in rows]))


def _row(
    name: str, form: str, megabytes: str, seconds: str, checks: list, which: str = "ms"
) -> dict[str, str]:
    worst = max(row["difference"] for row in checks)
    cells = dict(zip(COLUMNS, (name, form, megabytes, seconds, f"{worst:.0e}"), strict=True))
    for row in checks:
        if (row["batch"], row["budget"]) in SHOWN:
            cells[f"{row['batch']} x {format_budget(row['budget'])}"] = f"{row[which]:.1f}"
    return cells


if __name__ == "__main__":
    main()
