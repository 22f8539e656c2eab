"""Load a pipeline whose kind is not known beforehand."""

import os
from typing import Any

from diffusers import DiffusionPipeline

from elit._files import typed_path
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
