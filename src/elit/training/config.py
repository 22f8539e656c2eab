"""Everything that a training run depends on, as one tree of dataclasses.

The defaults are the paper's; the YAML files in `configs/` say where a run differs.
"""

import copy
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from elit._choices import check_choice
from elit._files import typed_path
from elit._numbers import MOST
from elit._plain import Rule, check_fields
from elit.data import DATASETS, MEMORY
from elit.flow.shift import DIMENSION, Shift, is_shift
from elit.interface.budget import read_budget
from elit.models.presets import preset_class

WORDS = "words"  # the built-in reader of captions
PREPARED = "prepared"  # texts, or features, made with the data; and the data set of that name
_NO_PATHS = (WORDS, PREPARED, "classifier")  # of encoders, whatever folder is called so


def _from(least: float, most: float = MOST) -> Rule:
    words = f"of at least {least}, at most {most}" if most == MOST else f"from {least} to {most}"
    return Rule(lambda value: least <= value <= most, f"a number {words}")


# Types of fields that hold some numbers only: `check_fields` reads which.
_SHARES = Rule(lambda values: all(0 <= value < 1 for value in values), "numbers in [0, 1)")
Count = Annotated[int, _from(1)]
CountOr0 = Annotated[int, _from(0)]
AtLeast0 = Annotated[float, _from(0)]
Shifts = Annotated[Shift, Rule(is_shift, f"a number from 0.001 to 1000, or {DIMENSION}")]
Positive = Annotated[float, Rule(lambda value: 0 < value < math.inf, "a number above 0")]
Share = Annotated[float, Rule(lambda value: 0 <= value < 1, "a number in [0, 1)")]
Weight = Annotated[float, Rule(lambda value: 0 <= value <= 1, "a number in [0, 1]")]
Seed = Annotated[int, Rule(lambda value: 0 <= value < 2**63, "a number from 0 to 2^63 - 1")]
Threads = Annotated[int, _from(1, 1024)]  # thousands are a segmentation fault in OpenMP
Project = Annotated[str, Rule(str.strip, "a project's name")]


@dataclass
class ModelConfig:
    """Which model to train.

    Attributes:
        preset: name in the table of presets, such as "elit-dit-b/2".
        overrides: arguments of the model to change, by name. Input size, channels and classes
            are the data set's and need not be given.
    """

    preset: str = "elit-dit-tiny/2"
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """What to train on.

    Attributes:
        name: data set, "digits", "shapes", "captioned-shapes" or "moving-shapes"; "fashion-mnist"
            is read from its files; "prepared" is what `elit prepare` wrote; "tensors" are your own
            latents and texts, encoded, for a diffusers transformer.
        options: options of the data set, such as count and size of "shapes", path of "prepared"
            and "fashion-mnist".
        batch_size: samples of one optimiser step, over all processes and accumulations.
        num_workers: loader processes of each training process; 0 loads in the process itself.
    """

    name: str = "digits"
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: Count = 256
    num_workers: CountOr0 = 0


@dataclass
class TextConfig:
    """What reads the captions, of models that take texts. Class-conditional ones have none.

    Attributes:
        encoder: "words", read by the model itself and trained along; "prepared", texts that
            `elit prepare` has encoded; or a frozen text encoder of transformers, CLIP, T5 or Qwen,
            by its name on the hub or its folder.
        max_length: most tokens of a text; by default the preset's. Longer captions are cut off.
    """

    encoder: str = WORDS
    max_length: Count | None = None


@dataclass
class ObjectiveConfig:
    """Noise levels and label dropout.

    Attributes:
        density: density of the noise levels, "logit_normal" (paper) or "uniform".
        logit_mean: mean of the logit-normal density; above 0 leans towards noise.
        logit_std: its standard deviation.
        shift: s of a shift of the noise levels, s sigma / (1 + (s - 1) sigma), in training and
            in the sampler that is saved; "dimension" is sqrt(m / 4096) of samples of m numbers.
        prediction_type: output of the last layer, "velocity" or "sample" (x-prediction), of which
            the model makes the velocity; the loss is the velocity's.
        label_dropout: share of labels replaced by the null label, and of captions by the empty one,
            for guidance.
    """

    density: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: Positive = 1.0
    shift: Shifts = 1.0
    prediction_type: Literal["velocity", "sample"] = "velocity"
    label_dropout: Share = 0.1


