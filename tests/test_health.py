"""What a run says of itself: metrics and where they go, what Read looks at, warnings, curves."""

import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_inputs, randomise, tiny_dit, tiny_elastic
from PIL import Image
from runs import CPU, metrics, tiny_config

from elit import elasticize
from elit.cli.main import main
from elit.cost.flops import cost_of, forward_flops, step_flops
from elit.interface.attention_maps import (
    attention_coverage,
    attention_entropy,
    attention_weights,
    watch_attention,
)
from elit.layers.transformer import CrossAttention
from elit.training.config import LoopConfig, OptimizerConfig, TrainConfig
from elit.training.distributed import World
from elit.training.loop import train
from elit.training.metrics import MetricsLog, draw_curves, read_metrics
from elit.training.run import Run
from elit.training.watch import (
    InterfaceWatch,
    Monitor,
    SpeedWatch,
    SpikeWatch,
    describe_rows,
    peak_memory,
    spike_message,
    watch_interface,
)
from elit.viz.charts import picture, run_chart

# ---- Read's attention ----


def test_attention_weights_are_those_that_attention_uses() -> None:
    attention = randomise(CrossAttention(32, 2))
    queries, context = torch.randn(5, 32), torch.randn(3, 7, 32)
    weights = attention_weights(attention, queries, context)
    assert weights.shape == (3, 2, 5, 7)
    value = attention.project(queries, context)[2]
    mixed = torch.einsum("bhst,bthd->bshd", weights, value).flatten(2)
    expected = attention(queries, context)
    torch.testing.assert_close(attention.to_out(mixed), expected, rtol=1e-4, atol=1e-5)


def test_watching_changes_nothing_and_leaves_nothing() -> None:
    model, maps = tiny_elastic(), []
    samples, levels, labels = make_inputs(model)
    before = model(samples, levels, labels, num_latents=3).sample
    names = set(vars(model.read.attention))
    with watch_attention(model.read.attention, maps.append):
        assert torch.equal(model(samples, levels, labels, num_latents=3).sample, before)
    model(samples, levels, labels, num_latents=3)
    assert [tuple(m.shape) for m in maps] == [(2 * 4, 2, 3, 16)]  # (B * G, H, n, P)
    assert set(vars(model.read.attention)) == names
    assert not model.read.attention._forward_pre_hooks


def test_entropy_and_coverage_of_known_weights() -> None:
    same = torch.zeros(1, 1, 4, 4)
    same[..., 2] = 1  # all queries look at one token
    own = torch.eye(4).view(1, 1, 4, 4)  # each at one of its own
    mean = torch.full((1, 1, 4, 4), 0.25)
    for weights, entropy, coverage in ((same, 0, 0.25), (own, 0, 1), (mean, np.log(4), 1)):
        assert attention_entropy(weights).mean().item() == pytest.approx(entropy)
        several = weights.expand(2, 3, 4, 4)
        assert attention_coverage(several).tolist() == pytest.approx([coverage] * 2)


def test_the_probe_sees_the_latents_at_each_budget() -> None:
    model = tiny_elastic()
    samples, levels, labels = make_inputs(model)
    outputs = {}
    hook = model.read.register_forward_hook(lambda m, i, latents: outputs.update(read=latents))
    with watch_interface(model) as probe:
        for n in (16, 2):
            model(samples, levels, labels, num_latents=n)
    hook.remove()
    seen = probe.values(CPU)
    assert list(seen) == [16, 2]
    assert seen[2]["latent_norm_read"] == pytest.approx(
        outputs["read"].square().mean().sqrt().item()
    )
    for values in seen.values():
        share = values["read_entropy"] / np.log(16)
        assert values["read_entropy_share"] == pytest.approx(share)
        assert 0 < share < 1
        assert 1 / 16 < values["read_coverage"] <= 1
        assert values["latent_norm"] != values["latent_norm_read"]
    assert not model._forward_pre_hooks
    assert not model.write._forward_pre_hooks
    with watch_interface(tiny_dit()) as probe:
        pass
    assert probe.values(CPU) == {}


