"""Everything that a training run depends on, as one tree of dataclasses.

The defaults are the paper's; the YAML files in `configs/` say where a run differs.
"""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from elit._files import typed_path
from elit.training.rules import check_values

WORDS = "words"  # the built-in reader of captions
PREPARED = "prepared"  # texts that were encoded with the data; and the data set of that name
# Of data sets with a fingerprint: what changes no sample. What it holds, a fingerprint tells.
_FREE_OPTIONS = ("path", "damaged", "verify", "vae")


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
    batch_size: int = 256
    num_workers: int = 0


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
    max_length: int | None = None


@dataclass
class ObjectiveConfig:
    """Noise levels and label dropout.

    Attributes:
        density: of the noise levels: "logit_normal" (paper) or "uniform".
        logit_mean: mean of the logit-normal density; above 0 leans towards noise.
        logit_std: its standard deviation.
        label_dropout: share of labels replaced by the null label, of captions by the empty one, for
            guidance.
    """

    density: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    label_dropout: float = 0.1


@dataclass
class LatentsConfig:
    """Tail dropping: how many latents per group a step keeps. A plain model has none.

    Attributes:
        min: fewest; by default the model's `min_latents`.
        max: most; by default all. Equal to `min`, it trains a single budget.
        order: "first" keeps the first latents (paper), "random" any (ablation).
        draws: numbers drawn in each step. One is uniform (paper). More cut the batch into as many
            parts, each of which draws from a part of the range of its own, on a log scale.
    """

    min: int | None = None
    max: int | None = None
    order: Literal["first", "random"] = "first"
    draws: int = 1


@dataclass
class RetrofitConfig:
    """What `elit finetune` makes elastic, and how. Without a base, a model is trained from scratch.

    Attributes:
        base: folder of the pretrained pipeline, or of a diffusers transformer, or its hub name.
        start: output_dir of an earlier fine-tuning of this base, from whose weights this one goes
            on.
        head: blocks before Read.
        tail: blocks after Write.
        group: tokens of one group along each axis.
        init: "identity" starts lossless at full budget, "learned" as the paper does.
        train: "interface" alone; with "adapters" that act only below full budget, so that the
            original stays in there; with "lora" that acts at all budgets (peft); or "all".
        rank: of adapters or of LoRA.
        distill: weight of matching the original's velocity; the data's velocity has the rest.
        features: weight of matching the original's tokens after the core.
        base_lr: learning rate of the original parameters, as a fraction of the others', of "all".
    """

    base: str | None = None
    start: str | None = None
    head: int = 2
    tail: int = 2
    group: list[int] = field(default_factory=lambda: [4, 4])
    init: Literal["identity", "learned"] = "identity"
    train: Literal["adapters", "interface", "lora", "all"] = "adapters"
    rank: int = 16
    distill: float = 0.5
    features: float = 1.0
    base_lr: float = 1.0


