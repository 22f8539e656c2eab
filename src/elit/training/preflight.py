"""What would stop a run, found before anything is made or written."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from elit._devices import pick_device
from elit._files import output_folder
from elit.data import ImageDataset
from elit.data.order import StepBatches
from elit.retrofit.known import is_foreign
from elit.training.build import (
    DataSets,
    build_checked,
    build_model,
    check_draws,
    latents_to_show,
    load_run_vae,
    read_data,
    sigma_density,
    tail_dropping,
    warn_of_width,
)
from elit.training.config import TrainConfig
from elit.training.distributed import shard_size
from elit.training.metrics import summary_writer_class, wandb_module


def check_config(
    config: TrainConfig, thorough: bool = False, data: DataSets | None = None
) -> DataSets:
    """Raise a ValueError for what would stop the run, before anything is made or written.

    Args:
        config: of the run.
        thorough: whether to load pretrained models too, which the run does by itself.
        data: of the run, where it is not the config's.

    Returns:
        The data that was read, for `train`.
    """
    output_folder(config.output_dir, "--output_dir")
    pick_device(config.train.device, int(os.environ.get("LOCAL_RANK", 0)))
    if config.train.tensorboard:
        summary_writer_class()
    if config.train.wandb is not None:
        wandb_module()
    sigma_density(config)
    data = data or read_data(config)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    chunks = processes * config.train.accumulation
    check_draws(config, chunks)
    shard_size(config.train, processes)
    size, batch_size = len(data.train), config.data.batch_size
    StepBatches(size, batch_size, range(chunks), chunks, range(1), config.seed)
    if config.retrofit.base is None or thorough:
        scratch = config.retrofit.base is None
        model, _ = build_checked(config, data.train, _build_on_meta if scratch else None)
        if thorough and not is_foreign(model):
            load_run_vae(config, data.train)
            warn_of_width(model)  # a run does by itself
        tail_dropping(config, model)
        latents_to_show(model, config.sample.budgets)
    return data


def _build_on_meta(config: TrainConfig, dataset: ImageDataset, of_texts: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return build_model(config, dataset, of_texts)
