"""One run over several processes: copies or shards, in any number, are the same run."""

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import (
    CPU,
    assert_same_run,
    errors_of,
    launch,
    metrics,
    run_ranks,
    start_ranks,
    tiny_config,
    wait_for,
)
from safetensors.torch import load_file

from elit import ElitPipeline
from elit.training.checkpoint import checkpoint_steps
from elit.training.config import LoopConfig, TrainConfig
from elit.training.distributed import matrix_products, shard_size
from elit.training.loop import ROWS_AT_ONCE, draw_rows, train
from elit.training.optimizer import LEAST_SCALE
from elit.training.run import Run

STEPS, EVERY, BATCH = 8, 4, 8


def scaled_config(folder: Path, steps: int = STEPS, **changes) -> TrainConfig:
    changes = {
        "data_batch_size": BATCH, "train_checkpoint_every": EVERY, "sample_budgets": [1, 1 / 16]
    } | changes  # fmt: skip
    return tiny_config(folder, steps, **changes)


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def assert_same_results(one: Path, other: Path, atol: float = 2e-6) -> None:
    """Losses, averaged weights and validation are equal to float tolerance."""
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    weights, others = exported(one), exported(other)
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=atol, msg=name)
    for line, same in zip(metrics(one), metrics(other), strict=True):
        for key in line:
            if key.startswith("validation/loss"):
                assert same[key] == pytest.approx(line[key], rel=1e-4)


