"""Checkpoints of a run, by PyTorch's distributed checkpoint in safetensors files.

checkpoints/step-00001000/
shard-00001-model-00001-of-00001.safetensors   of each process that held something of its own:
                                               model.NAME, ema.NAME, optimizer.NAME/MOMENT
state.json                                     step, what else the loop must know, and checksums

Each process writes what it holds, in the background, into a folder aside that the first one renames
when all have finished. Another number of processes reads them back, sharded or not.
"""

import errno
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.tensor import DTensor

from elit._files import digest_of, json_text, sha256_of
from elit.training.distributed import World, is_of_connection
from elit.training.folder import remove_folder, rename_folder

_NAME = re.compile(r"step-(\d{8,})")
STATE = "state.json"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in order."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


class Checkpoints:
    """The checkpoints of a run: one at a time is written while training goes on.

    Args:
        folder: of the checkpoints.
        world: the processes of the run; all call `save` together.
        keep: how many of the last ones to keep.
    """

    def __init__(self, folder: Path, world: World, keep: int):
        self.folder, self.world, self.keep = folder, world, keep
        # It says so whenever there is one process; in a thread, so for the whole program.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        # Of its own: the background thread's messages must not mix with those of training.
        self.group = world.new_cpu_group()
        self._writing: Future | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; the tensors may change as soon as this returns.

        Args:
            step: number of the step.
            tensors: by name.
            state: plain types.
        """
        self.wait()
        writing = self._writing = Future()
        writer = HuggingFaceStorageWriter(str(self._aside(step)), save_distributed=True)
        written = dcp.async_save(
            self._share(tensors),
            storage_writer=writer,
            process_group=self.group,
            no_dist=self.world.size == 1,
        )
        assert isinstance(written, Future)  # staged already, as no other stager was asked for

        def complete(written: Future) -> None:
            """In the thread that wrote: what is complete has its name, whatever training does."""
            try:
                written.result()
                if self.world.is_main:
                    self._name(step, state)
                writing.set_result(step)
            except BaseException as error:
                if self.world.is_main:
                    shutil.rmtree(
                        self._aside(step), ignore_errors=True
                    )  # makes room on a full disk
                writing.set_exception(_write_error(self.folder / f"step-{step:08d}", error))

        written.add_done_callback(complete)

    def _share(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this process writes: its shards, and its part of what all hold whole."""
        copies = [name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)]
        others = {name for i, name in enumerate(copies) if i % self.world.size != self.world.rank}
        return {name: tensor for name, tensor in tensors.items() if name not in others}

    def _name(self, step: int, state: Mapping[str, Any]) -> None:
        """Give a checkpoint that all have written its name, and remove the oldest."""
        aside = self._aside(step)
        files = {file.name: sha256_of(file) for file in sorted(aside.iterdir())}
        whole = {"step": step, **json.loads(json.dumps(state)), "files": files}
        (aside / STATE).write_text(json_text({**whole, "digest": digest_of(whole)}))
        rename_folder(aside, self.folder / f"step-{step:08d}")
        for old in checkpoint_steps(self.folder)[: -self.keep]:
            remove_folder(self.folder / f"step-{old:08d}")

    @property
    def has_failed(self) -> bool:
        """Whether the one being written could not be; `wait` raises the error."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def poll(self) -> int | None:
        """The step of a checkpoint that has been written since; None if there is nothing new."""
        is_done = self._writing is not None and self._writing.done() and not self.has_failed
        return self.wait() if is_done else None

    def wait(self) -> int | None:
        """Wait for what is being written; its step, or None if there was nothing.

        Raises:
            OSError: if it could not be written.
        """
        writing, self._writing = self._writing, None
        return None if writing is None else writing.result()

    def _aside(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.part"

    def load(self, step: int, tensors: dict[str, Tensor], keys: Sequence[str]) -> dict[str, Any]:
        """Fill tensors in place, by name, and return the state; ValueError for a damaged one.

        Args:
            step: number of the step.
            tensors: as they were saved, by name.
            keys: of the state.
        """
        path = self.folder / f"step-{step:08d}"
        reader = HuggingFaceStorageReader(str(path))
        state, problem = {}, None
        try:
            state = json.loads((path / STATE).read_text())
            self._check_files(path, step, state)
            _check_names(reader, tensors)
            state = {key: state[key] for key in keys}
        except Exception as error:  # of many kinds: the files may hold anything
            problem = error
        (any_problem,) = self.world.any(problem is not None)
        if problem is not None:
            raise _read_error(path, problem) from problem
        if any_problem:
            raise ValueError(f"checkpoint {path} cannot be read by another process, which says why")
        try:
            dcp.load(
                tensors,
                storage_reader=reader,
                process_group=self.group,
                no_dist=self.world.size == 1,
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and is_of_connection(error):
                raise
            raise _read_error(path, error) from error
        return state

    def _check_files(self, path: Path, step: int, state: Mapping[str, Any]) -> None:
        """Raise a ValueError for a checkpoint that is not as it was written.

        Each process reads its share of the files. Early checkpoints know their sizes alone.
        """
        files = state["files"]
        found = {file.name for file in path.glob("*.safetensors")}
        if different := sorted(found ^ files.keys()):
            raise ValueError(f"{different[0]} is missing, or was put there by something else")
        whole = {key: value for key, value in state.items() if key != "digest"}
        is_early = all(isinstance(written, int) for written in files.values())
        if state["step"] != step or not (is_early or state.get("digest") == digest_of(whole)):
            raise ValueError(f"{STATE} is not as it was written")
        for name, written in list(files.items())[self.world.rank :: self.world.size]:
            file = path / name
            if written != (file.stat().st_size if isinstance(written, int) else sha256_of(file)):
                raise ValueError(f"{name} is not as it was written")


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, as far as it can be read: `load` says what is wrong with it."""
    try:
        state = json.loads((path / STATE).read_text())
        return state if isinstance(state.get("config", {}).get("data", {}), dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _check_names(reader: HuggingFaceStorageReader, tensors: Mapping[str, Tensor]) -> None:
    """Raise a KeyError for tensors that only one side has."""
    different = sorted(tensors.keys() ^ reader.read_metadata().state_dict_metadata.keys())
    if different:
        others = f" and {len(different) - 1} others" if len(different) > 1 else ""
        raise KeyError(f"{different[0]}{others}: in only one of checkpoint and model")


def _read_error(path: Path, error: BaseException) -> ValueError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ValueError(
        f"checkpoint {path} cannot be read: {reason}; remove that folder to resume from the "
        f"checkpoint before it, or choose another output_dir"
    )


def _write_error(target: Path, error: BaseException) -> Exception:
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


# ---- what is in one ----


def run_tensors(
    model: nn.Module, averaged: list[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Everything of a run that is a tensor, by name; what is frozen stays where it came from.

    Args:
        model: online weights.
        averaged: their moving average, in the order of the model's trained parameters.
        optimizer: AdamW, whose state need not be there yet.
    """
    frozen = frozen_names(model)
    trained = {n: p for n, p in model.named_parameters() if n not in frozen}
    tensors = {f"model.{n}": t for n, t in model.state_dict().items() if n not in frozen}
    tensors |= {f"ema.{n}": t for n, t in zip(trained, averaged, strict=True)}
    for name, parameter in trained.items():
        if parameter not in optimizer.state:
            start_state(optimizer, parameter)
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}/{key}"] = value
    return {name: tensor.detach() for name, tensor in tensors.items()}


def start_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """AdamW's state before its first step, which it would make by itself then."""
    is_fused = optimizer.defaults["fused"]
    optimizer.state[parameter] = {
        "step": torch.zeros((), device=parameter.device if is_fused else "cpu"),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def frozen_names(model: nn.Module) -> set[str]:
    """Parameters that are not trained: a checkpoint leaves them where they came from."""
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def frozen_digest(model: nn.Module) -> str | None:
    """A fingerprint of the parameters that a checkpoint leaves out: first numbers, and all summed.

    Sums of the bits, as whole numbers: no device rounds them.
    """
    digest, frozen = hashlib.sha256(), frozen_names(model)
    for name, parameter in model.named_parameters():
        if name in frozen:
            some = parameter.detach().flatten()[:64].float().cpu()
            digest.update(name.encode() + some.numpy().tobytes())
            bits = parameter.detach().contiguous().view(_BITS[parameter.element_size()])
            digest.update(str(int(bits.sum(dtype=torch.int64))).encode())
    return digest.hexdigest() if frozen else None
