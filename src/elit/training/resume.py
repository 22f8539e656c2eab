"""Whether a run may go on in a folder, said before anything there is touched."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elit.data import ImageDataset
from elit.training.checkpoint import read_state
from elit.training.config import OptimizerConfig, TrainConfig, fixed_settings
from elit.training.distributed import World
from elit.training.optimizer import learning_rate

logger = logging.getLogger(__name__)


def check_not_taken(folder: Path) -> None:
    """Raise a ValueError if a folder holds a pipeline but no checkpoint to go on from."""
    if (folder / "model_index.json").exists():
        raise ValueError(
            f"{folder} holds a pipeline, but no checkpoint to go on from: training would "
            f"overwrite it; choose another output_dir, or remove that folder"
        )


def check_same_data(datasets: Sequence[ImageDataset], world: World) -> None:
    """Raise a ValueError if processes have left out other files: each would shuffle its own."""
    for dataset in datasets:
        found = world.gather(len(dataset))
        files = world.gather(int(dataset.in_use[:15] or "0", 16))
        if len(set(found)) > 1 or len(set(files)) > 1:
            raise ValueError(
                f"the processes see {found} samples of {dataset}, or of other files: the data must "
                f"be one folder that all of them can read whole"
            )


def check_same_run(
    path: Path, config: TrainConfig, frozen: str | None, dataset: ImageDataset
) -> None:
    """Raise a ValueError if a checkpoint is of other settings, or of another base.

    Args:
        path: of the checkpoint.
        config: of the run that wants to go on.
        frozen: digest of the parameters that are not trained.
        dataset: that it trains on.
    """
    state = read_state(path)
    if not state:
        return  # loading says what is wrong with it
    saved, wanted = state.get("config", {}), fixed_settings(config, dataset.fingerprint)
    digests = [settings.get("data", {}).get("fingerprint") for settings in (saved, wanted)]
    if None not in digests and digests[0] != digests[1]:
        raise ValueError(
            f"{config.output_dir} holds a run on other data than {config.data.options.get('path')} "
            f"(fingerprint {digests[0][:12]} there, {digests[1][:12]} now); put that data back, or "
            f"choose another output_dir"
        )
    different = [
        f"{key}: {saved.get(key)} there, {wanted[key]} now"
        for key in wanted
        if saved.get(key, wanted[key]) != wanted[key]
    ]
    if different:
        raise ValueError(
            f"{config.output_dir} holds another run ({'; '.join(different)}); "
            f"choose another output_dir, or give the settings of that run"
        )
    if state.get("base", frozen) != frozen:
        raise ValueError(
            f"checkpoint {path} was trained on another base: retrofit.base has changed since; "
            f"put that one back, or choose another output_dir"
        )
    _tell_of_rate(path, state, config)
    if state.get("in_use", dataset.in_use) != dataset.in_use:
        logger.warning(
            "%s: other shards can be read now than when %s was written; from here on the samples "
            "come in another order, and some may come twice or late in this epoch",
            config.data.options.get("path"), path,
        )  # fmt: skip


def _tell_of_rate(path: Path, state: dict[str, Any], config: TrainConfig) -> None:
    """Warn where the learning rate jumps, as it does where a cosine is made longer."""
    try:
        steps, step = int(state["steps"]), int(state["step"])
        before = learning_rate(OptimizerConfig(**state["optimizer"]), steps, step)
    except (KeyError, TypeError, ValueError):
        return  # of an early version, or damaged: loading says so
    now = learning_rate(config.optimizer, config.train.steps, step)
    if step < config.train.steps and abs(now - before) > 0.01 * max(now, before):
        logger.warning(
            "%s: the learning rate jumps from %.3g to %.3g at step %d: train.steps was %d, now %d, "
            "or optimizer.* has changed; a longer run keeps its cosine only if it is begun anew; "
            "to go on at a low rate, give optimizer.schedule=constant and a small optimizer.lr",
            path, before, now, step, steps, config.train.steps,
        )  # fmt: skip
