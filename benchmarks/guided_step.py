"""Time and FLOPs of one guided step: as two forwards, and as pipelines do it.

    OMP_NUM_THREADS=2 python benchmarks/guided_step.py
    python benchmarks/guided_step.py --model elit-dit-tiny/2 --batch-size 1 --rounds 15

"two forwards" are one after the other, guided and guide. "one forward" has both in one batch, of
two budgets with CheapCFG, whose guide is at the lowest. Which of them `elit` takes is the last
column's. Each round times every way once, in an order drawn anew; the table has medians, and ratios
to no guidance. Weights are random.
"""

import argparse
import os
from functools import partial

import torch
from calls import Way, make, medians, timed
from torch import Tensor

from elit import CFG, CheapCFG, ElitPipeline
from elit.flow.guidance import UNGUIDED, Guidance

GUIDANCES = {"none": UNGUIDED, "CFG": CFG(3.0), "CheapCFG": CheapCFG(3.0)}
COLUMNS = ("model", "batch", "guidance", "form", "ms", "time", "FLOPs", "as elit")
Row = tuple[str, str]


class Step:
    """One step of a pipeline's model on the same samples."""

    def __init__(self, pipeline: ElitPipeline, count: int):
        self.pipeline, self.model, self.count = pipeline, pipeline.transformer, count
        device = pipeline.device
        self.x = torch.randn(count, self.model.in_channels, *self.model.sample_size, device=device)
        labels = torch.zeros(count, dtype=torch.long, device=device)
        self.conditions = [{"class_labels": labels + n} for n in (0, pipeline.null_label)]

    def predict(self, x: Tensor, sigma: float, given: dict, num_latents: object) -> Tensor:
        """A forward."""
        level = torch.full((len(x),), sigma, device=x.device)
        return self.model(x, level, **given, num_latents=num_latents, return_dict=False)[0]

    def latents(self, guidance: Guidance) -> tuple:
        """Latents per group of both."""
        return self.pipeline.latents_of_steps(1.0, 1, guidance)[0]

    def as_pipelines_do(self, guidance: Guidance, mixes: bool) -> Tensor:
        """Guided velocity."""
        return guidance.velocity(
            self.predict, self.x, 0.5, *self.conditions, *self.latents(guidance), mixes
        )

    def two_forwards(self, guidance: Guidance) -> Tensor:
        """The same by two calls of the model."""
        both = zip(self.conditions, self.latents(guidance), strict=True)
        guided, guide = (self.predict(self.x, 0.5, given, n) for given, n in both)
        return torch.lerp(guide, guided, float(guidance.scale))

    def ways(self) -> dict[Row, Way]:
        """What to time, by guidance and form."""
        ways: dict[Row, Way] = {
            ("none", "one forward"): partial(self.as_pipelines_do, UNGUIDED, True)
        }
        for name, guidance in list(GUIDANCES.items())[1:]:
            ways[name, "two forwards"] = partial(self.two_forwards, guidance)
            ways[name, "one forward"] = partial(self.as_pipelines_do, guidance, True)
        return ways

    def chosen(self, row: Row) -> bool:
        """Whether pipelines take this form."""
        mixes = self.pipeline.mixes_budgets(2 * self.count, self.model.sample_size)
        one = row[0] != "CheapCFG" or mixes
        return one == (row[1] == "one forward")

    def flops(self, name: str) -> int:
        """Of a sample."""
        guidance, cost = GUIDANCES[name], self.pipeline.forward_cost()
        forwards = guidance.forwards(0.5, *self.latents(guidance))
        return sum(cost.flops(n) * times for n, times in forwards)  # type: ignore[arg-type]


def measure(args: argparse.Namespace, name: str, count: int) -> None:
    """Print the rows of one model and batch size."""
    step = Step(make(name, args.device), count)
    ways = step.ways()
    with torch.no_grad():
        found = {row: way() for row, way in ways.items()}
    for (guidance, form), velocity in found.items():
        if form == "two forwards":
            torch.testing.assert_close(
                velocity, found[guidance, "one forward"], rtol=1e-3, atol=1e-3
            )
    times = medians(ways, lambda row: timed(ways[row], args), args.rounds)
    alone, flops = times["none", "one forward"], step.flops("none")
    for row, ms in times.items():
        numbers = f"{ms:.2f}", f"{ms / alone:.2f}", f"{step.flops(row[0]) / flops:.2f}"
        cells = name, str(count), *row, *numbers, "yes" if step.chosen(row) else ""
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = ["elit-dit-tiny/2", "elit-dit-s/2", "elit-dit-b/2"]
    parser.add_argument("--model", nargs="+", default=models, help="names of elastic presets")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--least", type=float, default=100, help="ms of a round of a way")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{torch.get_num_threads()} threads, load {load:.1f}, torch {torch.__version__}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|---|---:|---|---|---:|---:|---:|---|")
    for name in args.model:
        for count in args.batch_size:
            measure(args, name, count)


if __name__ == "__main__":
    main()
