"""elit.choose: the best that a sweep measured within a cap, or a refusal that says why."""

import json
import logging
import math
import random
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from helpers import make_generators, refuses, tiny_dit, tiny_elastic
from runs import scheduled_run
from sweeps import sweep_report

from elit import CFG, CheapCFG, ElitPipeline, ElitTextPipeline, choose, create_model, load_pipeline
from elit.caching.step_cache import StepCache
from elit.choosing.points import OperatingPoint
from elit.choosing.sweep_file import read_sweep
from elit.choosing.timing import CallTimes
from elit.cli.main import main
from elit.flow.schedulers import FlowMatchUniformEulerScheduler, make_scheduler
from elit.pipelines.folder import weights_digest
from elit.scheduling.schedule import Schedule, load_schedule

GFLOPS = {1.0: 4.0, 0.5: 2.5, 0.25: 1.5}
POINTS = [
    OperatingPoint(budget, steps, *guide)
    for budget in GFLOPS
    for steps in (2, 4, 8)
    for guide in (("none",), ("ccfg", 3.0, 1 / 16))
]


def score_of(point: OperatingPoint) -> float:
    """A made-up distance: more of everything is better, but the budget matters most."""
    return 20 - 8 * point.budget - point.steps - (2 if point.guidance == "ccfg" else 0)


def cost_of(point: OperatingPoint) -> float:
    return point.steps * (GFLOPS[point.budget] + (1.0 if point.guidance == "ccfg" else 0))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))


