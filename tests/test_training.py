"""The training loop: what it draws, saves, resumes, refuses and survives."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import (
    CPU,
    assert_same_run,
    errors_of,
    files_of,
    fork_command,
    held,
    metrics,
    start_ranks,
    timeless,
    tiny_config,
    wait_for,
)
from runs import reads as reads  # a fixture
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elit import ElitPipeline
from elit._files import digest_of
from elit._random import generator
from elit.cli.main import main
from elit.data import load_dataset
from elit.data.order import StepBatches
from elit.training.build import DataSets, build_model
from elit.training.checkpoint import checkpoint_steps
from elit.training.loop import TrainingDivergedError, batch_loss, train
from elit.training.resume import read_state
from elit.training.run import Run
from elit.training.validation import budgets_out_of_order, validation_losses

# ---- a run from beginning to end ----


def test_a_run_learns_and_leaves_what_it_promises(tmp_path) -> None:
    config = tiny_config(
        tmp_path, steps=40, train_validate_every=20, train_sample_every=40, data_batch_size=16,
        optimizer_lr=1e-2, train_tensorboard=True, train_checkpoint_every=20,
    )  # fmt: skip
    result = train(config, progress=False)
    assert result.finished
    assert result.step == 40
    lines = metrics(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    validation = [line for line in lines if "validation/loss_1" in line]
    assert [line["step"] for line in validation] == [20, 40]
    losses = {name for name in validation[0] if name.startswith("validation/loss_")}
    assert losses == {f"validation/loss_{b}" for b in ("1", "1/2", "1/4", "1/8", "1/16")}
    assert (tmp_path / "samples" / "step-00000040.png").stat().st_size > 100
    assert list((tmp_path / "tensorboard").iterdir())
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config.to_dict()

    pipeline = ElitPipeline.from_pretrained(tmp_path)
    saved = pipeline.transformer.state_dict()
    averaged = files_of(tmp_path, 40)["ema"]
    assert all(torch.equal(saved[name], averaged[name]) for name in averaged)
    online = files_of(tmp_path, 40)["model"]
    assert any(not torch.equal(online[name], averaged[name]) for name in averaged)


def test_more_steps_go_on_from_the_last_checkpoint(tmp_path) -> None:
    short = tiny_config(tmp_path / "a", 4, train_checkpoint_every=1, train_keep_checkpoints=2)
    train(short, progress=False)
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir()) == [
        "step-00000003", "step-00000004",
    ]  # fmt: skip
    shutil.copytree(tmp_path / "a", tmp_path / "before")
    again = train(short, progress=False)  # finished: nothing to do
    assert (again.step, again.finished) == (4, True)
    before = read_state(tmp_path / "a" / "checkpoints" / "step-00000004")["seconds"]
    assert again.seconds > before  # of all calls
    assert_same_run(tmp_path / "before", tmp_path / "a", 4)
    more = train(tiny_config(tmp_path / "a", steps=7), progress=False)
    assert more.seconds > before
    train(tiny_config(tmp_path / "b", steps=7), progress=False)
    assert_same_run(tmp_path / "a", tmp_path / "b", 7)
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
    assert [line["step"] for line in metrics(tmp_path / "a")] == list(range(1, 8))


def test_data_are_read_once(tmp_path, reads) -> None:
    """By the checks in front of a run, which hand them on."""
    flags = "--train.steps 1 --train.validate_every 0 --train.sample_every 0 --output_dir"
    assert main(["train", "digits", *flags.split(), str(tmp_path / "run")]) == 0
    assert reads == ["train", "validation"]
    shapes = [load_dataset("shapes", split, count=40, size=16) for split in reads]
    assert train(tiny_config(tmp_path / "own", 1), progress=False, data=DataSets(*shapes)).finished
    assert len(reads) == 2


def test_a_cosine_that_is_made_longer_is_told(tmp_path, caplog) -> None:
    options = {"optimizer_schedule": "cosine", "optimizer_warmup_steps": 1, "optimizer_lr": 1e-3}
    train(tiny_config(tmp_path / "a", steps=4, **options), progress=False)
    train(tiny_config(tmp_path / "a", steps=4, **options), progress=False)
    assert "learning rate" not in caplog.text
    train(tiny_config(tmp_path / "a", steps=8, **options), progress=False)
    assert "the learning rate jumps from 0 to 0.0005 at step 4: train.steps was 4, now 8" in (
        caplog.text
    )
    assert "give optimizer.schedule=constant" in caplog.text
    caplog.clear()
    constant = {"optimizer_lr": 1e-3, "optimizer_warmup_steps": 1}
    for steps in (2, 4):
        train(tiny_config(tmp_path / "b", steps=steps, **constant), progress=False)
    assert "learning rate" not in caplog.text


# ---- kills and signals ----


def test_a_run_killed_at_a_random_moment_resumes_to_the_same_weights(tmp_path) -> None:
    steps = 14
    changes = {"train_validate_every": 4, "sample_budgets": [1 / 4, 1 / 16]}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(tiny_config(whole, steps, **changes), progress=False)
    config = tiny_config(killed, steps, **changes)
    config.train.keep_checkpoints = 100
    process = fork_command(config, tmp_path / "killed.yaml")
    wait_for(lambda: checkpoint_steps(killed / "checkpoints") or not process.is_alive())
    time.sleep(random.Random().uniform(0, 0.3))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "finished before the kill: give it more steps"
    done = checkpoint_steps(killed / "checkpoints")[-1]
    assert done < steps
    result = train(tiny_config(killed, steps, **changes), progress=False)
    assert result.step == steps
    assert_same_run(whole, killed, steps)
    assert timeless(whole) == timeless(killed)


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 1)],
)
def test_a_signal_saves_first(tmp_path, number, workers) -> None:
    """With workers it goes to the whole group, as service managers send it: they get it too."""
    folder = tmp_path / "run"
    config = tiny_config(folder, steps=100_000, train_checkpoint_every=0, data_num_workers=workers)
    file, log = tmp_path / "run.yaml", folder / "metrics.jsonl"
    process = fork_command(config, file, apart=workers > 0)
    wait_for(lambda: (log.exists() and log.stat().st_size) or not process.is_alive())
    (os.killpg if workers else os.kill)(process.pid, number)
    process.join(60)
    assert process.exitcode == 130, Path(f"{file}.err").read_text()
    assert "the same command again goes on" in Path(f"{file}.out").read_text()
    (step,) = checkpoint_steps(folder / "checkpoints")
    assert metrics(folder)[-1]["step"] == step
    ElitPipeline.from_pretrained(folder)


def test_what_a_kill_left_half_written_is_ignored(tmp_path) -> None:
    train(tiny_config(tmp_path / "a", steps=4), progress=False)
    torn = tmp_path / "a" / "checkpoints" / ".step-00000006.part"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    train(tiny_config(tmp_path / "a", steps=6), progress=False)
    train(tiny_config(tmp_path / "b", steps=6), progress=False)
    assert_same_run(tmp_path / "a", tmp_path / "b", 6)
    assert [line["step"] for line in metrics(tmp_path / "a")] == list(range(1, 7))
    assert not torn.exists()


# ---- what goes wrong ----


def test_two_processes_do_not_share_a_folder(tmp_path) -> None:
    folder = tmp_path / "run"
    with held(folder) as holder:
        with pytest.raises(ValueError, match=r"another process trains in .*another output_dir"):
            train(tiny_config(folder, steps=2), progress=False)
        assert [path.name for path in folder.iterdir()] == [".lock"]
        holder.kill()
        holder.join()
        train(tiny_config(folder, steps=2), progress=False)


def test_processes_that_find_different_checkpoints_are_told(tmp_path) -> None:
    train(tiny_config(tmp_path / "0", steps=2), progress=False)
    config = tiny_config(tmp_path, steps=4)
    ranks = start_ranks(config, 2, apart=True)  # as with a folder on each node's own disk
    try:
        for rank in ranks:
            rank.join(120)
        assert [rank.exitcode for rank in ranks] == [1, 1]
    finally:
        for rank in ranks:
            rank.kill()
    told = errors_of(config)
    assert told.keys() == {0, 1}
    for message in told.values():
        assert "different last checkpoints" in message
        assert "of the steps [2, 0]: output_dir must be one folder" in message


def test_several_processes_cannot_share_a_device(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("elit.training.distributed.pick_device", lambda *_: torch.device("mps"))
    with pytest.raises(ValueError, match=r"2 processes cannot share the device 'mps'; use cuda"):
        train(tiny_config(tmp_path, train_device="mps"), progress=False)


# 1e30 makes weights that are finite and of no use, 1e39 infinite ones.
@pytest.mark.parametrize(("lr", "checkpoint_every"), [(1e30, 0), (1e39, 1)])
def test_a_run_that_diverges_stops_and_spoils_nothing(tmp_path, lr, checkpoint_every) -> None:
    train(tiny_config(tmp_path, steps=4), progress=False)
    before = files_of(tmp_path, 4)
    weights = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    exported = weights.read_bytes()
    hot = tiny_config(tmp_path, steps=40, optimizer_lr=lr, train_checkpoint_every=checkpoint_every)
    with pytest.raises(
        TrainingDivergedError, match=r"not finite.*checkpoint: step 4\).*lower optimizer\.lr"
    ):
        train(hot, progress=False)
    assert checkpoint_steps(tmp_path / "checkpoints")[-1] == 4
    after = files_of(tmp_path, 4)
    assert all(torch.equal(t, before["model"][k]) for k, t in after["model"].items())
    assert weights.read_bytes() == exported


def rewrite(file: Path, changes: dict[str, Any], **state: Any) -> None:
    """Change tensors, None for none, and the state, as if they had been written so."""
    with safe_open(file, framework="pt") as opened:
        layout = opened.metadata()  # of the shards, by name
    tensors = load_file(file) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, file, layout)
    there = json.loads(file.with_name("state.json").read_text()) | state
    file.with_name("state.json").write_text(json.dumps(there))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of a run at its step 2."""
    folder = tmp_path_factory.mktemp("saved")
    train(tiny_config(folder, steps=2), progress=False)
    return folder


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-5] + b"\x13" + file.read_bytes()[-4:]),
         "safetensors is not as it was written"),
        (lambda file: file.unlink(), "safetensors is missing, or was put there"),
        (lambda file: shutil.copy(file, file.with_name("shard-2.safetensors")),
         "is missing, or was put there"),
        (lambda file: rewrite(file, {}, ema_steps=1), r"state\.json is not as it was written"),
        (lambda file: file.parent.rename(file.parent.with_name("step-00000003")),
         r"state\.json is not as it was written"),
        # As early checkpoints have it: sizes alone.
        (lambda file: [rewrite(file, {"ema.read.latents": None}),
                       rewrite(file, {}, files={file.name: file.stat().st_size})],
         r"read\.latents"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named(saved, tmp_path, edit, reason) -> None:
    shutil.copytree(saved, tmp_path / "run")
    (file,) = (tmp_path / "run" / "checkpoints" / "step-00000002").glob("*.safetensors")
    edit(file)
    message = rf"step-0000000. cannot be read.*{reason}.*remove that folder"
    with pytest.raises(ValueError, match=message):
        train(tiny_config(tmp_path / "run", steps=4), progress=False)


@pytest.mark.parametrize(
    ("steps", "changes", "message"),
    [
        (1, {}, r"at step 2 already, beyond train\.steps=1; raise"),
        (4, {"data_batch_size": 8}, r"holds another run \(data: .*another output_dir"),
        (
            4,
            {"objective_prediction_type": "sample"},
            r"\(objective.prediction_type: velocity",
        ),
    ],
)
def test_another_run_in_the_same_folder_is_refused(saved, steps, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_config(saved, steps=steps, **changes), progress=False)


def test_what_an_older_checkpoint_does_not_name_was_as_by_default(saved, tmp_path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(file.read_text())
    for late in ("alignment", "optimizer.name", "objective.prediction_type"):
        del state["config"][late]
    del state["digest"]
    file.write_text(json.dumps({**state, "digest": digest_of(state)}))
    for changes in (
        {"objective_prediction_type": "sample"},
        {"optimizer_name": "muon"},
        {"alignment_weight": 0.5, "alignment_encoder": "classifier"},
    ):
        with pytest.raises(ValueError, match="holds another run"):
            train(tiny_config(tmp_path / "run", steps=3, **changes), progress=False)
    train(tiny_config(tmp_path / "run", steps=3), progress=False)
    assert metrics(tmp_path / "run")[-1]["step"] == 3


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train(tiny_config(tmp_path / "file" / "run"), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_preset": "dit-tiny/2", "latents_min": 2},
            "no effect on the plain model 'dit-tiny/2'",
        ),
        ({"latents_max": 17}, r"cannot keep 1\.\.17 latents .* <= 16"),
    ],
)
def test_latents_that_a_model_lacks_are_refused(tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_config(tmp_path, **changes), progress=False)


