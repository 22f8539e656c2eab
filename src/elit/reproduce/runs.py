"""The work of a study: which models are trained, how, for how many steps, and what they do then."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from elit._plain import read_json
from elit.choosing.points import OperatingPoint
from elit.cost.flops import cost_of, mean_flops
from elit.cost.formulas import ModelCost
from elit.data import load_dataset
from elit.interface.budget import TailDropping, default_budgets
from elit.models.presets import preset_model
from elit.reproduce.scales import Scale, Size
from elit.reproduce.spread import SpreadDiT, build_spread_model
from elit.training.build import MakeModel, build_model, tail_dropping
from elit.training.config import (
    DataConfig,
    LatentsConfig,
    LoopConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from elit.training.validation import MAX_SAMPLES

SHOWN_BUDGETS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)


@dataclass(frozen=True)
class Variant:
    """A model and how it is trained."""

    title: str  # in tables
    elastic: bool = True  # whether it has a latent interface
    all_budgets: bool = False  # whether each step draws its budget (multi-budget), or all are full
    order: Literal["first", "random"] = "first"  # which latents a step keeps
    group: int = 0  # tokens along a side of a group; 0 is the scale's, -1 the whole picture
    spread: bool = False  # whether pictures are spread among zero tokens
    backbone: str = "dit"  # "dit" or "uvit"
    ladder: bool = False  # whether its loss is measured at lower budgets too

    @property
    def make_model(self) -> MakeModel:
        return build_spread_model if self.spread else build_model

    @property
    def model_class(self) -> type[Any]:
        return SpreadDiT if self.spread else preset_model(f"{self.backbone}-tiny/2")


VARIANTS = {
    "dit": Variant("DiT", elastic=False),
    "elit": Variant("ELIT", ladder=True),
    "elit-mb": Variant("ELIT-MB", all_budgets=True, ladder=True),
    "elit-mb-random": Variant(
        "ELIT-MB, random dropping", all_budgets=True, order="random", ladder=True
    ),
    "elit-1x1": Variant("ELIT, group 1x1", group=1),
    "elit-2x2": Variant("ELIT, group 2x2", group=2),
    "elit-whole": Variant("ELIT, whole picture", group=-1),
    "spread-dit": Variant("DiT, spread", elastic=False, spread=True),
    "spread-elit": Variant("ELIT, spread", spread=True),
    "uvit": Variant("U-ViT", elastic=False, backbone="uvit"),
    "elit-uvit": Variant("ELIT-U-ViT", backbone="uvit", ladder=True),
    "elit-uvit-mb": Variant("ELIT-U-ViT-MB", all_budgets=True, backbone="uvit", ladder=True),
}


@dataclass(frozen=True)
class Training:
    """One training of a study."""

    name: str  # of its folder, without slashes
    variant: str  # key of VARIANTS
    size: Size  # of the model
    seed: int  # of everything random in it
    steps: int  # optimiser steps
    step_flops: float  # of one, mean over the budgets drawn: three forwards of each sample

    @property
    def form(self) -> Variant:
        return VARIANTS[self.variant]

    @property
    def flops(self) -> float:
        return self.steps * self.step_flops

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "size": self.size.name, "flops": self.flops}


@dataclass(frozen=True)
class Piece:
    """A training with its loss, or something measured of its model: done once, told in JSON."""

    key: str  # of its result, a file name without its ending
    training: Training  # that it is, or whose model it measures
    kind: str  # "train", "draw" or "look"
    cost: float  # FLOPs, for the bar
    point: OperatingPoint | None = None  # how to draw

    def file(self, folder: Path) -> Path:
        return folder / "pieces" / f"{self.key}.json"

    def is_ready(self, folder: Path) -> bool:
        """Whether the model that it measures is trained."""
        trained = folder / "pieces" / f"train-{self.training.name}.json"
        return self.kind == "train" or trained.exists()

    def result(self, folder: Path) -> Mapping[str, Any]:
        return read_json(self.file(folder), "remove it, and the same command makes it anew")


class Trainings:
    """Makes the trainings of a study, all of a claim at equal FLOPs, and the pieces of its work."""

    def __init__(self, scale: Scale, folder: Path, data: DataConfig):
        self.scale, self.folder, self.data = scale, folder, data
        self.dataset = load_dataset(data.name, "train", **data.options)
        self.cost: Any = cache(self._cost)

    def training(
        self, variant: str, seed: int, size: Size | None = None, steps: int | None = None
    ) -> Training:
        """A training as costly as the plain model's, or of `steps`; of the first size or `size`."""
        size = size or self.scale.sizes[0]
        cost = self.step_flops(variant, size)
        suffix = "" if steps is None else f"-{steps}-steps"
        if steps is None:
            plain = VARIANTS[variant].backbone
            steps = equal_steps(size.steps, self.step_flops(plain, size), cost)
        name = f"{size.name}-{variant}{suffix}-seed{seed}"
        return Training(name, variant, size, seed, steps, cost)

    def _cost(self, variant: str, size: Size) -> tuple[ModelCost, TailDropping | None]:
        config = self.config(Training("count", variant, size, 0, 1, 0))
        with torch.device("meta"):
            model = VARIANTS[variant].make_model(config, self.dataset, {})
        return cost_of(model), tail_dropping(config, model)

    def step_flops(self, variant: str, size: Size) -> float:
        """FLOPs of a training step, mean over the budgets that it may draw."""
        cost, dropping = self.cost(variant, size)
        return 3 * self.scale.batch_size * mean_flops(cost, dropping)

    def forward_flops(self, variant: str, budget: float) -> int:
        """FLOPs of one forward of one picture, of the scale's first size."""
        cost, _ = self.cost(variant, self.scale.sizes[0])
        return cost.flops(cost.resolve_budget(budget))

    def sampling_flops(self, variant: str, point: OperatingPoint) -> float:
        """FLOPs of one picture, guides included."""
        lowest = 1 / self.scale.group**2
        guide = {"none": [], "cfg": [point.budget]}.get(point.guidance, [lowest])
        return point.steps * sum(self.forward_flops(variant, b) for b in (point.budget, *guide))

    def config(self, training: Training) -> TrainConfig:
        """The config of a training; its folder is in the study's."""
        scale, size, variant = self.scale, training.size, training.form
        _, height, _ = self.dataset.image_shape
        overrides: dict[str, Any] = {"patch_size": height // scale.tokens, "depth": size.depth}
        overrides |= {"hidden_size": size.hidden_size, "num_heads": size.num_heads}
        latents = LatentsConfig()
        if variant.elastic:
            group = {0: scale.group, -1: scale.tokens}.get(variant.group, variant.group)
            overrides |= {"head": size.head, "tail": size.tail, "group": group}
            least = 1 if variant.all_budgets else group**2
            latents = LatentsConfig(min=least, max=group**2, order=variant.order)
        every = max(1, training.steps // scale.validations)
        prefix = "elit-" if variant.elastic else ""
        return TrainConfig(
            output_dir=str(self.folder / "runs" / training.name),
            seed=training.seed,
            model=ModelConfig(f"{prefix}{variant.backbone}-tiny/2", overrides),
            data=DataConfig(self.data.name, dict(self.data.options), scale.batch_size),
            objective=ObjectiveConfig(label_dropout=0.1),
            latents=latents,
            optimizer=OptimizerConfig(
                lr=size.lr, betas=(0.9, 0.99), warmup_steps=min(scale.warmup_steps, training.steps),
                schedule="cosine", ema=scale.ema,
            ),
            train=LoopConfig(
                steps=training.steps, precision=scale.precision, device=scale.device, threads=1,
                log_every=every, validate_every=every, sample_every=0,
                checkpoint_every=max(1, -(-training.steps // 4)), keep_checkpoints=1,
            ),
            sample=SampleConfig(budgets=[1.0]),
        )  # fmt: skip

    def budgets(self, training: Training) -> list[float]:
        """Budgets at which a training's loss is measured."""
        possible = default_budgets(1, self.scale.group**2) if training.form.ladder else [1.0]
        return [budget for budget in SHOWN_BUDGETS if budget in possible]

    def random_sets(self, training: Training) -> int:
        """Sets of random latents at each of them."""
        counts = training.variant == "elit-mb" and training.size == self.scale.sizes[0]
        return self.scale.random_sets if counts else 0

    def train(self, training: Training) -> Piece:
        """The piece that trains a model and measures its loss."""
        every = self.config(training).train.validate_every
        choices = len(self.budgets(training)) * (1 + self.random_sets(training))
        forwards = training.steps / every * min(MAX_SAMPLES, self.scale.images)
        forwards += choices * self.scale.images
        cost = training.flops + forwards / (3 * self.scale.batch_size) * training.step_flops
        return Piece(f"train-{training.name}", training, "train", cost)

    def draw(self, training: Training, point: OperatingPoint) -> Piece:
        """The piece that draws and judges samples."""
        words = str(point).replace(", ", "-").replace(" ", "-").replace("/", "of")
        cost = self.scale.samples * self.sampling_flops(training.variant, point)
        return Piece(f"draw-{training.name}-{words}", training, "draw", cost, point)

    def look(self, training: Training) -> Piece:
        """The piece that looks at Read's attention."""
        forwards = self.scale.inspected * 4 * len(self.scale.sigmas)
        cost = forwards * self.forward_flops(training.variant, 1.0)
        return Piece(f"look-{training.name}", training, "look", cost)


def equal_steps(plain_steps: int, plain_cost: float, cost: float) -> int:
    """Steps whose FLOPs come nearest to those of the plain model's training."""
    return max(1, round(plain_steps * plain_cost / cost))