def tiny_pipeline() -> ElitPipeline:
    pipeline = ElitPipeline(tiny_elastic(in_channels=1), FlowMatchUniformEulerScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def run(tmp_path) -> Path:
    """A pipeline with a sweep of it."""
    folder = tmp_path / "run"
    tiny_pipeline().save_pretrained(folder)
    rows = [
        {**p.to_dict(), "gflops_per_image": cost_of(p), "scores": {"fd": score_of(p)}}
        for p in POINTS
    ]
    report = sweep_report(scores=("fd",)) | {"rows": rows}
    report["model"] = {"weights": weights_digest(folder)}
    report["settings"] |= {"sampler": "FlowMatchUniformEulerScheduler", "size": [8, 8]}
    (folder / "swept").mkdir()
    (folder / "swept" / "sweep.json").write_text(json.dumps(report))
    return folder


def change(run: Path, part: str = "", **changes) -> None:
    file = run / "swept" / "sweep.json"
    report = json.loads(file.read_text())
    (report[part] if part else report).update(changes)
    file.write_text(json.dumps(report))


def open_quietly(run: Path) -> ElitPipeline:
    pipeline = load_pipeline(run)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Clock:
    """Goes on by half a second when it is read, and by a millisecond for a latent of an image."""

    def __init__(self, pipeline: ElitPipeline, latent: float = 0.001, read: float = 0.5):
        self.now, self.latent, self.read, self.forwards = 0.0, latent, read, 0
        pipeline.transformer.register_forward_pre_hook(self.tick, with_kwargs=True)

    def tick(self, _, args: tuple, kwargs: dict) -> None:
        self.forwards += 1
        kept, count = kwargs["num_latents"], len(args[0])
        self.now += self.latent * (sum(kept) if isinstance(kept, tuple) else count * kept)
        if self.forwards in (1, 6, 24):  # the first call is slow; others disturb single runs
            self.now += 100

    def __call__(self) -> float:
        self.now += self.read
        return self.now


@pytest.fixture
def set_clock(monkeypatch):
    """Times a pipeline by a Clock of its own."""

    def set_it(pipeline: ElitPipeline, **options) -> Clock:
        clock = Clock(pipeline, **options)
        monkeypatch.setattr("elit.choosing.timing.perf_counter", clock)
        return clock

    return set_it


# ---- the choice ----


def test_the_best_within_a_cap_is_chosen(run) -> None:
    pipeline, draw = open_quietly(run), random.Random(0)
    assert choose(pipeline, max_flops=9e9, num_inference_steps=2).steps == 2
    for _ in range(20):
        cap = draw.uniform(min(map(cost_of, POINTS)), 1.2 * max(map(cost_of, POINTS)))
        point = choose(pipeline, max_flops=np.float32(cap * 1e9))
        within = [point for point in POINTS if cost_of(point) <= cap]
        assert point in within
        assert score_of(point) == min(map(score_of, within))


@pytest.mark.parametrize(
    ("lower_is_better", "score", "best"), [(True, 0, 0.25), (True, -1, 1.0), (False, 1, 1.0)]
)
def test_of_equal_scores_the_cheapest_is_chosen(run, lower_is_better, score, best) -> None:
    rows = [
        {**OperatingPoint(b, 4).to_dict(), "gflops_per_image": b, "scores": {"fd": score * b}}
        for b in (0.5, 1.0, 0.25)
    ]
    change(run, rows=rows, lower_is_better=lower_is_better)
    assert choose(open_quietly(run), max_flops=9e9).budget == best


def test_what_is_chosen_is_said_and_drawn(run, caplog) -> None:
    pipeline = open_quietly(run)
    with caplog.at_level(logging.INFO, "elit"):
        point = choose(pipeline, max_flops=8e9)
    assert f"chose {point}: fd {score_of(point):.4g}, the best of 18 points" in caplog.text
    assert "within 8 GFLOPs an image; it costs 8 GFLOPs" in caplog.text
    assert point.arguments() == {"budget": 1.0, "num_inference_steps": 2, "guidance": None}
    options = {"generator": make_generators(0, 1), "output_type": "pt"}
    drawn = pipeline([0, 1], **options, **point.arguments()).images
    options |= {"generator": make_generators(0, 1)}
    assert torch.equal(drawn, pipeline([0, 1], **options, num_inference_steps=2).images)


def test_a_text_is_one_and_a_number_counts() -> None:
    pipeline = ElitTextPipeline(create_model("elit-mmdit-tiny/2"), make_scheduler("euler"))
    assert CallTimes(pipeline, "a red disc").what == ["a red disc"]
    assert CallTimes(pipeline, 3).what == ["", "", ""]


def test_a_cap_in_milliseconds(run, set_clock, tmp_path, capsys) -> None:
    pipeline = open_quietly(run)
    clock, draw = set_clock(pipeline), random.Random(0)
    ms = {p: 250 + p.steps * (16 * p.budget + (p.guidance == "ccfg")) for p in POINTS}
    for _ in range(10):
        cap = draw.uniform(min(ms.values()), max(ms.values()))
        point = choose(pipeline, max_ms=cap, what=2)
        assert ms[point] <= cap
        assert score_of(point) == min(score_of(p) for p in POINTS if ms[p] <= cap)
    both = choose(pipeline, max_flops=9e9, max_ms=1e9, what=[1, 2])
    assert cost_of(both) <= 9
    measured = clock.forwards
    choose(open_quietly(run), max_ms=1e4, what=2)
    assert clock.forwards == measured > 0  # by the file of times
    assert "timing" not in capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=False)
    choose(pipeline, max_ms=1e6, what=3)  # another batch
    assert "timing" in capsys.readouterr().err
    files = map(Path.read_text, (tmp_path / "cache" / "times").glob("*.json"))
    assert sorted(json.loads(text)["of"]["batch_size"] for text in files) == [2, 3]
    assert clock.forwards > measured
    message = "GFLOPs and 1e-09 ms an image; the cheapest is budget 1/4"
    refuses(message, choose, pipeline, max_flops=9e9, max_ms=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_flops": 1e9}, r"the cheapest is budget 1/4, 2 steps, guidance none, at 3 GFLOPs"),
        ({}, "needs a cap"),
        ({"max_ms": 1, "num_inference_steps": 3}, "no point of 3 steps; it has those of 2, 4, 8"),
        ({"max_flops": -1}, "max_flops=-1 is not allowed"),
        ({"max_ms": float("nan")}, "max_ms=nan is not allowed"),
        ({"max_ms": True}, "max_ms=True is not allowed"),
        ({"max_ms": 1, "what": 0}, "what=0 is not allowed; give labels, texts"),
        ({"max_ms": 1, "what": True}, "what=True is not allowed; give labels, texts"),
        ({"max_flops": 10**400}, "max_flops=1000"),
        ({"max_flops": 9e9, "height": 16}, "measured at 8x8, not at 16x8"),
        ({"max_flops": 9e9, "sweep": "nowhere.json"}, "there is no nowhere.json; `elit sweep RUN`"),
    ],
)
def test_what_cannot_be_met_is_refused(run, arguments, message) -> None:
    refuses(message, choose, open_quietly(run), **arguments)