# ---- what a step draws ----

X = torch.ones(2, 2)


def test_a_plain_model_trains_and_ends_with_a_validation_and_a_sheet(tmp_path) -> None:
    often = {"train_validate_every": 4, "train_sample_every": 5}
    config = tiny_config(tmp_path / "a", model_preset="dit-tiny/2", **often)
    for _ in range(2):  # the second has nothing to do
        assert train(config, progress=False).finished
    validated = [line["step"] for line in metrics(tmp_path / "a") if "validation/loss_1" in line]
    assert validated == [4, 6]
    sheets = sorted(path.stem for path in (tmp_path / "a" / "samples").iterdir())
    assert sheets == ["step-00000005", "step-00000006"]
    train(tiny_config(tmp_path / "b"), progress=False)  # 0 is never
    assert not any("validation/loss_1" in line for line in metrics(tmp_path / "b"))
    assert not (tmp_path / "b" / "samples").exists()


def test_budgets_are_drawn_from_the_whole_range_and_by_step_alone(tmp_path) -> None:
    run = Run(tiny_config(tmp_path, latents_min=3, latents_max=9), CPU)
    draws = [run.draw_latents(step) for step in range(300)]
    assert {n for (n,), _ in draws} == set(range(3, 10))
    assert all(indices is None for _, indices in draws)
    assert [run.draw_latents(step)[0] for step in range(300)] == [n for n, _ in draws]
    assert run.model.min_latents == 3  # recorded with the weights: the guide's default
    assert run.shown_latents == [9, 4]
    run.close()