@pytest.mark.slow
def test_the_probe_sees_through_compiled_blocks_and_accumulates_means() -> None:
    model = tiny_elastic()
    samples, levels, labels = make_inputs(model)
    with watch_interface(model) as probe:
        model(samples, levels, labels, num_latents=4)
    expected = probe.values(CPU)
    model.compile_repeated_blocks(backend="eager")
    with watch_interface(model) as probe:
        model(samples, levels, labels, num_latents=4)
        model(samples, levels, labels, num_latents=4)
    for name, value in probe.values(CPU)[4].items():
        assert value == pytest.approx(expected[4][name], rel=1e-4), name


@pytest.mark.parametrize(("init", "reads"), [("learned", True), ("identity", False)])
def test_a_retrofit_is_seen_too(init, reads) -> None:
    model = tiny_dit(patch_size=1)
    elasticize(model, 1, 1, 4, init=init)
    samples, levels, labels = make_inputs(model)
    with watch_interface(model) as probe:
        model(samples, levels, labels, num_latents=4)
    values = probe.values(CPU)[4]
    assert ("read_entropy" in values) == reads
    assert values["latent_norm"] > 0


# ---- spikes ----


def healthy(count: int, seed: int = 0) -> tuple[list[list[int]], list[float]]:
    """Losses that fall, jump with the budget and have the noise of small batches."""
    rng = np.random.default_rng(seed)
    kept = rng.integers(1, 17, count)
    losses = (0.3 + 1 / (1 + np.arange(count) / 50)) * kept**-0.4 * rng.lognormal(0, 0.1, count)
    return [[int(n)] for n in kept], losses.tolist()


def spikes_of(watch: SpikeWatch, kept: list, values: list[float], every: int = 50) -> list[int]:
    found = []
    for first in range(0, len(values), every):
        part = slice(first, first + every)
        found += [first + spike.at for spike in watch.update(kept[part], values[part])]
    return found


@pytest.mark.parametrize("seed", range(3))
def test_no_spike_where_the_loss_jumps_with_the_budget_alone(seed) -> None:
    kept, losses = healthy(2000, seed)
    assert spikes_of(SpikeWatch(least=1.5), kept, losses) == []


def test_a_spike_is_found_at_its_step_though_small_budgets_have_such_losses() -> None:
    kept, losses = healthy(1000)
    kept[700] = [16]
    usual = 0.3 * 16**-0.4
    losses[700] = 3 * usual
    assert losses[700] < max(losses[600:700])  # a threshold on the loss would miss it
    assert spikes_of(SpikeWatch(least=1.5), kept, losses) == [700]


def test_spikes_do_not_hide_others_and_what_is_not_finite_is_left_to_others() -> None:
    kept, losses = healthy(1000)
    planted = list(range(500, 540, 4))
    for step in planted:
        losses[step] *= 20
    losses[600], losses[601] = float("nan"), float("inf")
    assert spikes_of(SpikeWatch(least=1.5), kept, losses) == planted
    plain = [[None]] * 1000
    values = (0.5 * np.random.default_rng(0).lognormal(0, 0.1, 1000)).tolist()
    values[900] *= 4
    assert spikes_of(SpikeWatch(least=1.5), plain, values) == [900]


def test_messages_say_where_how_far_and_what_to_do() -> None:
    watch = SpikeWatch(least=1.5, warm_up=4)
    watch.update([[8]] * 8, [0.5] * 8)
    (spike,) = watch.update([[8]], [2.0])
    rows = describe_rows(list(range(100, 112)))
    message = spike_message("loss", spike, [8], "lower optimizer.lr") + rows
    assert "loss 2 is 4.0 times what is usual at num_latents 8 (0.5)" in message
    assert "optimizer.lr" in message
    assert message.endswith("rows of the data: 100, 101, 102, 103, 104, 105, 106, 107 and 4 more")
    assert "num_latents" not in spike_message("loss", spike, [None], "")
    assert "not finite: 7;" in describe_rows([3, 7], [7])
    assert describe_rows([]) == ""