def test_longer_texts_than_the_sweep_s_are_not_capped_by_its_flops(tmp_path) -> None:
    model = create_model("elit-mmdit-tiny/2", 16, in_channels=3)
    pipeline = ElitTextPipeline(model, make_scheduler("euler"))
    report = sweep_report()
    report["model"]["weights"], report["settings"]["text_tokens"] = None, 4
    (tmp_path / "sweep.json").write_text(json.dumps(report))
    given = {"max_flops": 1e9, "sweep": tmp_path}
    choose(pipeline, what=["a red disc"], **given)
    message = "texts of up to 4 tokens, but these have 6"
    refuses(message, choose, pipeline, what=["a large red disc there"], **given)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("settings", {"sampler_settings": "01"}, "other settings of the FlowMatchUniformEuler"),
        ("settings", {"sampler": "Heun"}, "with Heun, but this pipeline has a FlowMatchUniformEul"),
        ("model", {"weights": "0123456789abcdef"}, "of other weights"),
        ("", {"format": 99}, "another version"),
        (None, {}, "run `elit sweep .*, or name its file with sweep="),
    ],
)
def test_a_sweep_of_something_else_is_refused(run, part, changes, message: str) -> None:
    pipeline = open_quietly(run)
    if part is None:
        (run / "swept" / "sweep.json").unlink()
    else:
        change(run, part, **changes)
    refuses(message, choose, pipeline, max_flops=9e9)


def test_a_sweep_s_numbers_may_be_at_the_ends_of_what_is_allowed(run) -> None:
    ends = {"budget": 1, "guide_budget": 1, "interval": [0, 1], "scale": 0, "ms_per_image": 0}
    rows = [{**POINTS[1].to_dict(), "gflops_per_image": 1e-9, "scores": {"fd": 0}, **ends}]
    rows.append(rows[0] | {"interval": [0.5, 0.5], "guide_budget": None, "ms_per_image": None})
    change(run, rows=rows)
    assert read_sweep(run / "swept")["rows"] == rows


def test_defaults_of_a_point() -> None:
    rest = {"budget": 1.0, "num_inference_steps": 40}
    for name, guidance in {"none": None, "cfg": CFG(2.0), "ccfg": CheapCFG(2.0)}.items():
        assert OperatingPoint(guidance=name).arguments() == rest | {"guidance": guidance}
    for name in ("ag", "ccfg"):
        message = f"guidance {name} needs a lower budget; this model has none"
        refuses(message, OperatingPoint(guidance=name).resolved, tiny_dit())


def test_a_point_reads_budgets_as_they_are_typed() -> None:
    point = OperatingPoint("50%", 3, "cfg", budgets_of_steps=["1/4", "75%", 1],
                           guide_budgets_of_steps=(None, "1/2", 1))  # fmt: skip
    assert point.budgets_of_steps == (0.25, 0.75, 1.0)
    assert point.guide_budgets_of_steps == (None, 0.5, 1.0)
    assert str(point) == "budget 1/2 on average, 3 steps, guidance cfg 2"
    assert OperatingPoint.from_dict(point.to_dict()) == point
    assert len({point, OperatingPoint.from_dict(point.to_dict())}) == 1


