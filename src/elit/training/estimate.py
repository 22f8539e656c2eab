"""What a run will take: FLOPs, hours and memory, from its config alone."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from elit._tables import in_units
from elit.cost.devices import known_accelerator
from elit.cost.flops import cost_of, mean_flops
from elit.cost.memory import saved_bytes, state_bytes
from elit.data import MEMORY, ImageDataset, load_dataset
from elit.models.presets import preset_inputs
from elit.training.build import build_model, tail_dropping
from elit.training.config import ModelConfig, RetrofitConfig, TrainConfig
from elit.training.config_files import config_of_run, load_config
from elit.training.distributed import shard_size
from elit.training.muon import hidden_matrices, step_flops

logger = logging.getLogger(__name__)

# Models of ours that are as large as well-known ones, to count retrofits of those.
STAND_INS = {"Qwen/Qwen-Image": "elit-mmdit-qwen/2"}

_GPUS_OF_A_MACHINE = 8


def estimate(
    config: TrainConfig, gpus: int = 8, gpu: str = "h100", mfu: float = 0.5
) -> dict[str, Any]:
    """Count what a run will take, without its data and without memory.

    Data that is not there yet is taken to be what the preset was made for, at
    `data.options.resolution`.

    Args:
        config: the run.
        gpus: how many processes, a GPU each.
        gpu: a name that `elit.cost.devices` knows.
        mfu: share of a GPU's peak that the model's FLOPs reach.

    Returns:
        "parameters" of "model", the preset, of a retrofit one as large as its base; "batch_size",
        and "samples" of it in one forward of one GPU; "step_tflops", three forwards of each
        sample, mean over the budgets drawn, those of a teacher, and what Muon adds, and
        "total_eflops" of all steps; "step_seconds", and "hours" of all steps; in 10^9 bytes of each
        GPU: "state_gb", weights, gradients, the optimiser's moments, averages, and a teacher's
        weights; "gathered_gb", of FSDP, the blocks that are whole at a time; "activations_gb", what
        a forward keeps for its backward at the largest budget; "checkpointed_gb", the same with
        `train.gradient_checkpointing`; "memory_gb" and "memory_checkpointed_gb", all of it; and
        what was given: "gpus", "gpu", "mfu", "peak_tflops", dense bf16, and "gpu_gb".

    Raises:
        ValueError: if the GPU is unknown, the batch can't be shared, or the base of a retrofit
            has no known size.
    """
    chip = known_accelerator(gpu)
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu={mfu} is not allowed; give a share above 0, at most 1")
    samples, rest = divmod(config.data.batch_size, gpus * config.train.accumulation)
    if rest or not samples:
        raise ValueError(
            f"data.batch_size={config.data.batch_size} cannot be cut into {gpus} GPUs x "
            f"{config.train.accumulation} micro-batches; choose a multiple of their product"
        )
    plan, model, most, step = _planned(config)
    parameters = cost_of(model).parameters
    shared = shard_size(config.train, gpus, min(gpus, _GPUS_OF_A_MACHINE))
    matrices = hidden_matrices(model) if config.optimizer.name == "muon" else ()
    lighter = sum(matrix.numel() for matrix in matrices)  # parameters with one moment, not two
    state, gathered = state_bytes(model, shared, _teacher_forwards(config) > 0, lighter)
    precision = config.train.precision
    half_weights = shared > 1 and precision != "fp32"
    saved = saved_bytes(
        type(model), model.config, samples, most, precision, half_weights=half_weights
    )
    seconds = step / (gpus * chip.tflops * 1e12 * mfu)
    return {
        "model": plan.model.preset,
        "parameters": parameters,
        "batch_size": config.data.batch_size,
        "samples": samples,
        "step_tflops": step / 1e12,
        "total_eflops": step * config.train.steps / 1e18,
        "gpus": gpus,
        "gpu": gpu,
        "peak_tflops": chip.tflops,
        "mfu": mfu,
        "step_seconds": seconds,
        "hours": seconds * config.train.steps / 3600,
        "state_gb": state / 1e9,
        "gathered_gb": gathered / 1e9,
        "activations_gb": saved.whole / 1e9,
        "checkpointed_gb": saved.checkpointed / 1e9,
        "memory_gb": (state + gathered + saved.whole) / 1e9,
        "memory_checkpointed_gb": (state + gathered + saved.checkpointed) / 1e9,
        "gpu_gb": chip.memory,
    }


class _Planned(NamedTuple):
    """A run as far as its costs go: of a retrofit, that of a model as large as what it makes."""

    config: TrainConfig
    model: Any  # on meta
    most: int | None  # latents per group that it draws
    step_flops: float


def _planned(config: TrainConfig, dataset: ImageDataset | None = None) -> _Planned:
    plan = _without_retrofit(config)
    with torch.device("meta"):
        model = build_model(plan, dataset or _data(plan)).requires_grad_(False)
    dropping, cost = tail_dropping(plan, model), cost_of(model)
    forward = mean_flops(cost, dropping, config.latents.draws)
    step = config.data.batch_size * (3 * forward + _teacher_forwards(config) * cost.flops())
    step += step_flops(model) if config.optimizer.name == "muon" else 0
    return _Planned(plan, model, None if dropping is None else dropping.max_latents, step)


def _teacher_forwards(config: TrainConfig) -> int:
    """Forwards at full budget for each sample of what a run learns from."""
    if config.few_steps.base is not None:
        from elit.training.few_steps import forwards

        return forwards(config.few_steps)
    return int(config.retrofit.is_taught)


def match_flops(
    config: TrainConfig, other: str | TrainConfig, dataset: ImageDataset | None = None
) -> TrainConfig:
    """The config with as many steps as take the training FLOPs of another.

    Args:
        config: whose `train.steps` are set.
        other: a run's folder, a config's file or name, or a config.
        dataset: of the run, where it is not the config's.
    """
    name = other if isinstance(other, str) else other.output_dir
    theirs = other if isinstance(other, TrainConfig) else config_of_run(other)
    if theirs is None:
        if Path(name).is_dir():
            raise ValueError(f"{name!r} has no config.yaml, which would say what its training took")
        theirs = load_config(name, {})
    total, step = (
        _planned(theirs).step_flops * theirs.train.steps,
        _planned(config, dataset).step_flops,
    )
    steps = max(1, round(total / step))
    logger.info(
        "%d steps of %s are %s, as the %d steps of %s, %s",
        steps, *(in_units(x, "FLOPs") for x in (step, steps * step)), theirs.train.steps, name,
        in_units(total, "FLOPs"),
    )  # fmt: skip
    return replace(config, train=replace(config.train, steps=steps))


class ExpectedData(ImageDataset):
    """Data that is not there yet: as the preset sees it."""

    def __init__(self, preset: str, resolution: int | None):
        known = preset_inputs(preset)
        if resolution is not None and resolution not in known:
            raise ValueError(
                f"data.options.resolution={resolution} is none that {preset!r} was made for "
                f"({', '.join(map(str, known))}), and its data is not there to be looked at; "
                f"prepare it first"
            )
        inputs = known[min(known) if resolution is None else resolution]
        size = inputs.sample_size
        self.image_shape = (inputs.in_channels, *((size, size) if isinstance(size, int) else size))
        self.class_names = tuple(map(str, range(inputs.num_classes or 0)))
        self.has_captions = inputs.max_text_length is not None


def _data(config: TrainConfig) -> ImageDataset:
    """The data of a run, or what it will be like."""
    options = config.data.options
    if config.data.name == MEMORY:
        expected = ExpectedData(config.model.preset, None)
        expected.image_shape = tuple(options["shape"])
        expected.class_names = tuple(map(str, range(options.get("classes", 0))))
        return expected
    path = options.get("path")
    if path is None or Path(str(path)).exists():
        return load_dataset(config.data.name, "train", **config.data.options)
    return ExpectedData(config.model.preset, config.data.options.get("resolution"))


def _without_retrofit(config: TrainConfig) -> TrainConfig:
    """The same run; of a retrofit, one of a model as large as what it makes of its base."""
    options = config.retrofit
    if options.base is None:
        return config
    if options.base not in STAND_INS:
        raise ValueError(
            f"the size of retrofit.base={options.base} is not known here; this counts models from "
            f"scratch, and retrofits of {', '.join(STAND_INS)}"
        )
    overrides = {"head": options.head, "tail": options.tail, "group": options.group}
    model = ModelConfig(STAND_INS[options.base], overrides)
    return replace(config, model=model, retrofit=RetrofitConfig())


def training_of_run(run: str, config: TrainConfig) -> dict[str, Any]:
    """Steps and EFLOPs of a run's training, as far as its folder says."""
    from elit.training.checkpoint import checkpoint_steps

    steps = max(checkpoint_steps(Path(run) / "checkpoints"), default=config.train.steps)
    config = replace(config, train=replace(config.train, steps=steps))
    try:
        return {"steps": steps, "eflops": estimate(config, gpus=1)["total_eflops"]}
    except ValueError:  # a retrofit of a base that has no known size
        return {"steps": steps, "eflops": None}
