"""Checkpoints of a run: written aside, then renamed, so that none is ever half there.

checkpoints/step-00001000/
model.safetensors      online weights
ema.safetensors        their moving average
optimizer.safetensors  AdamW's moments
state.json             step and what else the loop must know
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_NAME = re.compile(r"step-(\d{8,})")
_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Give a new folder to write into, and rename it to `target` when all went well."""
    aside = target.with_name(f".{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync(aside)
        aside.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder_files(target: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a folder aside, then move its files over those of `target` one by one.

    For a folder that readers may have open: each file is at any moment the old or the new one.
    """
    aside = target / ".export.part"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write(aside)
        files = [file for file in aside.rglob("*") if file.is_file()]
        # Weights first and the index last: what the index names is there.
        for file in sorted(files, key=lambda f: (f.suffix == ".json", -len(f.parts), f)):
            _sync(file)
            place = target / file.relative_to(aside)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the disk hold what was written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock_folder(folder: Path) -> IO[str]:
    """Keep a run's folder for this process until the file that this gives is closed."""
    file = (folder / ".lock").open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except OSError as error:
        file.close()
        raise ValueError(
            f"another process trains in {folder}; wait for its end, or choose another output_dir"
        ) from error
    return file


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for pattern in (".step-*.part", ".step-*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in order."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    ema: list[Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint, then remove all but the last `keep`."""
    frozen = frozen_names(model)
    names = [name for name, _ in model.named_parameters() if name not in frozen]
    target = folder / f"step-{step:08d}"
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k not in frozen}
    parts = (weights, dict(zip(names, ema, strict=True)), _flatten(optimizer, model))
    with written_aside(target) as aside:
        for tensors, file in zip(parts, _FILES, strict=False):
            try:
                save_file(tensors, aside / file)
            except SafetensorError as error:  # a full disk
                raise OSError(f"{target / file} cannot be written: {error}") from error
        state = {"step": step, "frozen": frozen_digest(model), **state}
        (aside / _FILES[3]).write_text(json.dumps(state, indent=2))
    for old in checkpoint_steps(folder)[:-keep]:
        _remove(folder / f"step-{old:08d}")
    return target


def _remove(path: Path) -> None:
    """Remove a checkpoint; one that is half removed no longer bears a checkpoint's name."""
    aside = path.with_name(f".{path.name}.removed")
    path.rename(aside)
    shutil.rmtree(aside)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[Tensor], dict[str, Any]]:
    """Fill model and optimiser from a checkpoint; return the moving average and the state."""
    frozen = frozen_names(model)
    names = [name for name, _ in model.named_parameters() if name not in frozen]
    _check_frozen(path, model)
    try:
        weights, ema, moments = (load_file(path / name) for name in _FILES[:3])
        state = json.loads((path / _FILES[3]).read_text())
        state = {key: state[key] for key in ("step", "ema_steps")} | {
            "seconds": state.get("seconds", 0.0)
        }
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - frozen:
            raise KeyError(*unexpected, *(set(missing) - frozen))
        _unflatten(optimizer, model, moments)
        return [ema[name] for name in names], state
    except (
        OSError,
        SafetensorError,
        json.JSONDecodeError,
        KeyError,
        TypeError,
        RuntimeError,
    ) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"checkpoint {path} cannot be read: {reason}; remove that folder to resume from the "
            f"checkpoint before it, or choose another output_dir"
        ) from error


def _check_frozen(path: Path, model: nn.Module) -> None:
    """Raise a ValueError if the parameters that a checkpoint left out have changed since."""
    try:
        saved = json.loads((path / _FILES[3]).read_text()).get("frozen")
    except (OSError, ValueError, AttributeError):
        return  # what is wrong is said when it is loaded
    if saved != frozen_digest(model):
        raise ValueError(
            f"checkpoint {path} was trained on another base: retrofit.base has changed since; put "
            f"that one back, or choose another output_dir"
        )


def frozen_names(model: nn.Module) -> set[str]:
    """Parameters that are not trained: a checkpoint leaves them where they came from."""
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def frozen_digest(model: nn.Module) -> str | None:
    """A fingerprint of the parameters that a checkpoint leaves out: of a few numbers of each."""
    digest, frozen = hashlib.sha256(), frozen_names(model)
    for name, parameter in model.named_parameters():
        if name in frozen:
            some = parameter.detach().flatten()[:64].float().cpu()
            digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest() if frozen else None


def _optimized_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of an optimiser's parameters, in its order."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _flatten(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Per-parameter state as 'parameter name/state name': tensor."""
    names = _optimized_names(optimizer, model)
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": value
        for index, values in state.items()
        for key, value in values.items()
    }


def _unflatten(
    optimizer: torch.optim.Optimizer, model: nn.Module, moments: dict[str, Tensor]
) -> None:
    names = _optimized_names(optimizer, model)
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        name, _, kind = key.rpartition("/")
        state.setdefault(index_of[name], {})[kind] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