def forget_last(folder: Path) -> None:
    """Leave a run where it was one checkpoint before."""
    shutil.rmtree(
        folder / "checkpoints" / f"step-{checkpoint_steps(folder / 'checkpoints')[-1]:08d}"
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run of one process, with two micro-batches a step."""
    folder = tmp_path_factory.mktemp("scale") / "alone"
    train(scaled_config(folder, train_accumulation=2, train_validate_every=EVERY), progress=False)
    return folder


# ---- shards ----


def test_other_micro_batches_are_the_same_run(alone, tmp_path) -> None:
    train(scaled_config(tmp_path / "one", train_validate_every=EVERY), progress=False)
    assert_same_results(alone, tmp_path / "one")


def test_shards_train_as_a_copy_does_and_resume_on_one_process(alone, tmp_path) -> None:
    config = scaled_config(tmp_path / "shards", train_parallel="fsdp", train_validate_every=EVERY)
    run_ranks(config, 2)
    assert_same_results(alone, tmp_path / "shards")
    ElitPipeline.from_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards/checkpoints/step-00000008").glob("shard-*"))) == 2

    forget_last(tmp_path / "shards")
    train(scaled_config(tmp_path / "shards", train_validate_every=EVERY), progress=False)
    assert_same_results(alone, tmp_path / "shards")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (4, {"train_parallel": "fsdp"}),
        (4, {"train_parallel": "hsdp", "train_shard_size": 2}),
        (4, {}),
        (2, {"train_parallel": "fsdp", "train_accumulation": 2}),
        (2, {"train_parallel": "fsdp", "train_gradient_checkpointing": True}),
        (2, {"train_parallel": "fsdp", "train_compile": True}),
    ],
)
def test_any_number_of_processes_is_the_same_run(alone, tmp_path, processes, changes) -> None:
    run_ranks(scaled_config(tmp_path / "run", train_validate_every=EVERY, **changes), processes)
    assert_same_results(alone, tmp_path / "run")


@pytest.mark.slow
def test_torchrun_is_the_same_run(alone, tmp_path) -> None:
    config = scaled_config(tmp_path / "run", train_validate_every=EVERY)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --no-python"
    done = launch(config, *torchrun.split(), sys.executable)
    assert done.returncode == 0, done.stderr
    assert_same_results(alone, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("before", ["ddp", "fsdp"])
@pytest.mark.parametrize("after", ["ddp", "fsdp"])
def test_two_processes_resume_on_four(alone, tmp_path, before, after) -> None:
    run_ranks(scaled_config(tmp_path / "run", train_parallel=before, train_validate_every=EVERY), 2)
    forget_last(tmp_path / "run")
    run_ranks(scaled_config(tmp_path / "run", train_parallel=after, train_validate_every=EVERY), 4)
    assert_same_results(alone, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_shards_in_16_bits_stay_close(alone, tmp_path, precision) -> None:
    config = scaled_config(
        tmp_path / "run", train_parallel="fsdp", train_precision=precision, train_sample_every=STEPS
    )
    run_ranks(config, 2)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=5e-3)
    assert all(tensor.dtype == torch.float32 for tensor in exported(tmp_path / "run").values())
    assert (tmp_path / "run/samples/step-00000008.png").exists()


def test_a_copy_cannot_be_shared_by_a_number_that_does_not_divide() -> None:
    loop = LoopConfig(parallel="hsdp", shard_size=3)
    with pytest.raises(ValueError, match=r"shard_size=3 does not divide 4 processes.*divisor of 4"):
        shard_size(loop, 4)
    assert shard_size(LoopConfig(parallel="hsdp", shard_size=2), 4) == 2


# ---- noise ----


def test_a_row_draws_the_same_whoever_draws_it(tmp_path) -> None:
    run = Run(tiny_config(tmp_path), CPU)
    args = ((1, 4, 4), run.density, 3, 7, CPU.device, True)
    together, block = draw_rows(range(40), *args), ROWS_AT_ONCE
    for rows in (range(3), range(block - 1, block + 2), range(39, 40)):
        for part, all_rows in zip(draw_rows(rows, *args), together, strict=True):
            assert torch.equal(part, all_rows[rows.start : rows.stop])
    assert not torch.equal(together.noise[:block], together.noise[block : 2 * block])
    assert not torch.equal(together.noise, together.posterior)
    run.close()


# ---- fp16 ----


def test_fp16_skips_steps_that_overflow_and_goes_on(tmp_path) -> None:
    run = Run(tiny_config(tmp_path, train_precision="fp16"), CPU)
    before = [p.detach().clone() for p in run.trained]
    scale = run.optimizer.scaler.get_scale()
    run.optimizer.scaler.load_state_dict(
        {**run.optimizer.scaler.state_dict(), "_growth_tracker": 7}
    )
    run.optimizer.backward(sum((p * torch.inf).sum() for p in run.trained))
    assert not run.optimizer.clip().isfinite()
    assert run.optimizer.may_skip()
    run.optimizer.step(skip=True)
    assert all(torch.equal(p, old) for p, old in zip(run.trained, before, strict=True))
    assert run.optimizer.scaler.get_scale() == scale / 2
    assert run.optimizer.scaler.state_dict()["_growth_tracker"] == 0  # or it would grow at once
    run.optimizer.scaler.update(LEAST_SCALE)
    assert not run.optimizer.may_skip()  # the run has diverged
    run.close()


def test_fp16_resumes_with_its_scale(tmp_path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(tiny_config(whole, 6, train_precision="fp16"), progress=False)
    for steps in (4, 6):
        train(tiny_config(halves, steps, train_precision="fp16"), progress=False)
    assert [line["loss_scale"] for line in metrics(halves)] == [65536.0] * 6
    state = json.loads((halves / "checkpoints/step-00000006/state.json").read_text())
    assert state["scaler"]["_growth_tracker"] == 6
    assert_same_run(whole, halves, 6)


# ---- faults ----


def kill_one_rank(folder: Path, moment: float) -> None:
    """Kill one of two ranks some time after the first step; the other has to end and say why."""
    config = scaled_config(folder, 400, train_checkpoint_every=3)
    ranks = start_ranks(config, 2)
    log = folder / "metrics.jsonl"
    wait_for(lambda: (log.exists() and log.stat().st_size) or not ranks[0].is_alive(), 240)
    time.sleep(moment)
    victim = random.Random(moment).randrange(2)
    assert all(rank.is_alive() for rank in ranks), errors_of(config)
    os.kill(ranks[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    ranks[1 - victim].join(60)
    assert time.monotonic() - killed < 60
    assert not ranks[1 - victim].is_alive()
    assert ranks[1 - victim].exitcode == 1
    (message,) = errors_of(config).values()
    assert re.match(r"ProcessLostError: process \d of 2 lost another one.*last checkpoint", message)


def assert_resumes_right(folder: Path, reference: Path) -> None:
    """Losses of the steps after a resume are those of a run that was never killed."""
    steps = max(checkpoint_steps(folder / "checkpoints"), default=0) + 2
    assert steps <= len(losses(reference)), "the reference is too short"
    train(scaled_config(folder, steps, train_checkpoint_every=3), progress=False)
    assert losses(folder) == pytest.approx(losses(reference)[:steps], rel=1e-4)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "run"
    train(scaled_config(folder, 400, train_checkpoint_every=100), progress=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(20))
def test_when_one_process_is_killed_the_other_ends_and_the_run_goes_on(
    long_run, tmp_path, attempt
) -> None:
    kill_one_rank(tmp_path / "run", random.Random(attempt).uniform(0, 1.5))
    assert_resumes_right(tmp_path / "run", long_run)


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path) -> None:
    """No file may grow beyond a limit: to the writer, that is a disk that is full."""
    train(tiny_config(tmp_path / "run", 2), progress=False)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = launch(tiny_config(tmp_path / "run", 6), preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert "file too large" in done.stderr.lower()
    assert "make room, then run the same command again" in done.stderr
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [2]
    for name in ("run", "whole"):
        train(tiny_config(tmp_path / name, 6), progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path) -> None:
    run = Run(tiny_config(tmp_path), CPU)
    (tmp_path / "checkpoints").write_text("in the way")
    run.checkpoints.save(1, {"model.weight": torch.zeros(3)}, {})
    while not run.checkpoints.has_failed:
        time.sleep(0.01)
    error = run.unsaved()
    assert "step-00000001" in str(error)
    assert "the checkpoints before it are as they were" in str(error)


def test_a_checkpoint_that_was_written_counts_when_the_next_step_diverges(tmp_path) -> None:
    run = Run(tiny_config(tmp_path), CPU)
    run.step = 4
    run.save()
    assert "last checkpoint: step 4" in str(run.diverged("loss"))
    assert checkpoint_steps(tmp_path / "checkpoints") == [4]


def test_a_disk_that_fills_up_at_any_moment_spoils_nothing(tmp_path) -> None:
    """The limit on a file's length is drawn anew for each of 8 checkpoints."""
    run = Run(tiny_config(tmp_path), CPU)
    run.checkpoints.save(1, run._tensors(), run._state())
    run.checkpoints.wait()
    assert run.checkpoints.saved == 1
    (file,) = (tmp_path / "checkpoints/step-00000001").glob("*.safetensors")
    before, draw = file.read_bytes(), random.Random(0)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for step in range(2, 10):
            resource.setrlimit(resource.RLIMIT_FSIZE, (draw.randrange(len(before)), most))
            run.checkpoints.save(step, run._tensors(), run._state())
            with pytest.raises(OSError, match="before it are as they were"):
                run.checkpoints.wait()
            assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == before
    run.checkpoints.save(10, run._tensors(), run._state())
    run.checkpoints.wait()
    assert run.checkpoints.saved == 10
    run.close()


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_for_gpus_and_for_the_run(tf32) -> None:
    before = torch.get_float32_matmul_precision()
    with matrix_products(torch.device("cuda"), tf32):
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    with matrix_products(torch.device("cpu"), True):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before