def test_resolving_a_point_keeps_its_cache() -> None:
    point = OperatingPoint(0.3, 2, scale=3.0, cache=StepCache("FirstBlockCache", 0.1))
    resolved = point.resolved(tiny_elastic())
    assert (resolved.cache, resolved.scale) == (point.cache, None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": math.nan}, "budget nan is outside"),
        ({"guidance": "foo"}, "unknown guidance 'foo'"),
        ({"budgets_of_steps": [1, None]}, "budget None is not a number"),
        ({"budgets_of_steps": "1/4"}, "budgets_of_steps '1/4' are none"),
        ({"guide_budgets_of_steps": [1]}, "go with budgets_of_steps"),
        ({"cache": "FirstBlockCache"}, "give a StepCache"),
    ],
)
def test_what_is_no_point_is_refused(wrong, message: str) -> None:
    refuses(message, OperatingPoint, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("Cache", 0.1), "unknown step cache 'Cache'"),
        (("TeaCache", math.nan), "threshold nan"),
        (("FirstBlockCache", "0.1"), "threshold '0.1'"),
        (("FirstBlockCache", -1.0), "threshold -1.0"),
    ],
)
def test_what_is_no_step_cache_is_refused(wrong, message: str) -> None:
    refuses(message, StepCache, *wrong)


# ---- times, behind a clock that is no real one ----


@pytest.mark.parametrize(
    ("guidance", "latents"), [(None, 8), (CFG(2.0), 16), (CheapCFG(2.0, 0.25), 12)]
)
def test_times_of_runs(set_clock, capsys, guidance, latents: int) -> None:
    """What is read is half a second a run, for a batch of two, and its calls."""
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(desc="own")
    set_clock(pipeline)
    times = CallTimes(pipeline, [0, 1])
    runs = [pipeline.calls(0.5, n, guidance) for n in (1, 4, 40)]
    assert times.ms_of_runs(runs) == pytest.approx([250 + n * latents for n in (1, 4, 40)])
    assert times.decode_ms_per_image() == pytest.approx(250)
    assert capsys.readouterr().err == ""
    assert pipeline._progress_bar_config == {"desc": "own"}


@pytest.mark.parametrize("guidance", [None, CFG(2.0)])
def test_a_plan_within_a_time_takes_what_it_says(
    set_clock, tmp_path, capsys, monkeypatch, guidance
) -> None:
    """Of two forwards one pair alone is timed; the others are sums."""
    folder = scheduled_run(tmp_path / "run", steps=4, std=0.05)
    pipeline, schedule = open_quietly(folder), load_schedule(folder)
    clock, step = set_clock(pipeline), pipeline.scheduler.step

    def slow_step(*args, **kwargs):  # once a call, whatever its forwards
        clock.now += 0.008
        return step(*args, **kwargs)

    pipeline.scheduler.step = slow_step
    plan_calls, costs = Schedule.plan_calls, []

    def seen(self, levels, weights, cost_of, *args, **options):
        costs.append(cost_of)
        return plan_calls(self, levels, weights, cost_of, *args, **options)

    monkeypatch.setattr(Schedule, "plan_calls", seen)
    forwards = 1 if guidance is None else 2
    cap = 250 + 4 * 4 + 0.4 * 4 * 16 * forwards
    plan = schedule.plan(pipeline, max_ms=cap, guidance=guidance, num_inference_steps=4, what=2)
    kinds = len(schedule.latents) + 1 if guidance is None else 2 * len(schedule.latents) + 3
    assert clock.forwards <= kinds * (1 + 3 * 5) * forwards
    assert 0.9 * cap < plan.cost <= cap
    times = CallTimes(pipeline, 2)
    (ms,) = times.ms_of_points([plan.point()])
    assert ms == pytest.approx(plan.cost)
    for call in ((3, 1), (8, 1)), ((16, 1), (2, 1)):
        without, whole = times.ms_of_runs([[], [call]])
        assert guidance is None or costs[0](call) == pytest.approx(whole - without)


