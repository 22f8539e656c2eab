"""What the parts of a recipe are worth, alone and together, for a plain DiT and ELIT-MB.

    python benchmarks/recipe.py --data data/fashion-mnist --out runs/recipe

Fashion-MNIST, width 128, 10 blocks (ELIT 2-6-2), as `elit reproduce --scale small` trains them. All
trainings of a seed take the FLOPs of the plain base's, what Muon and projectors add counted in.

The loss is that of the velocity at the base's noise levels, of the same pictures and noise for all.
The distance is Frechet's, by a classifier of another seed than the one that REPA aligns with. "To
its loss" and, with --curves, "to its distance" are the shares of a training after which it is where
the base ends. Each training is a JSON file in --out: the same command goes on where it was stopped,
another beside it takes others.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from elit._files import locked, write_json
from elit._plain import from_plain
from elit.choosing.points import OperatingPoint
from elit.cost.flops import cost_of, mean_flops
from elit.data import ImageDataset
from elit.evaluation.drawing import Drawing
from elit.evaluation.frechet import Moments, frechet_distance
from elit.flow.schedulers import make_scheduler
from elit.interface.budget import format_budget
from elit.layers.transformer import Rotary, TransformerBlock
from elit.models.dit import DiT
from elit.networks.classifier import ClassifierFeatures, fit_network
from elit.networks.feature_maps import load_feature_maps
from elit.networks.feature_network import FeatureNetwork
from elit.pipelines.elit_pipeline import ElitPipeline
from elit.reproduce.measure import Bench
from elit.reproduce.runs import Training, Trainings
from elit.reproduce.scales import SCALES
from elit.training.alignment import Projector
from elit.training.build import build_model, tail_dropping
from elit.training.config import DataConfig, TrainConfig
from elit.training.loop import train
from elit.training.muon import step_flops as muon_flops

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "muon": {"optimizer.name": "muon"},
    "muon, equal steps": {"optimizer.name": "muon"},
    "swiglu": {},
    "shift 2": {"objective.shift": 2.0},
    "shift 0.5": {"objective.shift": 0.5},
    "base, drawn at shift 2": {},
    "x-prediction": {"objective.prediction_type": "sample"},
    "repa tokens": {"alignment.weight": 0.5, "alignment.encoder": "classifier"},
    "irepa tokens": {
        "alignment.weight": 0.5, "alignment.encoder": "classifier", "alignment.kind": "irepa",
    },
    "repa latents": {
        "alignment.weight": 0.5, "alignment.encoder": "classifier", "alignment.where": "latents",
    },
    "muon, irepa tokens": {
        "optimizer.name": "muon", "alignment.weight": 0.5, "alignment.encoder": "classifier",
        "alignment.kind": "irepa",
    },
    "shift 2, irepa tokens": {
        "objective.shift": 2.0, "alignment.weight": 0.5, "alignment.encoder": "classifier",
        "alignment.kind": "irepa",
    },
    "muon, shift 2, irepa tokens": {
        "optimizer.name": "muon", "objective.shift": 2.0, "alignment.weight": 0.5,
        "alignment.encoder": "classifier", "alignment.kind": "irepa",
    },
}  # fmt: skip
MODELS = {"dit": [1.0], "elit-mb": [1.0, 1 / 8]}  # and the budgets that are measured
POINTS = 6  # of a curve of loss
TITLES = {"losses": "loss", "frechet": "distance"}  # of what is measured at a budget
JUDGE = 1  # seed of the classifier that judges


# ---- a block of language models ----


def rms_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise x (B, N, D) without taking its mean off, then scale and shift it."""
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class SwiGLU(nn.Module):
    """A gated MLP with the parameters of an MLP of so many times the width."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        hidden = round(ratio * dim * 2 / 3)
        self.gate, self.up = (nn.Linear(dim, hidden) for _ in range(2))
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GatedBlock(TransformerBlock):
    """A block with RMS norms and SwiGLU."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__(dim, num_heads, mlp_ratio)
        self.mlp = SwiGLU(dim, mlp_ratio)  # type: ignore[assignment]

    def forward(self, hidden_states: Tensor, condition: Tensor, rotary: Rotary | None) -> Tensor:
        x = hidden_states
        attention, mlp = self.modulation(condition)
        update = self.attention(rms_modulate(x, attention.shift, attention.scale), rotary)
        x = torch.addcmul(x, attention.gate, update)
        return torch.addcmul(x, mlp.gate, self.mlp(rms_modulate(x, mlp.shift, mlp.scale)))