@dataclass
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        lr: learning rate after warm-up.
        betas: decay rates of AdamW's moments.
        weight_decay: decoupled weight decay.
        warmup_steps: steps of linear warm-up.
        schedule: "constant", or "cosine" down to `final_lr` at the last step.
        final_lr: of the cosine, as a fraction of `lr`.
        clip: largest gradient norm; larger ones are scaled down to it.
        ema: decay of the weights' moving average, ramped up from 0.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 10_000
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = 0.0
    clip: float = 1.0
    ema: float = 0.9999


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
        validate_every: measure the validation loss at every budget.
        sample_every: draw a sheet of samples.
        checkpoint_every: save.
        keep_checkpoints: how many of the last checkpoints to keep.
        tensorboard: also write TensorBoard files (extra: tensorboard).
        wandb: project at Weights & Biases to send the metrics to (extra: wandb).
        peak_tflops: of the device in the run's precision, for `mfu`; by default from a table.
    """

    steps: int = 500_000
    accumulation: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    tf32: bool = True
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    shard_size: int | None = None
    device: str = "auto"
    threads: int | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: int = 50
    validate_every: int = 5_000
    sample_every: int = 5_000
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 3
    tensorboard: bool = False
    wandb: str | None = None
    peak_tflops: float | None = None


@dataclass
class SampleConfig:
    """The sheets of samples: one row for each budget, from the same noise.

    Attributes:
        budgets: of the rows and of the validation losses; by default 1, 1/2, 1/4, ...
        steps: Euler steps.
        guidance_scale: of cheap classifier-free guidance; 1 is none.
        columns: at most so many classes, or captions.
    """

    budgets: list[float] | None = None
    steps: int = 40
    guidance_scale: float = 2.0
    columns: int = 10


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
        output_dir: folder of the run. The same command again resumes what it finds there.
        seed: of everything random.
    """

    output_dir: str = "runs/train"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    retrofit: RetrofitConfig = field(default_factory=RetrofitConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir is empty; give a folder, such as runs/train")
        self._map_paths(typed_path)
        check_values(self)
        if self.optimizer.final_lr and self.optimizer.schedule == "constant":
            raise ValueError(
                f"optimizer.final_lr={self.optimizer.final_lr} has no effect on a constant "
                f"schedule; set optimizer.schedule=cosine, or leave it out"
            )
        if self.train.shard_size is not None and self.train.parallel != "hsdp":
            raise ValueError(
                f"train.shard_size={self.train.shard_size} has no effect on train.parallel="
                f"{self.train.parallel}; set train.parallel=hsdp, or leave it out"
            )
        self._check_retrofit()
        guides = self.sample.guidance_scale != 1 and self.train.sample_every
        if guides and not self.objective.label_dropout:
            raise ValueError(
                f"sample.guidance_scale={self.sample.guidance_scale} guides by the null label, "
                f"which objective.label_dropout=0 never trains; set sample.guidance_scale=1, "
                f"or label_dropout above 0"
            )

    def _check_retrofit(self) -> None:
        options = self.retrofit
        if options.base is None and options != RetrofitConfig():
            raise ValueError(
                "retrofit.* have no effect without retrofit.base; give it, or leave them out"
            )
        if options.base is not None and self.model != ModelConfig():
            raise ValueError(
                "model.* have no effect on a retrofit, whose model is retrofit.base; leave them out"
            )
        if options.init == "learned" and options.train == "adapters":
            raise ValueError(
                "retrofit.train=adapters leaves full budget as it is, which retrofit.init=learned "
                "doesn't start from; use train=all, lora or interface"
            )
        if options.rank != RetrofitConfig.rank and options.train in ("interface", "all"):
            raise ValueError(
                f"retrofit.rank has no effect on retrofit.train={options.train}, which has neither "
                f"adapters nor LoRA; leave it out"
            )
        if options.base_lr != 1 and options.train != "all":
            raise ValueError(
                f"retrofit.base_lr has no effect on retrofit.train={options.train}, which leaves "
                f"the original's parameters alone; leave it out"
            )
        if self.latents.draws > 1 and self.latents.order == "random":
            raise ValueError("latents.draws above 1 has no effect on latents.order=random")

    def _map_paths(self, change: Callable[[str | os.PathLike], str]) -> None:
        """Change all paths of the config, and names that may be paths."""
        options = self.data.options = dict(self.data.options)
        places = [
            (vars(self), "output_dir"), (vars(self.text), "encoder"),
            *((vars(self.retrofit), key) for key in ("base", "start")),
            *((options, key) for key in ("path", "vae")),
        ]  # fmt: skip
        for holder, key in places:
            if isinstance(path := holder.get(key), str | os.PathLike):
                holder[key] = change(path)

    def from_anywhere(self) -> "TrainConfig":
        """The same config with what it reads by paths from the root: it means the same anywhere."""
        config = copy.deepcopy(self)
        config._map_paths(lambda path: os.path.abspath(path) if os.path.exists(path) else str(path))
        config.output_dir = self.output_dir
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for YAML and JSON."""
        return json.loads(json.dumps(asdict(self)))  # tuples become lists


def fixed_settings(config: TrainConfig, fingerprint: str | None = None) -> dict[str, Any]:
    """What a resumed run must agree on with its checkpoint; the rest may change on the way.

    Args:
        config: of the run.
        fingerprint: of its data set, where that may change.
    """
    settings = config.from_anywhere().to_dict()
    del settings["data"]["num_workers"]  # changes no sample
    if fingerprint is not None:
        for option in _FREE_OPTIONS:
            settings["data"]["options"].pop(option, None)
        settings["data"]["fingerprint"] = fingerprint
    return {key: settings[key] for key in ("seed", "model", "data", "text", "retrofit")}