def test_a_gradient_s_spike_says_what_it_was_clipped_to(caplog) -> None:
    config = TrainConfig(optimizer=OptimizerConfig(clip=0.75), train=LoopConfig(log_every=1))
    monitor = Monitor(config, CPU, tiny_dit(), range(100), 0, lambda step: [step])
    for step in range(1, 82):
        norm = torch.tensor(0.5 if step < 81 else 4.0)
        monitor.after_step(step, [None], torch.tensor(0.5), norm)
    assert caplog.messages == [
        "step 81: gradient norm 4 is 8.0 times what is usual (0.5); it was clipped to 0.75; if "
        "they come often, lower optimizer.lr or optimizer.clip; its rows of the data: 80"
    ]


def test_a_warning_comes_once_in_a_thousand_steps(caplog) -> None:
    monitor = Monitor(TrainConfig(), CPU, tiny_dit(), range(100), 0, lambda step: [step])
    for step in range(1, 2101, 100):
        monitor.warn("loss", step, "up")
    monitor.warn("gradient", 2050, "up")
    assert caplog.messages == [f"step {step}: up" for step in (1, 1001, 2001, 2050)]
    quiet = Monitor(TrainConfig(), World(1, 2, CPU.device), tiny_dit(), range(9), 0, lambda _: [])
    quiet.warn("loss", 1, "up")
    assert len(caplog.messages) == 4


# ---- speed, Read, latents ----


def test_waiting_and_slowness_are_told_after_two_bad_spans() -> None:
    def told(spans: list[tuple[float, float, float]]) -> list[list[str]]:
        watch = SpeedWatch()
        return [list(watch.update(10, waited, images, flops)) for waited, images, flops in spans]

    good = (0.5, 1000.0, 1e12)
    assert told([good] * 20) == [[]] * 20
    assert told([good] * 8 + [(0.5, 300, 3e11), good, (0.5, 300, 3e11)]) == [[]] * 11  # hiccups
    assert told([good] * 8 + [(0.5, 300, 3e11)] * 3) == [[]] * 9 + [["slow"], []]
    assert told([good] * 8 + [(0.5, 400, 1.2e12)] * 3) == [[]] * 11  # larger budgets
    assert told([good] * 2 + [(3.0, 1000, 1e12)] * 3) == [[]] * 3 + [["waiting"], []]
    watch = SpeedWatch()
    assert not any(watch.update(1, 1, 1, 1) for _ in range(19))
    assert "95%" in SpeedWatch().update(20, 19, 1, 1).get("waiting", "95%")
    assert "raise data.num_workers" in watch.update(1, 1, 1, 1)["waiting"]


def test_a_read_that_looks_at_nothing_or_at_all_is_told() -> None:
    good = {"read_entropy_share": 0.8, "read_coverage": 0.9, "latent_norm": 2.0}
    watch = InterfaceWatch()
    assert watch.update({16: good, 4: good}) == {}
    copies = good | {"read_entropy_share": 0.0}  # each latent has a token of its own
    assert watch.update({16: copies, 4: good}) == {}
    collapsed = good | {"read_entropy_share": 0.01, "read_coverage": 0.07}
    told = watch.update({16: good, 4: collapsed})
    assert "7% of a group's tokens at num_latents 4" in told["narrow"]
    uniform = good | {"read_entropy_share": 0.999}
    assert watch.update({16: uniform, 4: uniform}) == {}  # as at the start
    assert "entropy 99.9%" in watch.update({16: uniform, 4: uniform})["uniform"]
    assert watch.update({16: good, 4: uniform}) == {}


