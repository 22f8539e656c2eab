"""Load a pipeline whose kind is not known beforehand."""

import os
from typing import Any

import torch
from diffusers import DiffusionPipeline

from elit._devices import pick_device
from elit._files import typed_path
from elit.flow.schedulers import make_scheduler
from elit.pipelines.base import ElasticPipeline
from elit.pipelines.elit_pipeline import ElitPipeline
from elit.pipelines.folder import check_pipeline_folder, loading_error, read_config
from elit.pipelines.text_pipeline import ElitTextPipeline

PIPELINES = {kind.__name__: kind for kind in (ElitPipeline, ElitTextPipeline)}


def load_pipeline(name: str | os.PathLike, **kwargs: Any) -> ElasticPipeline:
    """Load a folder or a hub name as an `ElitPipeline` or an `ElitTextPipeline`, as it was saved.

    Args:
        name: of the folder, or on the hub.
        **kwargs: of `from_pretrained`.
    """
    name = typed_path(name)
    folder = check_pipeline_folder(name)
    if folder is not None:
        index = read_config(folder / "model_index.json")
    else:
        try:
            index = DiffusionPipeline.load_config(name)
        except (OSError, ValueError) as error:
            raise loading_error(name, error) from error
    kind = index.get("_class_name")
    # Of what is none of ours, `ElitPipeline` says so.
    return PIPELINES.get(str(kind), ElitPipeline).from_pretrained(name, **kwargs)


def open_pipeline(
    name: str | os.PathLike,
    device: str = "auto",
    dtype: str = "fp32",
    variant: str | None = None,
    sampler: str | None = None,
    local_rank: int = 0,
) -> ElasticPipeline:
    """Load a pipeline onto its device, by the words of a command line.

    Args:
        name: of the folder, or on the hub.
        device: "auto", or a name of torch.
        dtype: "fp32" or "bf16".
        variant: of the files of weights.
        sampler: instead of the one that was saved.
        local_rank: number of this process among several on a machine, each on its own device.
    """
    place = pick_device(device, local_rank, share=True)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    pipeline = load_pipeline(name, dtype=dtypes[dtype], variant=variant).to(place)
    if sampler is not None:
        pipeline.scheduler = make_scheduler(sampler)
    return pipeline