class GatedDiT(DiT):
    """A DiT, plain or elastic, of such blocks."""

    _repeated_blocks = ["GatedBlock"]

    def block_class(self, _: int) -> type[TransformerBlock]:  # type: ignore[override]
        return GatedBlock


def build_gated(
    config: TrainConfig, dataset: ImageDataset, of_texts: Mapping[str, Any] | None = None
) -> GatedDiT:
    """What `build_model` makes, of such blocks."""
    with torch.device("meta"):
        arguments = dict(build_model(config, dataset, of_texts).config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GatedDiT.from_config(arguments)


# ---- trainings ----


class Judge(Bench):
    """Measures by the eyes of a classifier that no training has seen."""

    @cached_property
    def network(self) -> FeatureNetwork:
        network = super().network
        module = ClassifierFeatures(fit_network(self.trainings.dataset, seed=JUDGE, keep=True))
        return replace(network, module=module.eval())


@dataclass(frozen=True)
class Case:
    """A training of the table."""

    model: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.variant.replace(',', '').replace(' ', '-')}-seed{self.seed}"

    @property
    def is_gated(self) -> bool:
        return "swiglu" in self.variant

    @property
    def model_class(self) -> Any:
        return GatedDiT if self.is_gated else DiT


class Recipe:
    """Trains and measures cases."""

    def __init__(self, args: argparse.Namespace):
        size = SCALES["small"].sizes[1]
        lr, steps = args.lr or size.lr, args.steps
        self.size = replace(size, steps=steps, lr=lr)
        scale = replace(SCALES["small"], sizes=(self.size,), images=args.images)
        self.args, self.folder = args, args.out
        data = DataConfig("fashion-mnist", {"path": str(args.data)})
        self.trainings = Trainings(scale, self.folder, data)
        self.judge = Judge(self.trainings)

    def config(self, case: Case, steps: int = 1) -> TrainConfig:
        """The config of a case."""
        training = Training(case.name, case.model, self.size, case.seed, steps, 0)
        tree = self.trainings.config(training).to_dict()
        for key, value in VARIANTS[case.variant].items():
            section, _, name = key.partition(".")
            tree[section][name] = value
        tree["train"] |= {
            "validate_every": 0, "checkpoint_every": -(-steps // POINTS), "log_every": 10,
            "keep_checkpoints": POINTS + 1,
        }  # fmt: skip
        return from_plain(TrainConfig, tree)

    def step_flops(self, case: Case) -> float:
        """FLOPs of an optimiser step: forward, backward, the projector's, and what Muon does."""
        config = self.config(case)
        with torch.device("meta"):
            make = build_gated if case.is_gated else build_model
            model = make(config, self.trainings.dataset, {})
        samples = config.data.batch_size
        dropping = tail_dropping(config, model)
        flops = 3 * samples * mean_flops(cost_of(model), dropping)
        if config.alignment.weight:
            cells = self.trainings.scale.tokens**2
            if config.alignment.where == "latents" and dropping is not None:
                share = (dropping.min_latents + dropping.max_latents) / 2 / dropping.max_latents
                cells = round(share * cells)
            is_spatial = config.alignment.kind == "irepa"
            projector = Projector(self.size.hidden_size, self.channels, is_spatial)
            flops += 3 * samples * 2 * cells * sum(p.numel() for p in projector.parameters())
        return flops + (muon_flops(model) if config.optimizer.name == "muon" else 0)

    @cached_property
    def channels(self) -> int:
        """Of the features that hidden states are aligned with."""
        dataset = self.trainings.dataset
        return load_feature_maps("classifier", torch.device("cpu"), dataset).about.shape[0]

    def steps(self, case: Case) -> int:
        """Steps that cost what the plain base's cost."""
        if "equal steps" in case.variant:
            return self.steps(replace(case, variant="base"))
        base = self.args.steps * self.step_flops(Case("dit", "base", 0))
        return round(base / self.step_flops(case))

    def do(self, case: Case) -> None:
        """Train and measure a case, and write its result."""
        steps = self.steps(case)
        config = self.config(case, steps)
        make_model = build_gated if case.is_gated else None
        started = time.process_time()
        done = train(config, progress=False, make_model=make_model)
        if not done.finished:
            raise SystemExit("stopped; the same command goes on")
        trained = time.process_time()
        model = case.model_class.from_pretrained(done.folder / "transformer", use_safetensors=True)
        shift = 2.0 if "drawn at" in case.variant else config.objective.shift
        kept = [model.resolve_budget(budget) for budget in MODELS[case.model]]
        pipeline = ElitPipeline(model, make_scheduler("euler", shift))
        drawn = {
            format_budget(budget): self.draw(pipeline, budget) for budget in MODELS[case.model]
        }
        losses = self.judge.losses(model, [{"num_latents": n} for n in kept])
        names = map(format_budget, MODELS[case.model])
        result = {
            "model": case.model, "variant": case.variant, "seed": case.seed, "steps": steps,
            "step_flops": self.step_flops(case), "lr": config.optimizer.lr,
            "losses": {n: float(x.double().mean()) for n, x in zip(names, losses, strict=True)},
            "frechet": drawn, "curve": self.curve(pipeline, done.folder, kept[0]),
            "seconds": trained - started, "measuring": time.process_time() - trained,
        }  # fmt: skip
        write_json(self.folder / f"{case.name}.json", result)
        shutil.rmtree(done.folder)

    def draw(self, pipeline: ElitPipeline, budget: float) -> dict[str, float]:
        """Distance of samples at a budget, and the share in which the classifier sees the label."""
        pipeline.set_progress_bar_config(disable=True)
        count, point = self.args.samples, OperatingPoint(budget, self.args.sampling_steps)
        seen = Drawing(pipeline, [self.judge.network], count, batch_size=128).draw(
            point, range(count)
        )
        moments = Moments()
        moments.update(seen["classifier.pool"])
        real, _ = self.judge.reference
        distance = frechet_distance(moments.mean, moments.covariance, real.mean, real.covariance)
        right = (seen["classifier.logits"].argmax(1) == seen["labels"]).double().mean()
        return {"distance": distance, "accuracy": float(right)}

    def curve(
        self, pipeline: ElitPipeline, folder: Path, kept: int | None
    ) -> list[tuple[float, ...]]:
        """Loss, and distance if asked for, of the averaged weights after some steps."""
        model, points = pipeline.transformer, []
        for checkpoint in sorted((folder / "checkpoints").glob("step-*")):
            tensors: dict[str, Tensor] = {}
            for file in checkpoint.glob("*.safetensors"):
                tensors |= load_file(file)
            own = {name: tensors[f"ema.{name}"] for name, _ in model.named_parameters()}
            model.load_state_dict(own)
            (loss,) = self.judge.losses(model, [{"num_latents": kept}])
            drawn = [self.draw(pipeline, 1.0)["distance"]] if self.args.curves else []
            step = int(checkpoint.name.removeprefix("step-"))
            points.append((step, float(loss.mean()), *drawn))
        return points


# ---- the table ----


def share_to(curve: Iterable[tuple[float, float]], goal: float) -> float:
    """Share of a training after which a value is `goal`, by lines between points; or inf."""
    points = list(curve)
    before = None
    for step, value in points:
        if value <= goal:
            if before is None:
                return step / points[-1][0]
            part = (before[1] - goal) / (before[1] - value)
            return (before[0] + part * (step - before[0])) / points[-1][0]
        before = step, value
    return math.inf


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; of one value NaN."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / len(x) ** 0.5) if len(x) > 1 else math.nan


def cell(values: list[float], form: str) -> str:
    """Mean and standard error in words."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "never" if values else ""
    mean, error = mean_and_error(finite)
    words = f"{mean:{form}}" + ("" if math.isnan(error) else f" ± {abs(error):{form.strip('+')}}")
    return words + (f" ({len(finite)} of {len(values)})" if len(finite) < len(values) else "")


def print_table(folder: Path) -> None:
    """Tables of all results: means, and changes against the base of the same seeds."""
    results = {}
    for file in sorted(folder.glob("*.json")):
        found = json.loads(file.read_text())
        results[found["model"], found["variant"], found["seed"]] = found
    for model, budgets in MODELS.items():
        measures = [(m, format_budget(b)) for m in ("losses", "frechet") for b in budgets]
        head = [model, "seeds", "steps", *(f"{TITLES[m]}, {b}" for m, b in measures)]
        head += ["to its loss", "to its distance"]
        print(f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
        for variant in VARIANTS:
            own = [x for (m, v, _), x in results.items() if (m, v) == (model, variant)]
            if not own:
                continue
            pairs = [
                (x, results[key]) for x in own if (key := (model, "base", x["seed"])) in results
            ]
            words = [variant, str(len(own)), str(own[0]["steps"])]
            for measure, budget in measures:
                read = partial(_read, measure=measure, budget=budget)
                word = cell(list(map(read, own)), ".4f" if measure == "losses" else ".2f")
                if variant != "base" and pairs:
                    changes = [100 * (read(x) / read(base) - 1) for x, base in pairs]
                    word += f" ({cell(changes, '+.1f')} %)"
                words.append(word)
            losses = [
                share_to(((s, loss) for s, loss, *_ in x["curve"]), base["curve"][-1][1])
                for x, base in pairs
            ]
            distances = [
                share_to(((s, far) for s, _, far in x["curve"]), base["frechet"]["1"]["distance"])
                for x, base in pairs if len(x["curve"][0]) == 3
            ]  # fmt: skip
            print(f"| {' | '.join([*words, cell(losses, '.2f'), cell(distances, '.2f')])} |")
        print()


def _read(result: Mapping[str, Any], measure: str, budget: str) -> float:
    value = result[measure][budget]
    return value["distance"] if isinstance(value, dict) else value


def main() -> None:
    """Do what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/fashion-mnist"), help="folder of the idx files")
    add("--out", type=Path, default=Path("runs/recipe"), help="folder of the results")
    add("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    add("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=240, help="of the plain base")
    add("--lr", type=float, help="learning rate, in place of the study's")
    add("--samples", type=int, default=500, help="drawn at each budget")
    add("--sampling-steps", type=int, default=12)
    add("--images", type=int, default=512, help="held-out ones whose loss is measured")
    add("--curves", action="store_true", help="distances along each training too")
    add("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.table:
        recipe = Recipe(args)
        for seed in args.seeds:
            for variant in args.variants:
                for model in args.models:
                    if variant == "repa latents" and model == "dit":
                        continue
                    case = Case(model, variant, seed)
                    if (args.out / f"{case.name}.json").exists():
                        continue
                    try:
                        with locked(args.out / "locks" / case.name, "taken"):
                            if not (args.out / f"{case.name}.json").exists():
                                recipe.do(case)
                    except ValueError as error:
                        if str(error) != "taken":
                            raise
    print_table(args.out)


if __name__ == "__main__":
    main()
