"""Whether a run may go on in a folder, and what is wrong with a checkpoint, in words."""

import errno
import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from elit._files import digest_of, locked, sha256_of
from elit.data import ImageDataset
from elit.training.config import OptimizerConfig, TrainConfig
from elit.training.distributed import World, is_of_connection
from elit.training.optimizer import learning_rate

logger = logging.getLogger(__name__)

STATE = "state.json"  # of a checkpoint
_FIXED = ("seed", "model", "data", "text", "alignment", "few_steps", "retrofit")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number
# Of data sets with a fingerprint: what changes no sample. What it holds, a fingerprint tells.
_FREE_OPTIONS = ("path", "damaged", "verify", "vae")


def fixed_settings(config: TrainConfig, fingerprint: str | None = None) -> dict[str, Any]:
    """What a resumed run must agree on with its checkpoint; the rest may change on the way.

    A data set with a fingerprint may have moved.
    """
    settings = config.from_anywhere().to_dict()
    del settings["data"]["num_workers"]  # changes no sample
    if fingerprint is not None:
        for option in _FREE_OPTIONS:
            settings["data"]["options"].pop(option, None)
        settings["data"]["fingerprint"] = fingerprint
    fixed = {key: settings[key] for key in _FIXED}
    return {
        **fixed,
        "optimizer.name": config.optimizer.name,
        "objective.prediction_type": config.objective.prediction_type,
    }


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, as far as it can be read: `load` says what is wrong with it."""
    try:
        state = json.loads((path / STATE).read_text())
        return state if isinstance(state.get("config", {}).get("data", {}), dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def frozen_digest(model: nn.Module) -> str | None:
    """A fingerprint of the parameters that a checkpoint leaves out: first numbers, and all summed.

    Sums of the bits, as whole numbers: no device rounds them.
    """
    digest, is_any = hashlib.sha256(), False
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            some = parameter.detach().flatten()[:64].float().cpu()
            digest.update(name.encode() + some.numpy().tobytes())
            bits = parameter.detach().contiguous().view(_BITS[parameter.element_size()])
            digest.update(str(int(bits.sum(dtype=torch.int64))).encode())
            is_any = True
    return digest.hexdigest() if is_any else None


def locked_run(config: TrainConfig, world: World) -> AbstractContextManager[None]:
    """Keep the run's folder for these processes, before what lies there is read."""
    folder = config.output_dir
    message = f"another process trains in {folder}; wait for its end, or choose another output_dir"
    return locked(Path(folder), message) if world.is_main else nullcontext()


def check_same_data(datasets: Sequence[ImageDataset], world: World) -> None:
    """Raise a ValueError if processes have left out other files: each would shuffle its own."""
    for dataset in datasets:
        counts = world.gather(len(dataset))
        files = world.gather(int(dataset.in_use[:15] or "0", 16))
        if len(set(counts)) > 1 or len(set(files)) > 1:
            raise ValueError(
                f"the processes see {counts} samples of {dataset}, or of other files: the data "
                f"must be one folder that all of them can read whole"
            )


