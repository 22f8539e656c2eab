"""The autoencoder of a run on encoded data: what its pipelines decode with."""

import logging
from typing import Any

from elit.data import ImageDataset
from elit.pipelines.autoencoder import scale_and_shift
from elit.preparation.autoencoder import load_vae, weights_sha256
from elit.training.config import TrainConfig

logger = logging.getLogger(__name__)


def load_run_vae(config: TrainConfig, dataset: ImageDataset) -> Any | None:
    """The autoencoder that encoded a data set, frozen, on the CPU; None of pixels.

    One that can't be loaded is an error where the run draws; else its pipeline has none.
    """
    about = dataset.autoencoder
    if about is None:
        return None
    try:
        vae, _ = load_vae(about.name)
    except ValueError as error:
        if config.train.sample_every:
            raise ValueError(
                f"{error}. Samples are drawn with it: give its folder as data.options.vae, or set "
                f"train.sample_every=0"
            ) from error
        logger.warning("the saved pipeline has no autoencoder: %s", error)
        return None
    found = weights_sha256(vae)
    if found != about.sha256:
        raise ValueError(
            f"the autoencoder {about.name} has weights of SHA-256 {found}, the data was encoded "
            f"with those of {about.sha256}; give the folder of the right one as data.options.vae"
        )
    scales = (about.scale, about.shift)
    if scales != scale_and_shift(vae):
        raise ValueError(
            f"the autoencoder {about.name} does not scale latents as when the data was encoded: "
            f"look at scaling_factor, shift_factor, latents_mean and latents_std in its config, or "
            f"prepare the data anew"
        )
    return vae.eval().requires_grad_(False)