def test_a_guide_of_more_latents_is_timed_in_silence(set_clock, caplog) -> None:
    pipeline = tiny_pipeline()
    set_clock(pipeline)
    budgets = {"budgets_of_steps": [0.25] * 4, "guide_budgets_of_steps": [0.5] * 4}
    run = pipeline.calls(num_inference_steps=4, guidance=CFG(2.0), **budgets)
    assert CallTimes(pipeline, [0, 1]).ms_of_runs([run]) == pytest.approx([250 + 4 * 12])
    assert "the guide keeps" not in caplog.text


def test_a_busy_device_slows_all_times_alike(set_clock, caplog) -> None:
    """What is measured later is as it would have been with what is known."""
    pipeline = tiny_pipeline()
    clock = set_clock(pipeline)
    times = CallTimes(pipeline, [0, 1])
    runs = [pipeline.calls(0.5, 4), pipeline.calls(0.25, 4, CFG(2.0))]
    assert times.ms_of_runs(runs[:1]) == pytest.approx([250 + 4 * 8])
    clock.latent = 0.003
    assert times.ms_of_runs(runs) == pytest.approx([250 + 4 * 8, 250 + 4 * 8])
    assert "a call takes 3 times as long as when" in caplog.text
    again = CallTimes(pipeline, [0, 1], anew=True)
    assert again.ms_of_runs(runs) == pytest.approx([250 + 4 * 24, 250 + 4 * 24])


@pytest.mark.parametrize(
    ("clock", "expected"), [({"latent": -0.001}, [500, 500]), ({"read": -0.5}, [16, 640])]
)
def test_no_part_of_a_run_takes_less_than_no_time(set_clock, clock, expected) -> None:
    """As where a longer run was measured to take less."""
    pipeline = tiny_pipeline()
    set_clock(pipeline, **clock)
    times = CallTimes(pipeline, [0])
    assert times.ms_of_runs([pipeline.calls(1.0, n) for n in (1, 40)]) == pytest.approx(expected)


def test_times_of_one_setting_are_not_those_of_another() -> None:
    pipeline = tiny_pipeline()

    def file(what=(0, 1), **options) -> Path:
        return CallTimes(pipeline, what, **options).file

    files = [file(), file([0]), file(size=(None, 4, 4))]
    assert file([2, 0]) == files[0]  # whatever is drawn
    pipeline.transformer.to(torch.bfloat16)
    files.append(file())
    pipeline.transformer.blocks[0].compile()
    files.append(file())
    for shift in (3.0, 1.0):
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        files.append(file())
    assert len(set(files)) == 7
    pipeline.transformer.enable_cache(diffusers.FirstBlockCacheConfig(0.1))
    refuses("without a step cache", file)


def test_on_the_command_line(run, capsys) -> None:
    words = ["sample", str(run), "--labels", "1", "--budget", "auto", "--device", "cpu", "--json"]
    assert main([*words, "--max-gflops", "8"]) == 0
    captured = capsys.readouterr()
    settings = json.loads(captured.out)["settings"]
    assert settings["steps"] * GFLOPS[settings["budget"][0]] <= 8
    assert "chose budget" in captured.err
    moved = (run / "swept" / "sweep.json").rename(run / "moved.json")
    assert main([*words, "--max-gflops", "8", "--sweep", str(moved)]) == 0
    for more, message in (
        ("--max-gflops 8", f"there is no {run}/swept/sweep.json; run `elit sweep {run}`, or name"),
        ("", "needs a cap; add --max-gflops or --max-ms"),
        ("--max-gflops 8 --guidance cfg", "leave --guidance out"),
        ("--max-gflops 0", "--max-gflops 0 is not allowed"),
        ("--max-ms 8 --budget 1", "no effect without --budget auto"),
    ):
        assert main([*words, *more.split()]) == 2
        assert message in capsys.readouterr().err