def test_random_dropping_keeps_any_latents(tmp_path) -> None:
    run = Run(tiny_config(tmp_path, latents_order="random"), CPU)
    seen = set()
    for step in range(100):
        (num_latents,), indices = run.draw_latents(step)
        assert len(indices) == num_latents
        assert indices.tolist() == sorted(set(indices.tolist()))
        seen |= set(indices.tolist())
    assert seen == set(range(16))
    run.close()


def test_every_epoch_visits_every_sample_once_in_another_order() -> None:
    batches = StepBatches(10, 4, range(1), 1, range(5), seed=0)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_a_later_start_and_other_processes_see_the_same_samples() -> None:
    whole = list(StepBatches(50, 8, range(4), 4, range(9), seed=1))
    late = list(StepBatches(50, 8, range(4), 4, range(5, 9), seed=1))
    assert whole[5 * 4 :] == late
    ranks = [list(StepBatches(50, 8, range(r * 2, r * 2 + 2), 4, range(9), seed=1)) for r in (0, 1)]
    merged = [ranks[c // 2][step * 2 + c % 2] for step in range(9) for c in range(4)]
    assert merged == whole


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size 6 cannot be cut into 4 .* multiple of 4"):
        StepBatches(50, 6, range(4), 4, range(9), seed=1)


def test_streams_of_randomness_are_independent() -> None:
    seeds = {
        generator(seed, stream, place).initial_seed()
        for seed in (0, 1)
        for stream in ("order", "noise", "budget")
        for place in range(20)
    }
    assert len(seeds) == 2 * 3 * 20


def test_the_learning_rate_warms_up_and_falls(tmp_path) -> None:
    config = tiny_config(tmp_path, steps=20, optimizer_schedule="cosine", optimizer_warmup_steps=5)
    config.optimizer.final_lr = 0.1
    run = Run(config, CPU)

    def lr(step: int) -> float:
        run.optimizer.set_learning_rate(step)
        return run.optimizer.lr / config.optimizer.lr

    rates = [lr(step) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert lr(5) == pytest.approx(1)
    assert lr(19) == pytest.approx(0.1)  # the last step
    run.close()


def test_labels_are_dropped_as_often_as_asked(tmp_path) -> None:
    run = Run(tiny_config(tmp_path, objective_label_dropout=0.3), CPU)
    seen: list[int] = []
    run.model.label_embed.register_forward_pre_hook(lambda _, args: seen.extend(args[0].tolist()))
    batch = load_dataset("digits").batch(range(100))
    for step in range(10):
        batch_loss(run, batch, step, 0, [1], None)
    assert 0.25 < seen.count(run.model.label_embed.null_label) / len(seen) < 0.35
    run.close()


# ---- validation ----


def test_validation_uses_the_same_noise_for_all_budgets(tmp_path) -> None:
    config = tiny_config(tmp_path)
    dataset = load_dataset("digits", "validation")
    model = build_model(config, dataset).eval()
    run = Run(config, CPU)
    losses = validation_losses(model, dataset, run.conditioning, run.density, [16, 1], 0, CPU)
    # Freshly initialised, the model predicts zero whatever the budget: the losses are equal.
    assert torch.equal(losses[16], losses[1])
    assert len(losses[16]) == len(dataset)
    # Zero velocity: the error is that of the target, E(noise - data)^2 = 1 + E data^2.
    data = dataset.batch(range(len(dataset)))["images"]
    assert losses[16].mean() == pytest.approx(1 + data.square().mean().item(), rel=0.02)
    run.close()


@pytest.mark.filterwarnings("error")
def test_budgets_out_of_order_are_reported_beyond_noise_only() -> None:
    small = torch.linspace(0.1, 0.9, 100)
    worse = small + 0.1 + 0.01 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    noisy = small + 0.5 * torch.randn(100, generator=torch.Generator().manual_seed(1))
    noisy = noisy - noisy.mean() + small.mean() + 1e-3
    (message,) = budgets_out_of_order({16: worse, 8: small})
    assert "16 latents per group" in message
    assert "than 8" in message
    assert budgets_out_of_order({16: small, 8: worse}) == []
    assert budgets_out_of_order({16: noisy, 8: small}) == []
    assert budgets_out_of_order({None: small}) == []
    one = torch.tensor([0.5])  # which has no error to tell
    assert budgets_out_of_order({16: one + 1, 8: one}) == []


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({"train_precision": "bf16"}, lambda run: (X @ X).dtype == torch.bfloat16),
        ({"train_gradient_checkpointing": True}, lambda run: run.model.gradient_checkpointing),
        ({"train_threads": 3}, lambda run: torch.get_num_threads() == 3),
    ],
)
def test_what_is_asked_for_is_what_the_run_uses(tmp_path, monkeypatch, change, holds) -> None:
    after_step, seen, before = Run.after_step, [], torch.get_num_threads()

    def watch(run: Run, *args) -> None:
        with run.autocast():
            seen.append(holds(run))
        after_step(run, *args)

    monkeypatch.setattr(Run, "after_step", watch)
    train(tiny_config(tmp_path, steps=2, **change), progress=False)
    assert seen == [True, True]
    assert torch.get_num_threads() == before


def test_loader_workers_change_nothing(tmp_path) -> None:
    train(tiny_config(tmp_path / "a", steps=4), progress=False)
    config = tiny_config(tmp_path / "b", steps=4, data_num_workers=2)
    train(config, progress=False)
    assert_same_run(tmp_path / "a", tmp_path / "b", 4)
