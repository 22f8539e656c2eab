"""The step cache that `elit calibrate` has fitted to a pipeline."""

import os
from pathlib import Path

from elit.caching.configs import CALIBRATION_FILE, TeaCacheConfig
from elit.pipelines.folder import weights_digest


def load_teacache(folder: str | os.PathLike, threshold: float) -> TeaCacheConfig:
    """TeaCache as it was calibrated, for `pipeline.transformer.enable_cache`.

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