def test_latents_that_explode_and_budgets_that_are_alike_are_told() -> None:
    watch = InterfaceWatch()
    norms = [0.03, 5.0, 12.0, 20.0, 90.0, 300.0, 1100.0]
    told = [watch.update({8: {"latent_norm": norm}}) for norm in norms]
    assert [bool(messages) for messages in told] == [False] * 4 + [True, False, True]
    assert "90 at num_latents 8, 20 before" in told[4]["latents"]
    assert watch.update({}, [0.50000, 0.50001]) == {}
    assert "same at all budgets" in watch.update({}, [0.50000, 0.50001])["alike"]
    assert watch.update({}, [0.5, 0.51]) == {}
    assert watch.update({}, [0.5]) == {}


# ---- in a run ----


def test_a_healthy_run_is_silent_and_tells_its_numbers(tmp_path, caplog) -> None:
    config = tiny_config(
        tmp_path, steps=40, data_batch_size=8, train_log_every=10, train_validate_every=40,
        train_checkpoint_every=0, train_peak_tflops=0.5, optimizer_lr=3e-3,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        train(config, progress=False)
    ours = [r.getMessage() for r in caplog.records if r.name.endswith("watch")]
    assert ours == []
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    last = lines[-1]
    assert last["mfu"] == pytest.approx(last["tflops_per_second"] / 0.5)
    assert last["epoch"] == pytest.approx(40 * 8 / 1433)
    assert 0 < last["data_wait"] < 0.5
    assert 0.1 < last["memory_gb"] < 50
    assert {"grad_norm", "lr", "images_per_second", "loss_at/1", "loss_at/1/2"} <= set(last)
    images = last["tflops_per_second"] / last["images_per_second"]  # 3 forwards of a mean budget
    run = Run(config, CPU)
    least, most = (3 * forward_flops(run.model, n) / 1e12 for n in (1, 16))
    run.close()
    assert least < images < most
    validation = [line for line in metrics(tmp_path) if "validation/loss_1" in line]
    inside = {"read_entropy", "read_entropy_share", "read_coverage", "latent_norm",
              "latent_norm_read", "latent_spread", "latent_spread_read", "loss"}  # fmt: skip
    budgets = ("1", "1/2", "1/4", "1/8", "1/16")
    names = {f"validation/{name}_{budget}" for name in inside for budget in budgets}
    names -= {f"validation/latent_spread{end}_1/16" for end in ("", "_read")}  # of one latent
    worth = {f"validation/worth_of_{part}" for part in ("core", "interface")}
    assert set(validation[0]) == {"step", *names, *worth}
    with Image.open(tmp_path / "curves.png") as drawing:
        assert drawing.size == (800, 1250)


def test_the_cost_of_a_step_is_that_of_its_parts() -> None:
    model = tiny_elastic()
    wanted = 3 * (3 * forward_flops(model, 7) + 2 * forward_flops(model, 3))
    assert step_flops(cost_of(model), 5, [7, 3]) == wanted
    plain = tiny_dit()
    narrow, wide = (step_flops(cost_of(plain, size), 5, [None]) for size in ((8, 8), (8, 16)))
    assert narrow == 3 * 5 * forward_flops(plain)
    assert wide > 1.9 * narrow
    assert peak_memory(CPU.device) > 50e6


def test_rows_that_are_not_finite_are_named(tmp_path) -> None:
    run = Run(tiny_config(tmp_path), CPU)
    rows = run.rows_of(2)
    assert len(rows) == 4
    assert ", ".join(map(str, rows)) in run.monitor.blamed_rows(3)
    images = run.dataset.images.clone()
    images[rows[1], 0, 3, 3] = float("nan")
    run.dataset.images = images
    assert f"not finite: {rows[1]};" in run.monitor.blamed_rows(3)
    run.close()


# ---- sinks and curves ----


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "r").mkdir()
    log = MetricsLog(tmp_path / "r", 0, tiny_config(tmp_path, train_wandb="mine"))
    log.write(1, loss=0.123456)
    log.close()
    known = json.loads((tmp_path / "r" / "wandb.json").read_text())
    assert known["project"] == "mine"
    time.sleep(1.1)  # W&B names a run's folder by the second: within one they would share it
    log = MetricsLog(tmp_path / "r", 1, tiny_config(tmp_path, train_wandb="mine"))
    log.write(2, **{"validation/loss_1": 0.654321})
    log.close()
    assert json.loads((tmp_path / "r" / "wandb.json").read_text()) == known
    files = sorted((tmp_path / "r" / "wandb").glob(f"offline-*/run-{known['id']}.wandb"))
    assert len(files) == 2
    content, deadline = b"", time.monotonic() + 20
    while b"0.654321" not in content and time.monotonic() < deadline:  # W&B's core writes later
        time.sleep(0.1)
        content = b"".join(file.read_bytes() for file in files)
    assert b"0.654321" in content
    assert b"validation/loss_1" in content


