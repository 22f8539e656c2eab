"""What would stop a run, found before anything is made or written."""

import os
from typing import Any, get_type_hints

import torch

from elit._choices import check_choice
from elit._devices import pick_device
from elit._files import output_folder
from elit._plain import from_plain
from elit.cost.flops import cost_of
from elit.data import load_dataset
from elit.data.order import StepBatches
from elit.flow.objective import SigmaDensity
from elit.models.elastic import ElasticMixin
from elit.models.presets import preset_model
from elit.retrofit.known import is_foreign
from elit.training.build import (
    build_model,
    check_buckets,
    check_condition,
    check_draws,
    latents_to_show,
    load_run_vae,
    tail_dropping,
    text_settings,
)
from elit.training.config import TrainConfig
from elit.training.distributed import shard_size


def check_config(config: TrainConfig, thorough: bool = False) -> None:
    """Raise a ValueError for what would stop the run, before anything is made or written.

    Args:
        config: of the run.
        thorough: whether to load pretrained models too, which the run does by itself.
    """
    output_folder(config.output_dir, "--output_dir")
    pick_device(config.train.device, int(os.environ.get("LOCAL_RANK", 0)))
    if config.train.tensorboard:
        from elit.training.metrics import summary_writer_class

        summary_writer_class()
    if config.train.wandb is not None:
        from elit.training.metrics import wandb_module

        wandb_module()
    objective, data = config.objective, config.data
    SigmaDensity(objective.density, objective.logit_mean, objective.logit_std)
    dataset = load_dataset(data.name, "train", **data.options)
    load_dataset(data.name, "validation", **data.options)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    chunks = processes * config.train.accumulation
    check_draws(config, chunks)
    shard_size(config.train, processes)
    StepBatches(len(dataset), data.batch_size, range(chunks), chunks, range(1), config.seed)
    if config.retrofit.base is not None:
        if not thorough:
            return
        from elit.training.finetune import build_retrofit

        model, _ = build_retrofit(config, dataset)
        check_condition(config, dataset, model)
    else:
        _check_overrides(config.model.preset, config.model.overrides)
        of_texts = text_settings(config.text, dataset)
        with torch.device("meta"):
            model = build_model(config, dataset, of_texts).requires_grad_(False)
    check_buckets(model, dataset)
    if thorough and not is_foreign(model):
        load_run_vae(config, dataset)
    if isinstance(model, ElasticMixin):
        cost_of(model)  # or an error: do the groups divide the grid?
    tail_dropping(config, model)
    latents_to_show(model, config.sample.budgets)


def _check_overrides(preset: str, overrides: dict[str, Any]) -> None:
    """Raise a ValueError for what the model doesn't take."""
    hints = get_type_hints(preset_model(preset).__init__)
    names = [name for name in hints if name != "return"]
    for name, value in overrides.items():
        check_choice(name, names, "key", " of model.overrides")
        from_plain(hints[name], value, f"model.overrides.{name}")