def check_same_run(
    path: Path, config: TrainConfig, frozen: str | None, dataset: ImageDataset
) -> None:
    """Raise a ValueError if a checkpoint is of other settings, of other data or of another base."""
    state = read_state(path)
    if not state:
        return  # loading says what is wrong with it
    there, now = state.get("config", {}), fixed_settings(config, dataset.fingerprint)
    folder, data = config.output_dir, config.data.options.get("path")
    then_data, now_data = (each.get("data", {}).get("fingerprint") for each in (there, now))
    if None not in (then_data, now_data) and then_data != now_data:
        raise ValueError(
            f"{folder} holds a run on other data than {data} (fingerprint {then_data[:12]} there, "
            f"{now_data[:12]} now); put that data back, or choose another output_dir"
        )
    # What a checkpoint of an older version doesn't name was as by default.
    there = fixed_settings(TrainConfig()) | there if there else now
    different = [
        f"{key}: {there[key]} there, {now[key]} now" for key in now if there[key] != now[key]
    ]
    if different:
        raise ValueError(
            f"{folder} holds another run ({'; '.join(different)}); "
            f"choose another output_dir, or give the settings of that run"
        )
    if state.get("base") not in (None, frozen):
        key = "retrofit.base" if config.few_steps.base is None else "few_steps.base"
        raise ValueError(
            f"checkpoint {path} was trained on another base: {key} has changed since; put that one "
            f"back, or choose another output_dir"
        )
    _tell_of_rate(path, state, config)
    if state.get("in_use", dataset.in_use) != dataset.in_use:
        logger.warning(
            "%s: other shards can be read now than when %s was written; from here on the samples "
            "come in another order, and some may come twice or late in this epoch", data, path,
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


def last_step(folder: Path, steps: Sequence[int], most: int) -> int:
    """The step to go on from in a run's folder, or a ValueError that says why it can't.

    `steps` are those of each process's last checkpoint, 0 for none; `most` is that of the run.
    """
    step = steps[0]
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes find different last checkpoints in {folder / 'checkpoints'}, of the "
            f"steps {list(steps)}: output_dir must be one folder that all of them share"
        )
    if step > most:
        raise ValueError(
            f"{folder} is at step {step} already, beyond train.steps={most}; raise train.steps, or "
            f"choose another output_dir"
        )
    if not step and (folder / "model_index.json").exists():
        raise ValueError(
            f"{folder} holds a pipeline, but no checkpoint to go on from: training would "
            f"overwrite it; choose another output_dir, or remove that folder"
        )
    return step


def check_files(path: Path, step: int, state: Mapping[str, Any], world: World) -> None:
    """Raise a ValueError for a checkpoint that is not as it was written.

    Each process reads its share of the files. Early checkpoints know their sizes alone.
    """
    files = state["files"]
    if different := {file.name for file in path.glob("*.safetensors")} ^ files.keys():
        raise ValueError(f"{min(different)} is missing, or was put there by something else")
    content = {key: value for key, value in state.items() if key != "digest"}
    is_early = all(isinstance(written, int) for written in files.values())
    if state["step"] != step or not (is_early or state.get("digest") == digest_of(content)):
        raise ValueError(f"{STATE} is not as it was written")
    for name, written in list(files.items())[world.rank :: world.size]:
        file = path / name
        if written != (file.stat().st_size if isinstance(written, int) else sha256_of(file)):
            raise ValueError(f"{name} is not as it was written")


def check_names(saved: Collection[str], own: Collection[str]) -> None:
    """Raise a KeyError for tensors that only one of checkpoint and model has."""
    if different := sorted({*saved} ^ {*own}):
        others = f" and {len(different) - 1} others" if len(different) > 1 else ""
        raise KeyError(f"{different[0]}{others}: in only one of checkpoint and model")


def unreadable(path: Path, error: BaseException) -> ValueError:
    """The error of a checkpoint that can't be loaded, and what to do."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ValueError(
        f"checkpoint {path} cannot be read: {reason}; remove that folder to resume from the "
        f"checkpoint before it, or choose another output_dir"
    )


def unwritable(target: Path, error: BaseException) -> Exception:
    """What kept a checkpoint from being written, of whichever process."""
    causes: list[BaseException] = [error]
    if isinstance(error, CheckpointException):
        causes = [failure[0] for failure in error.failures.values()]
    for cause in causes:
        if isinstance(cause, RuntimeError) and is_of_connection(cause):
            return cause  # another process has ended: that is what to tell
    reason = next((c for c in causes if isinstance(c, OSError) and c.strerror), causes[0])
    number = getattr(reason, "errno", None) or errno.EIO
    text = getattr(reason, "strerror", None) or " ".join(str(reason).split())[:200]
    return OSError(number, f"{text} (the checkpoints before it are as they were)", str(target))