@pytest.mark.parametrize(("setting", "package", "extra"), [
    ("wandb", "wandb", "-e '.[wandb]'"),
    ("tensorboard", "torch.utils.tensorboard", "-e '.[tensorboard]'"),
])  # fmt: skip
def test_a_missing_package_is_told_before_anything_starts(
    tmp_path, monkeypatch, capsys, setting, package, extra
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    value = "mine" if setting == "wandb" else "true"
    flags = [f"--train.{setting}", value, "--output_dir", str(tmp_path / "r"), "--dry-run"]
    assert main(["train", "digits", *flags]) != 0
    assert f"train.{setting} needs" in (err := capsys.readouterr().err)
    assert extra in err
    assert not (tmp_path / "r").exists()


def test_metrics_are_read_back_without_a_torn_line(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0, "lr": 0.1}\n{"step": 3, "lo'
    )
    assert read_metrics(path) == {"loss": [(1, 2.0), (2, 1.0)], "lr": [(2, 0.1)]}
    draw_curves(tmp_path)
    assert Image.open(tmp_path / "curves.png").size == (800, 800)


def test_curves_are_the_numbers_with_running_means() -> None:
    points = [(step, 10.0 / step) for step in range(1, 100)]
    chart = run_chart("one", "loss", {"a": points}, smooth=True)
    pale, mean = chart.series
    assert list(zip(pale.x, pale.y, strict=True)) == points
    assert mean.y[40] == pytest.approx((10 / 40 * 10 / 41 * 10 / 42) ** (1 / 3))
    assert chart.bottom < 10 / 99 < 10 < chart.top
    spike = run_chart("s", "loss", {"a": [*points * 10, (999, 1e9)]})
    assert spike.top < 20  # or it would press the rest into a line
    drawn = np.asarray(picture([run_chart("one", "loss", {"a": points})]), int)
    blue = np.abs(drawn - np.array([0x1F, 0x5F, 0xBF])).sum(-1) < 60
    heights = [np.flatnonzero(column).mean() for column in blue.T if column.any()]
    assert heights[0] < heights[len(heights) // 2] < heights[-1]  # pixels count downwards
    odd = run_chart("two", "loss", {"b": [(1, float("nan")), (2, 0.0), (3, 5.0)], "c": []})
    assert [list(line.y) for line in odd.series] == [[5.0], []]
    assert picture([odd, run_chart("none", "loss", {})]).size == (800, 800)
    with pytest.raises(ValueError, match="at least one chart"):
        picture([])


def test_the_log_of_a_quiet_process_writes_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train_tensorboard=True, train_wandb="mine")
    log = MetricsLog(tmp_path, 0, config, active=False)
    log.write(1, loss=1.0)
    log.close()
    assert list(tmp_path.iterdir()) == []
