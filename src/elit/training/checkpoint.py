"""Checkpoints of a run, by PyTorch's distributed checkpoint in safetensors files.

checkpoints/step-00001000/
shard-00001-model-00001-of-00001.safetensors   of each process that held something of its own:
                                               model.NAME, ema.NAME, optimizer.NAME/MOMENT,
                                               projector.NAME of representation alignment
state.json                                     step, what else the loop must know, and checksums

Each process writes what it holds, in the background, into a folder aside that the first one renames
when all have finished. Another number of processes reads them back, sharded or not.
"""

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
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.tensor import DTensor

from elit._files import digest_of, json_text, remove_folder, rename_folder, sha256_of
from elit.training.distributed import World, is_of_connection
from elit.training.resume import STATE, check_files, check_names, unreadable, unwritable

_NAME = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Name of what belongs to a step: `step-00001000`."""
    return f"step-{step:08d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in order."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


class Checkpoints:
    """The last `keep` checkpoints of a run: one at a time is written while training goes on.

    All processes of the run call `save` and `load` together.

    Attributes:
        begun: step of the last one that was begun, or loaded.
        saved: step of the last one that is known to be complete; 0 for none.
    """

    def __init__(self, folder: Path, world: World, keep: int):
        self.folder, self.world, self.keep = folder, world, keep
        self.begun = self.saved = 0
        # It says so whenever there is one process; in a thread, so for the whole program.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        # Of its own: the background thread's messages must not mix with those of training.
        self.group = world.new_cpu_group()
        self._writing: Future | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; the tensors may change as soon as this returns."""
        self.wait()
        writing: Future = Future()
        self.begun, self._writing = step, writing
        aside = self.folder / f".{step_name(step)}.part"
        written = dcp.async_save(
            self._share(tensors),
            storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True),
            process_group=self.group,
            no_dist=self.world.size == 1,
        )
        assert isinstance(written, Future)  # staged already, as no other stager was asked for

        def complete(written: Future) -> None:
            """In the thread that wrote: what is complete has its name, whatever training does."""
            try:
                written.result()
                if self.world.is_main:
                    self._name(aside, step, state)
                writing.set_result(step)
            except BaseException as error:
                if self.world.is_main:
                    shutil.rmtree(aside, ignore_errors=True)  # makes room on a full disk
                writing.set_exception(unwritable(self.folder / step_name(step), error))

        written.add_done_callback(complete)

    def _share(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this process writes: its shards, and its part of what all hold whole."""
        copies = [name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)]
        others = {name for i, name in enumerate(copies) if i % self.world.size != self.world.rank}
        return {name: tensor for name, tensor in tensors.items() if name not in others}

    def _name(self, aside: Path, step: int, state: Mapping[str, Any]) -> None:
        """Give a checkpoint that all have written its name, and remove the oldest."""
        files = {file.name: sha256_of(file) for file in sorted(aside.iterdir())}
        content = {"step": step, **json.loads(json.dumps(state)), "files": files}
        (aside / STATE).write_text(json_text({**content, "digest": digest_of(content)}))
        rename_folder(aside, self.folder / step_name(step))
        for old in checkpoint_steps(self.folder)[: -self.keep]:
            remove_folder(self.folder / step_name(old))

    def remove_leftovers(self) -> None:
        """Remove what a killed run left half written or half removed."""
        for pattern in (".step-*.part", ".step-*.removed"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)

    @property
    def has_failed(self) -> bool:
        """Whether the one being written could not be; `wait` raises the error."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def wait(self) -> None:
        """Wait for what is being written, or raise an OSError if it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self.saved = writing.result()

    def load(self, step: int, tensors: dict[str, Tensor], keys: Sequence[str]) -> dict[str, Any]:
        """Fill tensors in place, by name, and return these keys of the state.

        Raises:
            ValueError: for a checkpoint that is damaged, or of another model.
        """
        path = self.folder / step_name(step)
        reader = HuggingFaceStorageReader(str(path))
        state, problem = {}, None
        try:
            state = json.loads((path / STATE).read_text())
            check_files(path, step, state, self.world)
            check_names(reader.read_metadata().state_dict_metadata, tensors)
            state = {key: state[key] for key in keys}
        except Exception as error:  # of many kinds: the files may hold anything
            problem = error
        (any_problem,) = self.world.any(problem is not None)
        if problem is not None:
            raise unreadable(path, problem) from problem
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
            raise unreadable(path, error) from error
        self.begun = self.saved = step
        return state


def run_tensors(
    model: nn.Module,
    averaged: list[Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    projector: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Everything of a run that is a tensor, by name; what is frozen stays where it came from.

    The averages are in the order of the trained parameters; AdamW need not have made its state.
    A projector is trained along, and has no averages.
    """
    parameters = dict(model.named_parameters())
    frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    trained = {name: p for name, p in parameters.items() if name not in frozen}
    tensors = {f"model.{n}": t for n, t in model.state_dict().items() if n not in frozen}
    tensors |= {f"ema.{n}": t for n, t in zip(trained, averaged, strict=True)}
    beside = dict(projector.named_parameters(prefix="projector")) if projector else {}
    tensors |= beside
    part_of = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, parameter in (trained | beside).items():
        optimizer = part_of[parameter]
        if parameter not in optimizer.state:  # AdamW would make it in its first step
            place = parameter.device if optimizer.defaults["fused"] else "cpu"
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=place), **moments}
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}/{key}"] = value
    return {name: tensor.detach() for name, tensor in tensors.items()}