@dataclass
class LatentsConfig:
    """Tail dropping: how many latents per group a step keeps. A plain model has none.

    Attributes:
        min: fewest latents; by default the model's `min_latents`.
        max: most latents; by default all. Equal to `min`, it trains a single budget.
        order: "first" keeps the first latents (paper), "random" any (ablation).
        draws: numbers drawn in each step. One is uniform (paper). More cut the batch into as many
            parts, each of which draws from a part of the range of its own, on a log scale.
    """

    min: int | None = None
    max: int | None = None
    order: Literal["first", "random"] = "first"
    draws: Count = 1


@dataclass
class AlignmentConfig:
    """Hidden states drawn towards a vision model's features of the pictures (REPA), in training.

    Attributes:
        weight: weight of its loss beside that of the velocity; 0 is none, the paper's 0.5.
        where: "tokens" before Read, in a plain model behind a block; or "latents" in the core.
        kind: "repa", with an MLP that projects; or "irepa", with a convolution, and features
            normalised over the picture.
        encoder: vision model of transformers, by its name on the hub or its folder; "prepared",
            features that `elit prepare` has stored; or "classifier", a small one that is fitted on
            the labels of the data.
        depth: blocks before the place; by default the head before Read, else 8 of 28.
    """

    weight: AtLeast0 = 0.0
    where: Literal["tokens", "latents"] = "tokens"
    kind: Literal["repa", "irepa"] = "repa"
    encoder: str = "facebook/dinov2-base"
    depth: Count | None = None


@dataclass
class FewStepsConfig:
    """A run that learns to draw in few steps, of one that was trained; without a base, none does.

    Attributes:
        base: folder of the trained run, of the same model, whose weights this one starts from.
        steps: Euler steps that the model then draws in.
        guidance_scale: scale of the classifier-free guidance that is learned with them; 1 is none.
    """

    base: str | None = None
    steps: Count = 4
    guidance_scale: AtLeast0 = 2.0


@dataclass
class RetrofitConfig:
    """What `elit finetune` makes elastic, and how. Without a base, a model is trained from scratch.

    Attributes:
        base: folder of the pretrained pipeline, or of a diffusers transformer, or its hub name.
        start: output_dir of an earlier fine-tuning of this base; this one starts from its weights.
        head: blocks before Read.
        tail: blocks after Write.
        group: tokens of one group along each axis.
        init: "identity" starts lossless at full budget, "learned" as the paper does.
        train: "interface" alone; with "adapters" that act only below full budget, so that the
            original stays in there; with "lora" that acts at all budgets (peft); or "all".
        rank: rank of the adapters or of LoRA.
        distill: weight of matching the original's velocity; the data's velocity has the rest.
        features: weight of matching the original's tokens after the core.
        base_lr: with "all", learning rate of the original parameters as a fraction of the others'.
    """

    base: str | None = None
    start: str | None = None
    head: int = 2
    tail: int = 2
    group: list[int] = field(default_factory=lambda: [4, 4])
    init: Literal["identity", "learned"] = "identity"
    train: Literal["adapters", "interface", "lora", "all"] = "adapters"
    rank: Count = 16
    distill: Weight = 0.5
    features: AtLeast0 = 1.0
    base_lr: Positive = 1.0

    @property
    def is_taught(self) -> bool:
        """Whether the original teaches."""
        return self.base is not None and (self.distill > 0 or self.features > 0)


