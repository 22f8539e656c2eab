"""Tiny training runs, for the tests of what trains."""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from elit import ElitPipeline, create_model, make_scheduler
from elit._files import locked
from elit._plain import from_plain
from elit.cli.main import main
from elit.data.digits import Digits
from elit.training.config import TrainConfig
from elit.training.distributed import World
from elit.training.loop import train

CPU = World(0, 1, torch.device("cpu"))
TINY = {"hidden_size": 32, "num_heads": 2, "depth": 3}


def tiny_config(folder: Path, steps: int = 6, **changes) -> TrainConfig:
    """A run of seconds; `changes` are keywords of its sections, as `train_log_every=1`."""
    values = {
        "model": {"preset": "elit-dit-tiny/2", "overrides": dict(TINY)},
        "data": {"batch_size": 4},
        "optimizer": {"lr": 1e-3, "warmup_steps": 3, "ema": 0.9},
        "train": {"steps": steps, "log_every": 1, "validate_every": 0, "sample_every": 0,
                  "checkpoint_every": 2, "device": "cpu"},
        "sample": {"steps": 2, "columns": 2},
        "output_dir": str(folder), "seed": 3,
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("_")
        values.setdefault(section, {})[name] = value
    return from_plain(TrainConfig, values)


def scheduled_run(folder: Path, steps: int, std: float, **sizes: int) -> Path:
    """A pipeline of random weights that could draw digits, and what `elit schedule` measures."""
    torch.manual_seed(0)
    model = create_model("elit-dit-tiny/4", hidden_size=16, num_heads=2, num_classes=10, **sizes)
    for parameter in model.parameters():  # what starts at 0 would make all velocities alike
        parameter.data += std * torch.randn_like(parameter)
    ElitPipeline(model, make_scheduler("euler")).save_pretrained(folder)
    words = f"--data digits --images 4 --steps {steps} --draws 2 --device cpu --json"
    assert main(["schedule", str(folder), *words.split()]) == 0
    return folder


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def launch(config: TrainConfig, *prefix: str, **options: Any) -> subprocess.CompletedProcess:
    """Run `elit train` on a config in a process of its own, that imports everything anew."""
    file = Path(f"{config.output_dir}.yaml")
    file.write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, *prefix, "-m", "elit", "train", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def timeless(folder: Path) -> list[dict]:
    """Metrics that are the same in the same run."""
    timed = {"images_per_second", "tflops_per_second", "data_wait", "memory_gb"}
    return [{k: v for k, v in line.items() if k not in timed} for line in metrics(folder)]


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The splits of the digits that are read in a test."""
    splits, before = [], Digits.__init__

    def note(dataset: Digits, split: str) -> None:
        splits.append(split)
        before(dataset, split)

    monkeypatch.setattr(Digits, "__init__", note)
    return splits


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def files_of(folder: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds that was not sharded; copies are written by one process each."""
    kinds: dict[str, dict[str, torch.Tensor]] = {
        kind: {} for kind in ("model", "ema", "optimizer", "projector")
    }
    for file in (folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            kind, _, rest = name.partition(".")
            assert rest not in kinds[kind]
            kinds[kind][rest] = tensor
    return kinds


def assert_same_run(one: Path, other: Path, step: int) -> None:
    for kind, tensors in files_of(one, step).items():
        others = files_of(other, step)[kind]
        assert tensors.keys() == others.keys()
        torch.testing.assert_close(others, tensors, rtol=0, atol=0)


# Ranks are forked from a process that has imported everything: torchrun would import it anew in
# each of them, which takes far longer than these runs do.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(  # the first collects no garbage while the others are imported
    ["no_garbage", "elit.training.loop", "elit.training.preflight", "elit.pipelines.elit_pipeline",
     "elit.evaluation.sweep", "elit.preparation.run", "matplotlib.backends.backend_agg",
     "sklearn.datasets", __name__]
)  # fmt: skip


def _command(words: list[str], log: str, apart: bool, variables: dict[str, str]) -> None:
    if apart:
        os.setsid()
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
    os.environ |= variables
    gc.enable()
    multiprocessing.set_start_method(None, force=True)  # or loaders' workers import it all again
    torch.set_num_threads(1)
    code = main(words)
    sys.stdout.flush()
    os._exit(code)


def fork_elit(words: list[str], log: Path, apart: bool = False, **variables: str) -> BaseProcess:
    """Start `elit` in a fork: out and err go to `log`.out and `log`.err.

    Apart: in a session of its own, so that its process group is it and its children.
    """
    process = _FORKS.Process(target=_command, args=(words, str(log), apart, variables))
    process.start()
    return process


def fork_command(config: TrainConfig, file: Path, apart: bool = False) -> BaseProcess:
    """Start `elit train` on a config in a fork."""
    file.write_text(yaml.safe_dump(config.to_dict()))
    return fork_elit(["train", str(file)], file, apart)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[BaseProcess]:
    """A process that keeps a folder for itself, with a child that outlives it."""
    forked, ready = multiprocessing.get_context("fork"), folder.with_name(f"{folder.name}.held")

    def hold() -> None:
        with locked(folder, "it is held already"):
            child = os.fork()
            if child:
                ready.write_text(str(child))
            time.sleep(60)

    process = forked.Process(target=hold)
    process.start()
    wait_for(lambda: ready.exists() and ready.read_text())
    try:
        yield process
    finally:
        process.kill()
        process.join()
        os.kill(int(ready.read_text()), signal.SIGKILL)


def _train_as_rank(rank: int, size: int, port: int, config: TrainConfig, apart: bool) -> None:
    """What torchrun sets, then the run; what it raises goes into a file."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    gc.enable()
    torch.set_num_threads(1)
    errors = f"{config.output_dir}.error{rank}"
    if apart:
        config.output_dir = f"{config.output_dir}/{rank}"
    try:
        train(config, progress=False)
    except Exception as error:
        Path(errors).write_text(f"{type(error).__name__}: {error}")
        os._exit(1)


def start_ranks(config: TrainConfig, size: int, apart: bool = False) -> list[BaseProcess]:
    """Start a run in several processes, without anything that watches over them.

    Apart: each has an output folder of its own, output_dir/rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        _FORKS.Process(target=_train_as_rank, args=(rank, size, port, config, apart), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return ranks


def errors_of(config: TrainConfig) -> dict[int, str]:
    """What each rank raised."""
    folder = Path(config.output_dir)
    files = folder.parent.glob(f"{folder.name}.error*")
    return {int(file.suffix.removeprefix(".error")): file.read_text() for file in files}


def run_ranks(config: TrainConfig, size: int, seconds: float = 300) -> None:
    """Train in several processes, to the end."""
    ranks = start_ranks(config, size)
    for process in ranks:
        process.join(seconds)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * size, (codes, errors_of(config))
