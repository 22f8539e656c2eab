"""Load a pipeline whose kind is not known beforehand, and the step cache that was fitted to it."""

import logging
import os
from pathlib import Path
from typing import Any

import torch

from elit._devices import pick_device
from elit._files import typed_path
from elit.caching.configs import CALIBRATION_FILE, TeaCacheConfig
from elit.flow.schedulers import make_scheduler, shift_of, with_shift
from elit.flow.shift import Shift
from elit.pipelines.base import ElasticPipeline
from elit.pipelines.elit_pipeline import ElitPipeline
from elit.pipelines.folder import (
    check_pipeline_folder,
    loading_error,
    read_index,
    weights_digest,
)
from elit.pipelines.text_pipeline import ElitTextPipeline

logger = logging.getLogger(__name__)


def load_pipeline(name: str | os.PathLike, **kwargs: Any) -> ElasticPipeline:
    """Load a folder or a hub name as an `ElitPipeline` or an `ElitTextPipeline`, as it was saved.

    Args:
        name: of the folder, or on the hub.
        **kwargs: of `from_pretrained`.
    """
    name = typed_path(name)
    is_text = index_of(name).get("_class_name") == ElitTextPipeline.__name__
    # Of what is none of ours, `ElitPipeline` says so.
    return (ElitTextPipeline if is_text else ElitPipeline).from_pretrained(name, **kwargs)


def index_of(name: str) -> dict[str, Any]:
    """What the model_index.json of a folder, or of a name on the hub, says of its parts."""
    folder = check_pipeline_folder(name)
    if folder is not None:
        return read_index(folder)
    try:
        return ElasticPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise loading_error(name, error) from error


def open_pipeline(
    name: str | os.PathLike,
    device: str = "auto",
    dtype: str = "fp32",
    variant: str | None = None,
    sampler: str | None = None,
    local_rank: int = 0,
    shift: Shift | None = None,
) -> ElasticPipeline:
    """Load a pipeline onto its device, by the words of a command line.

    Args:
        name: of the folder, or on the hub.
        device: "auto", or a name of torch.
        dtype: "fp32" or "bf16".
        variant: of the files of weights.
        sampler: instead of the one that was saved; it shifts its levels likewise.
        local_rank: number of this process among several on a machine, each on its own device.
        shift: of the sampler's levels, instead of the one that was saved.
    """
    place = pick_device(device, local_rank, share=True)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    pipeline = load_pipeline(name, dtype=dtypes[dtype], variant=variant).to(place)
    saved = pipeline.scheduler
    if sampler is not None:
        own = shift_of(pipeline.scheduler) if shift is None else shift
        pipeline.scheduler = make_scheduler(sampler, own)
    elif shift is not None:
        pipeline.scheduler = with_shift(pipeline.scheduler, shift)
    if pipeline.few_steps and shift not in (None, shift_of(saved)):
        logger.warning("this model was trained to draw at shift %s alone", shift_of(saved))
    return pipeline


def load_teacache(folder: str | os.PathLike, threshold: float) -> TeaCacheConfig:
    """TeaCache as `elit calibrate` fitted it, for `pipeline.transformer.enable_cache`.

    Args:
        folder: of the pipeline; its weights must be those that were calibrated.
        threshold: change between steps below which the blocks are skipped.
    """
    file = Path(folder) / CALIBRATION_FILE
    cache = TeaCacheConfig.load(file, threshold=threshold)
    if cache.weights not in (None, weights_digest(Path(folder))):
        raise ValueError(
            f"{file} was fitted to other weights than {folder} holds now; run `elit calibrate "
            f"{folder}` again"
        )
    return cache