@dataclass
class OptimizerConfig:
    """Optimiser and its schedule.

    Attributes:
        name: "adamw", or "muon" for the matrices in the blocks, Read and Write, whose steps are as
            large as AdamW's of the same rate, and AdamW for the rest.
        lr: learning rate after warm-up.
        betas: decay rates of AdamW's moments.
        weight_decay: decoupled weight decay.
        warmup_steps: steps of linear warm-up.
        schedule: "constant", or "cosine" down to `final_lr` at the last step.
        final_lr: rate at the end of the cosine, as a fraction of `lr`.
        clip: largest gradient norm; larger ones are scaled down to it.
        ema: decay of the weights' moving average, ramped up from 0.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 1e-4
    betas: Annotated[tuple[float, float], _SHARES] = (0.9, 0.999)
    weight_decay: AtLeast0 = 0.0
    warmup_steps: CountOr0 = 10_000
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: AtLeast0 = 0.0
    clip: Positive = 1.0
    ema: Share = 0.9999


@dataclass
class LoopConfig:
    """The loop itself. "Every" counts steps, and 0 means never.

    Attributes:
        steps: optimiser steps in all.
        accumulation: micro-batches that one process's share of a batch is cut into.
        precision: "fp32", or of autocast: "bf16", or "fp16", with a scale that keeps gradients
            from vanishing.
        tf32: whether matrix products in fp32 may round to TF32, on GPUs that have it.
        parallel: over several processes, "ddp" keeps a copy of everything in each; "fsdp" (FSDP2)
            shares weights, gradients, moments and averages out among all; "hsdp" among
            `shard_size` of them.
        shard_size: processes that share one copy under hsdp; by default those of one machine.
        device: "auto", "cpu", "cuda" or "mps".
        threads: CPU threads of each process, by default PyTorch's choice. A tiny model is quickest
            on one.
        gradient_checkpointing: recompute blocks in the backward pass to save memory.
        compile: compile the blocks; a few graphs serve all budgets.
        log_every: write metrics.
        validate_every: measure the validation loss at every budget, and once more at the end.
        sample_every: draw a sheet of samples, and one more at the end.
        checkpoint_every: save a checkpoint.
        keep_checkpoints: how many of the last checkpoints to keep.
        tensorboard: also write TensorBoard files (extra: tensorboard).
        wandb: project at Weights & Biases to send the metrics to (extra: wandb).
        peak_tflops: peak of the device in the run's precision, for `mfu`; by default from a table.
    """

    steps: Count = 500_000
    accumulation: Count = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    tf32: bool = True
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    shard_size: Count | None = None
    device: str = "auto"
    threads: Threads | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: CountOr0 = 50
    validate_every: CountOr0 = 5_000
    sample_every: CountOr0 = 5_000
    checkpoint_every: CountOr0 = 5_000
    keep_checkpoints: Count = 3
    tensorboard: bool = False
    wandb: Project | None = None
    peak_tflops: Positive | None = None


@dataclass
class SampleConfig:
    """The sheets of samples: one row for each budget, from the same noise.

    Attributes:
        budgets: budgets of the rows and of the validation losses, such as 0.25, 1/4 or 25%; by
            default 1, 1/2, 1/4, ...
        steps: Euler steps.
        guidance_scale: scale of cheap classifier-free guidance; 1 is none.
        columns: most classes or captions shown.
    """

    budgets: list[float | str] | None = None
    steps: Count = 40
    guidance_scale: AtLeast0 = 2.0
    columns: Count = 10

    def __post_init__(self) -> None:
        try:
            self.budgets = self.budgets and [read_budget(budget) for budget in self.budgets]
        except ValueError as error:
            raise ValueError(f"sample.budgets is {self.budgets}: {error}") from None


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
        output_dir: folder of the run. The same command again resumes what it finds there.
        seed: seed of everything random.
    """

    output_dir: str = "runs/train"
    seed: Seed = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    few_steps: FewStepsConfig = field(default_factory=FewStepsConfig)
    retrofit: RetrofitConfig = field(default_factory=RetrofitConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        self._map_paths(typed_path)
        check_fields(self)
        preset_class(self.model.preset)  # or an error
        if self.data.name != MEMORY:
            check_choice(self.data.name, DATASETS, "data set")
        for is_so, message in self._clashes():
            if is_so:
                raise ValueError(message)

    def _map_paths(self, change: Callable[[str | os.PathLike], str]) -> None:
        """Change all paths of the config, and names that may be paths."""
        options = self.data.options = dict(self.data.options)
        places = [
            (vars(self), "output_dir"), (vars(self.text), "encoder"),
            (vars(self.alignment), "encoder"), (vars(self.few_steps), "base"),
            *((vars(self.retrofit), key) for key in ("base", "start")),
            *((options, key) for key in ("path", "vae")),
        ]  # fmt: skip
        for holder, key in places:
            path = holder.get(key)
            if isinstance(path, str | os.PathLike) and path not in _NO_PATHS:
                holder[key] = change(path)

    @property
    def pictures(self) -> SampleConfig:
        """How the run's own pictures are drawn: in the few steps that it learns, if it does."""
        few = self.few_steps
        if few.base is None:
            return self.sample
        scale = self.sample.guidance_scale if few.guidance_scale == 1 else 1.0
        return replace(self.sample, steps=few.steps, guidance_scale=scale)

    def from_anywhere(self) -> "TrainConfig":
        """The same config with what it reads by paths from the root: it means the same anywhere."""
        config = copy.deepcopy(self)
        config._map_paths(lambda path: os.path.abspath(path) if os.path.exists(path) else str(path))
        config.output_dir = self.output_dir
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for YAML and JSON."""
        return json.loads(json.dumps(asdict(self)))  # tuples become lists

    def _clashes(self) -> Iterable[tuple[bool, str]]:
        """Whether values that are allowed alone are given together, and what to say of them."""
        loop, optimizer, text, latents = self.train, self.optimizer, self.text, self.latents
        retrofit, scale = self.retrofit, self.pictures.guidance_scale
        few, drawn = self.few_steps, self.objective
        kind, is_retrofit = retrofit.train, retrofit.base is not None
        return (
            (not self.output_dir,
             "output_dir is empty; give a folder, such as runs/train"),
            (optimizer.final_lr > 0 and optimizer.schedule == "constant",
             f"optimizer.final_lr={optimizer.final_lr} has no effect on a constant schedule; set "
             f"optimizer.schedule=cosine, or leave it out"),
            (loop.shard_size is not None and loop.parallel != "hsdp",
             f"train.shard_size={loop.shard_size} has no effect on train.parallel={loop.parallel}; "
             f"set train.parallel=hsdp, or leave it out"),
            (not self.alignment.weight and self.alignment != AlignmentConfig(),
             "alignment.* have no effect without alignment.weight; give it, as 0.5, or leave them "
             "out"),
            (is_retrofit and self.alignment.weight > 0,
             "alignment.weight has no effect on a retrofit, which its original teaches; leave it "
             "out"),
            (few.base is None and few != FewStepsConfig(),
             "few_steps.* have no effect without few_steps.base; give it, or leave them out"),
            (few.base is not None and is_retrofit,
             "few_steps.base and retrofit.base are two runs; elasticize first, without few_steps"),
            (few.base is not None
             and (drawn.density, drawn.logit_mean, drawn.logit_std) != ("logit_normal", 0, 1),
             "objective.density and logit_* have no effect with few_steps.base, which draws the "
             "levels of its steps; leave them out"),
            (not is_retrofit and retrofit != RetrofitConfig(),
             "retrofit.* have no effect without retrofit.base; give it, or leave them out"),
            (is_retrofit and self.model != ModelConfig(),
             "model.* have no effect on a retrofit, whose model is retrofit.base; leave them out"),
            (kind == "adapters" and retrofit.init == "learned",
             "retrofit.train=adapters leaves full budget as it is, which retrofit.init=learned "
             "doesn't start from; use train=all, lora or interface"),
            (kind in ("interface", "all") and retrofit.rank != RetrofitConfig.rank,
             f"retrofit.rank has no effect on retrofit.train={kind}, which has neither adapters "
             f"nor LoRA; leave it out"),
            (kind != "all" and retrofit.base_lr != 1,
             f"retrofit.base_lr has no effect on retrofit.train={kind}, which leaves the "
             f"original's parameters alone; leave it out"),
            (latents.min is not None and "min_latents" in self.model.overrides,
             "latents.min and model.overrides.min_latents are the same thing; give one of them"),
            ("prediction_type" in self.model.overrides,
             "model.overrides.prediction_type is objective.prediction_type; give it there"),
            (is_retrofit and self.objective.prediction_type != "velocity",
             "objective.prediction_type has no effect on a retrofit: retrofit.base says what it "
             "predicts; leave it out"),
            (text.encoder == PREPARED and text.max_length is not None,
             f"text.max_length={text.max_length} has no effect on text.encoder={PREPARED}, whose "
             f"texts are encoded already; leave it out"),
            (latents.draws > 1 and latents.order == "random",
             "latents.draws above 1 has no effect on latents.order=random"),
            (scale != 1 and loop.sample_every > 0 and not self.objective.label_dropout,
             f"sample.guidance_scale={scale} guides by the null label, which "
             f"objective.label_dropout=0 never trains; set sample.guidance_scale=1, or "
             f"label_dropout above 0"),
        )  # fmt: skip
