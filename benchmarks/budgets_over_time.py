"""What each way to spend a share of full budget's FLOPs loses: distance, and error at the end.

    for run in runs/a runs/b runs/c; do
        elit schedule $run
        elit sweep $run --search --scale 2 --max-gflops 1.02 0.61  # shares of the full budget's
    done
    python benchmarks/budgets_over_time.py runs/a runs/b runs/c --out results

Runs of one config differ by their seeds: a row has the mean over them and its standard error. Every
way draws the same labels from the same noise. The distance is the Frechet distance of a small
classifier's features to those of held-out pictures; "loses" compares it with full budget's, run by
run. The trajectory error is the mean square by which samples differ from those of full budget with
four times the steps, over the latter's own mean square. FLOPs are of a picture, guide included:
with a cache those that PyTorch counted, else by formulas.

Every result is kept in the folder `--out` and not drawn again, beside `table.md` and `chart.png`.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elit import CFG, load_pipeline, load_schedule
from elit._files import digest_of, write_json
from elit.caching.calibration import calibrate_cache
from elit.choosing.points import OperatingPoint
from elit.choosing.sweep_file import SWEEP_FILE, default_home, read_sweep
from elit.data import load_dataset
from elit.evaluation.frechet import Moments, frechet_distance
from elit.evaluation.images import to_bytes
from elit.evaluation.reference import evenly, image_features
from elit.flow.coarse import coarse_noise, coarse_sigma, refine
from elit.networks.feature_network import load_network
from elit.pipelines.folder import weights_digest
from elit.training.config_files import config_of_run
from elit.viz.charts import GRID, INK

FULL = "full budget"
POOL = "classifier.pool"
REFERENCE = 10_000  # held-out pictures at most
BISECTIONS = 7
FITTED = 25  # pictures on which a cache's threshold is fitted


@dataclass(frozen=True)
class Way:
    """A way to draw."""

    steps: int
    latents: tuple[int, ...] = ()  # of each call; all where there are none
    guides: tuple[int, ...] = ()  # likewise of the guide, 0 for none
    cache: Any = None
    coarse: int = 0  # steps at half the grid


class Bench:
    """One run's model, and what all ways have in common."""

    def __init__(self, run: str, args: argparse.Namespace):
        self.run, self.args = run, args
        self.pipe = load_pipeline(run)
        self.pipe.set_progress_bar_config(disable=True)
        self.schedule, model = load_schedule(run), self.pipe.transformer
        self.most = model.max_latents
        self.guidance = None if args.scale == 1 else CFG(args.scale)
        shape = args.samples, model.in_channels, *model.sample_size
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
        self.labels = [i % model.config.num_classes for i in range(args.samples)]
        config = config_of_run(run)
        assert config is not None
        self.data = config.data.name, config.data.options
        names = "scale", "steps", "samples", "trajectories", "batch_size", "seed"
        self.settings = {name: getattr(args, name) for name in names}
        self.settings["weights"] = weights_digest(Path(run))

    def call(self, noise: Tensor, labels: Sequence[int], **options: Any) -> Tensor:
        """Samples (B, C, h, w)."""
        given = {"guidance": self.guidance, "output_type": "latent"} | options
        return self.pipe(labels, noise=noise, **given).images

    def draw(self, way: Way, noise: Tensor, labels: Sequence[int]) -> Tensor:
        """Samples of a way."""
        if way.coarse:
            return self.from_half_grid(way, noise, labels)
        options: dict[str, Any] = {"num_inference_steps": way.steps}
        if way.latents:
            options["budgets_of_steps"] = [n / self.most for n in way.latents]
        if way.guides and self.guidance:
            guides = [n / self.most if n else None for n in way.guides]
            options["guide_budgets_of_steps"] = guides
        return self.call(noise, labels, **options)

    def from_half_grid(self, way: Way, noise: Tensor, labels: Sequence[int]) -> Tensor:
        """Samples whose first steps are at half the grid, by Euler's method."""
        levels = self.pipe.start(way.steps, "cpu")
        coarse = [coarse_sigma(level) for level in levels[: way.coarse + 1]]
        seen = self.pipe.start(1, "cpu", coarse)
        if len(seen) != len(coarse) or not np.allclose(seen, coarse):
            raise ValueError("half the grid is drawn by Euler's method, on levels without a shift")
        states = [coarse_noise(noise)]

        def keep(_pipe: Any, _step: int, _timestep: Any, given: dict) -> dict:
            states.append(given["samples"])
            return {}

        height, width = (side // 2 for side in self.pipe.pixel_size())
        clean = self.call(  # the last step goes to the data that it predicts
            states[0], labels, sigmas=coarse[:-1], height=height, width=width,
            callback_on_step_end=keep,
        )  # fmt: skip
        samples = torch.lerp(clean, states[-2], coarse[-1] / coarse[-2])
        start = refine(samples, clean, levels[way.coarse], noise)
        return self.call(start, labels, sigmas=levels[way.coarse :])

    def flops(self, way: Way) -> float:
        """Of a picture, without a cache."""
        guided = self.guidance is not None
        full, calls = [self.most] * way.steps, len(self.pipe.start(way.steps, "cpu"))
        latents = way.latents or full * (calls // way.steps)
        guides = way.guides or (latents if guided else ())
        cost = self.pipe.forward_cost()
        if way.coarse:
            height, width = (side // 2 for side in self.pipe.pixel_size())
            half = self.pipe.forward_cost(height=height, width=width).flops()
            rest = cost.flops() * (way.steps - way.coarse)
            return (1 + guided) * (half * way.coarse + rest)
        return float(sum(cost.flops(n) for n in (*latents, *guides) if n))

    @cached_property
    def whole(self) -> float:
        """FLOPs of a picture at full budget."""
        return self.flops(Way(self.args.steps))

    def batches(self, count: int) -> Iterator[tuple[Tensor, list[int]]]:
        """Noise and labels of the first samples."""
        for part in torch.arange(count).split(self.args.batch_size):
            yield self.noise[part], [self.labels[i] for i in part.tolist()]

    def samples(self, way: Way, count: int) -> tuple[Tensor, float]:
        """Samples (N, C, h, w), and FLOPs of each."""
        if way.cache is None:
            drawn = [self.draw(way, *batch) for batch in self.batches(count)]
            return torch.cat(drawn), self.flops(way)
        model = self.pipe.transformer
        # As products: the counter misses what attention has of its own on a CPU.
        with (
            model.cached(way.cache), FlopCounterMode(display=False) as counter,
            sdpa_kernel(SDPBackend.MATH),
        ):  # fmt: skip
            drawn = [self.draw(way, *batch) for batch in self.batches(count)]
        return torch.cat(drawn), counter.get_total_flops() / count

    @cached_property
    def long(self) -> Tensor:
        """Samples of full budget with four times the steps."""
        file = Path(self.args.out) / f"long-{digest_of(self.settings)[:12]}.pt"
        if not file.exists():
            samples, _ = self.samples(Way(4 * self.args.steps), self.args.trajectories)
            torch.save(samples, file)
        return torch.load(file, weights_only=True)

    @cached_property
    def judge(self) -> tuple[Any, Moments]:
        """A classifier of the training pictures, and moments of held-out ones by its features."""
        name, options = self.data
        network = load_network("classifier", dataset=load_dataset(name, "train", **options))
        held_out, moments = load_dataset(name, "validation", **options), Moments()
        for part in evenly(len(held_out), REFERENCE).split(500):
            images = held_out.on_device(held_out.batch(part.tolist())["images"])
            moments.update(image_features(network, to_bytes((images + 1) / 2))[POOL])
        return network, moments

    def measure(self, way: Way) -> dict[str, float]:
        """Distance, trajectory error and FLOPs of a way."""
        samples, flops = self.samples(way, self.args.samples)
        (network, real), moments = self.judge, Moments()
        for part in samples.split(500):
            pictures = to_bytes(self.pipe.decode(part, "pt"))
            moments.update(image_features(network, pictures)[POOL])
        pairs = (moments.mean, moments.covariance), (real.mean, real.covariance)
        first = samples[: self.args.trajectories]
        error = float((first - self.long).square().mean() / self.long.square().mean())
        return {
            "frechet": frechet_distance(*pairs[0], *pairs[1]),
            "error": error,
            "flops": flops,
            "share": flops / self.whole,
        }

    def result(self, name: str, share: float, make: Callable[[], Way | None]) -> dict | None:
        """What is known of a way at a share of the FLOPs, or found now; None if there is none."""
        about = {**self.settings, "name": name, "at": share}
        file = Path(self.args.out) / f"{Path(self.run).name}-{digest_of(about)[:12]}.json"
        if not file.exists():
            way = make()
            if way is None:
                return None
            write_json(file, {**about, **self.measure(way)})
        return json.loads(file.read_text()) | {"run": self.run}


# ---- ways to spend a share of full budget's FLOPs; None where there is none ----


def fewer_steps(bench: Bench, share: float) -> Way | None:
    """Full budget in as many steps as the share pays for."""
    return Way(max(1, int(share * bench.args.steps + 1e-9)))


def guided_early(bench: Bench, share: float) -> Way | None:
    """Full budget in as many steps, with a guide above sigma 1/2 alone: what plans may do too."""
    each = []
    for steps in range(1, 2 * bench.args.steps):
        levels = bench.pipe.start(steps, "cpu")
        guides = [bench.most if level > 0.5 else 0 for level in levels]
        each.append(Way(steps, (bench.most,) * len(levels), tuple(guides)))
    within = [way for way in each if bench.flops(way) <= share * bench.whole * (1 + 1e-9)]
    return within[-1] if within and bench.guidance else None


def constant(bench: Bench, share: float) -> Way | None:
    """The largest budget, of all steps."""
    steps = bench.args.steps
    calls = len(bench.pipe.start(steps, "cpu"))
    each = [Way(steps, (n,) * calls) for n in range(1, bench.most + 1)]
    return max(
        (way for way in each if bench.flops(way) <= share * bench.whole),
        key=bench.flops, default=None,
    )  # fmt: skip


def planned(by: Any, part: float = 1.0) -> Callable[[Bench, float], Way | None]:
    """A plan for a part of the steps."""

    def make(bench: Bench, share: float) -> Way | None:
        steps = round(part * bench.args.steps)
        cap = share * bench.whole
        try:
            plan = bench.schedule.plan(bench.pipe, cap, None, bench.guidance, steps, by=by)
        except ValueError:  # below the cheapest
            return None
        return Way(steps, plan.latents, plan.guides)

    return make


def from_half(part: float) -> Callable[[Bench, float], Way | None]:
    """Half the grid for a part of the steps, of which there are as many as the share pays for."""

    def make(bench: Bench, share: float) -> Way | None:
        each = [Way(n, coarse=round(part * n)) for n in range(2, 4 * bench.args.steps)]
        within = [
            way for way in each
            if 0 < way.coarse < way.steps and bench.flops(way) <= share * bench.whole
        ]  # fmt: skip
        return max(within, key=lambda way: way.steps, default=None)

    return make


def cached(kind: str, budgets: bool = False) -> Callable[[Bench, float], Way | None]:
    """A cache whose threshold is fitted; of derived budgets, each saves as large a factor."""

    def make(bench: Bench, share: float) -> Way | None:
        way: Way | None = Way(bench.args.steps)
        if budgets:
            way = planned("errors")(bench, share**0.5)
        if way is None:
            return None
        return fitted(bench, way, cache_of(kind, bench, way), share)

    return make


def cache_of(kind: str, bench: Bench, way: Way) -> Callable[[float], Any]:
    """A cache of a threshold, calibrated on other noise where it has to be."""
    if kind == "FirstBlockCache":
        return FirstBlockCacheConfig
    noise = torch.randn(20, *bench.noise.shape[1:], generator=torch.Generator().manual_seed(10_000))
    labels = bench.labels[:20]
    model = bench.pipe.transformer
    return calibrate_cache(model, lambda: bench.draw(way, noise[: len(labels)], labels)).teacache


def fitted(bench: Bench, way: Way, make: Callable[[float], Any], share: float) -> Way | None:
    """The lowest threshold whose FLOPs of a few pictures are within the share."""
    low, high, best = -7.0, 3.0, None  # powers of e
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tried = replace(way, cache=make(math.exp(middle)))
        _, flops = bench.samples(tried, FITTED)
        if flops <= share * bench.whole:
            high, best = middle, tried
        else:
            low = middle
    return best


def searched(bench: Bench, share: float) -> Way | None:
    """What `elit sweep RUN --search --scale S --max-gflops G` found for these FLOPs, if it ran."""
    file = default_home(bench.run) / SWEEP_FILE
    model, scale = bench.pipe.transformer, bench.guidance and bench.guidance.scale
    for row in read_sweep(file)["rows"] if file.exists() else []:
        point = OperatingPoint.from_dict(row)
        caps = [one.get("max_flops", 0) for one in row.get("searches") or () if one.get("best")]
        is_near = any(abs(cap / (share * bench.whole) - 1) < 0.01 for cap in caps)
        if is_near and point.scale == scale:
            own = point.budgets_of_steps or (point.budget,) * point.steps
            guides = point.guide_budgets_of_steps or own
            numbers = [[(b and model.resolve_budget(b)) or 0 for b in one] for one in (own, guides)]
            return Way(point.steps, *map(tuple, numbers), point.cache and point.cache.config())
    return None


def ways_at(share: float) -> dict[str, Callable[[Bench, float], Way | None]]:
    """Ways by their names."""
    parts = [p for p in (1.5, 1, 0.75, 0.6, 0.45) if 1.15 * share < p <= max(1, 1.5 * share)]
    derived = {
        "derived" if p == 1 else f"derived, {p:.0%} of the steps": planned("errors", p)
        for p in parts
    }
    early = {"steps guided above sigma 0.5": guided_early}
    if share == 1:  # others are full budget there
        return {FULL: fewer_steps, **early, **derived}
    halves = {f"half the grid for {p:.0%} of the steps": from_half(p) for p in (0.25, 0.5, 0.75)}
    caches = {
        kind + " with derived budgets" * both: cached(kind, both)
        for kind in ("FirstBlockCache", "TeaCache")
        for both in (False, True)
    }
    return {
        "constant budget": constant, "fewer steps": fewer_steps, **early,
        "spectral": planned("spectrum"), **derived, **halves, **caches, "searched": searched,
    }  # fmt: skip


# ---- what was found, over the runs ----


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, 0 of one value."""
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), spread


def summary(rows: Sequence[dict], runs: Sequence[str]) -> list[dict]:
    """A row for each way and share that all runs have."""
    full = {row["run"]: row["frechet"] for row in rows if row["name"] == FULL}
    found = []
    for at, name in dict.fromkeys((row["at"], row["name"]) for row in rows):
        mine = [row for row in rows if (row["at"], row["name"]) == (at, name)]
        if len(mine) < len(runs):
            continue
        values = {key: mean([row[key] for row in mine]) for key in ("frechet", "error")}
        values["loses"] = mean([row["frechet"] / full[row["run"]] - 1 for row in mine])
        sizes = {key: mean([row[key] for row in mine])[0] for key in ("share", "flops")}
        found.append({"at": at, "name": name, **values, **sizes})
    return found


def table(rows: Sequence[dict], runs: Sequence[str]) -> str:
    """Markdown."""

    def cell(pair: tuple[float, float], form: str) -> str:
        return f"{pair[0]:{form}}" + (f" ± {pair[1]:{form}}" if len(runs) > 1 else "")

    lines = [
        "| at | way | FLOPs | GFLOPs | Frechet distance | loses | trajectory error |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['at']:.0%} | {row['name']} | {row['share']:.1%} | {row['flops'] / 1e9:.3f} | "
        f"{cell(row['frechet'], '.3f')} | {cell(row['loses'], '.1%')} | "
        f"{cell(row['error'], '.2%')} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def chart(rows: Sequence[dict]) -> Figure:
    """Both scores of each way, a column for each, the best ways of each share on top."""
    (full,) = [row for row in rows if row["name"] == FULL]
    shares = [at for at in dict.fromkeys(row["at"] for row in rows) if at < 1]
    each = [sorted((r for r in rows if r["at"] == at), key=lambda r: r["frechet"]) for at in shares]
    heights = [len(mine) for mine in each]
    figure = Figure((9.0, 0.24 * sum(heights) + 0.75 * len(shares) + 0.4), layout="constrained")
    axes = figure.subplots(len(shares), 2, sharex="col", sharey="row", squeeze=False,
                           height_ratios=heights)  # fmt: skip
    scores = {"frechet": "Frechet distance", "error": "trajectory error"}
    for row, mine, at in zip(axes, each, shares, strict=True):
        row[0].set_yticks(range(len(mine)), [one["name"] for one in mine])
        row[0].set_ylim(len(mine) - 0.5, -0.5)
        for axis, (key, title) in zip(row, scores.items(), strict=True):
            values, errors = zip(*(one[key] for one in mine), strict=True)
            axis.errorbar(values, range(len(mine)), xerr=errors, fmt="o", markersize=4, capsize=2)
            axis.axvline(full[key][0], linestyle="--", linewidth=1, color=INK)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(axis="both", color=GRID)
            axis.set_title(f"{title}, within {at:.0%} of the FLOPs", loc="left", fontsize=9)
            if at == shares[-1]:
                axis.set_xlabel("log scale; bars: standard errors")
    figure.suptitle(
        "Ways to spend a share of full budget's FLOPs, the best on top; left of the dashed line "
        "is better than full budget", fontsize=9, ha="left", x=0.01,
    )  # fmt: skip
    return figure


def main() -> None:
    """Measure what is not known yet; write the table and the chart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+")
    add("--out", default="budgets-over-time")
    add("--scale", type=float, default=2.0)
    add("--steps", type=int, default=20)
    add("--samples", type=int, default=1000)
    add("--trajectories", type=int, default=200, help="samples whose trajectory error is taken")
    add("--batch-size", type=int, default=100)
    add("--shares", type=float, nargs="+", default=[1, 0.5, 0.3])
    add("--only", nargs="+", default=[""], metavar="WAY", help="ways whose names begin so")
    add("--seed", type=int, default=5000)
    add("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    rows = []
    for run in args.runs:
        bench = Bench(run, args)
        for share in args.shares:
            for name, make in ways_at(share).items():
                if not name.startswith((FULL, *args.only)):
                    continue
                row = bench.result(name, share, lambda m=make, s=share, b=bench: m(b, s))
                if row is not None:
                    rows.append(row)
                    print(
                        f"{run}, {share:.0%}, {name}: {row['share']:.1%} of the FLOPs, distance "
                        f"{row['frechet']:.3f}, error {row['error']:.2%}", flush=True
                    )  # fmt: skip
    found = summary(rows, args.runs)
    (Path(args.out) / "table.md").write_text(table(found, args.runs))
    if any(row["at"] < 1 for row in found):
        chart(found).savefig(Path(args.out) / "chart.png", dpi=110)
    print(table(found, args.runs))


if __name__ == "__main__":
    main()
