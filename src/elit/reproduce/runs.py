"""The trainings of a study: which model, how it is trained, and for how many steps."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from elit.cost.flops import cost_of, mean_flops, on_meta
from elit.data import ImageDataset, load_dataset
from elit.interface.budget import default_budgets
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

SHOWN_BUDGETS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)


@dataclass(frozen=True)
class Variant:
    """A model and how it is trained.

    Attributes:
        title: in tables.
        elastic: whether it has a latent interface.
        all_budgets: whether each step draws its budget (multi-budget), or all are full.
        order: which latents a step keeps, "first" or "random".
        group: tokens along a side of a group; 0 is the scale's, -1 the whole picture.
        spread: whether pictures are spread among zero tokens.
        backbone: "dit" or "uvit".
        ladder: whether its loss is measured at lower budgets too.
    """

    title: str
    elastic: bool = True
    all_budgets: bool = False
    order: str = "first"
    group: int = 0
    spread: bool = False
    backbone: str = "dit"
    ladder: bool = False


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
    """One training of a study.

    Attributes:
        name: of its folder, without slashes.
        variant: key of VARIANTS.
        size: of the model.
        seed: of everything random in it.
        steps: optimiser steps.
        step_flops: of one, mean over the budgets drawn: three forwards of each sample.
    """

    name: str
    variant: str
    size: Size
    seed: int
    steps: int
    step_flops: float

    @property
    def flops(self) -> float:
        """Of the whole training."""
        return self.steps * self.step_flops


@dataclass
class Trainings:
    """Makes the trainings of a study, all of a claim at equal FLOPs.

    Attributes:
        scale: of the study.
        folder: of the study.
        data: name and options of the data set.
    """

    scale: Scale
    folder: Path
    data: DataConfig
    _flops: dict[tuple[str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dataset: ImageDataset = load_dataset(self.data.name, "train", **self.data.options)

    def training(
        self, variant: str, seed: int, size: Size | None = None, steps: int | None = None
    ) -> Training:
        """A training as costly as that of the plain model, or of a given number of steps.

        Args:
            variant: key of VARIANTS.
            seed: of the training.
            size: of the model; by default the scale's first.
            steps: of it and not of equal cost.
        """
        size = size or self.scale.sizes[0]
        cost = self.step_flops(variant, size)
        suffix = "" if steps is None else f"-{steps}-steps"
        if steps is None:
            plain = "uvit" if VARIANTS[variant].backbone == "uvit" else "dit"
            steps = equal_steps(size.steps, self.step_flops(plain, size), cost)
        name = f"{size.name}-{variant}{suffix}-seed{seed}"
        return Training(name, variant, size, seed, steps, cost)

    def step_flops(self, variant: str, size: Size) -> float:
        """FLOPs of a training step, mean over the budgets that it may draw."""
        key = variant, size.name
        if key not in self._flops:
            config = self.config(Training("count", variant, size, 0, 1, 0))
            model = self.on_meta(config, variant)
            forward = mean_flops(cost_of(model), tail_dropping(config, model))
            self._flops[key] = 3 * self.scale.batch_size * forward
        return self._flops[key]

    def on_meta(self, config: TrainConfig, variant: str) -> Any:
        """The model without memory."""
        with torch.device("meta"):
            model = build_model(config, self.dataset)
        if VARIANTS[variant].spread:
            model = on_meta(SpreadDiT, dict(model.config))
        return model.requires_grad_(False)

    def forward_flops(self, variant: str, budget: float) -> int:
        """FLOPs of one forward of one picture, of the scale's first size."""
        config = self.config(Training("count", variant, self.scale.sizes[0], 0, 1, 0))
        cost = cost_of(self.on_meta(config, variant))
        return cost.flops(cost.resolve_budget(budget))

    def config(self, training: Training) -> TrainConfig:
        """The config of a training; its folder is in the study's."""
        scale, size, variant = self.scale, training.size, VARIANTS[training.variant]
        _, height, _ = self.dataset.image_shape
        overrides: dict[str, Any] = {
            "patch_size": height // scale.tokens,
            "hidden_size": size.hidden_size,
            "num_heads": size.num_heads,
            "depth": size.depth,
        }
        latents = LatentsConfig()
        if variant.elastic:
            group = {0: scale.group, -1: scale.tokens}.get(variant.group, variant.group)
            overrides |= {"head": size.head, "tail": size.tail, "group": group}
            least = 1 if variant.all_budgets else group**2
            order: Any = variant.order
            latents = LatentsConfig(min=least, max=group**2, order=order)
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

    @staticmethod
    def make_model(variant: str) -> MakeModel:
        """What makes the model of a variant."""
        return build_spread_model if VARIANTS[variant].spread else build_model

    @staticmethod
    def model_class(variant: str) -> type[Any]:
        """Class of the model of a variant."""
        found = VARIANTS[variant]
        return SpreadDiT if found.spread else preset_model(f"{found.backbone}-tiny/2")

    @staticmethod
    def measured_budgets(variant: str, group: int) -> list[float]:
        """Budgets at which the loss of a variant is measured."""
        if not VARIANTS[variant].ladder:
            return [1.0]
        possible = default_budgets(1, group**2)
        return [budget for budget in SHOWN_BUDGETS if budget in possible]


def equal_steps(plain_steps: int, plain_cost: float, cost: float) -> int:
    """Steps whose FLOPs come nearest to those of the plain model's training."""
    return max(1, round(plain_steps * plain_cost / cost))


def describe(training: Training) -> Mapping[str, Any]:
    """Plain types for JSON."""
    return {**asdict(training), "size": training.size.name, "flops": training.flops}
