"""budget="auto": the best that a sweep measured within a cap, or a refusal that says why."""

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_elastic

from elit import (
    CheapCFG,
    ElitPipeline,
    ElitTextPipeline,
    create_model,
    load_pipeline,
    make_scheduler,
)
from elit.cli.main import main
from elit.pipelines.operating_points import OperatingPoint, OperatingPoints
from elit.pipelines.timing import CallTimes

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


@pytest.fixture
def run(tmp_path) -> Path:
    """A pipeline with a sweep of it."""
    from elit.pipelines.folder import weights_digest

    folder = tmp_path / "run"
    ElitPipeline(tiny_elastic(in_channels=1), make_scheduler("euler")).save_pretrained(folder)
    report = {
        "format": 1, "ranked_by": "fd", "lower_is_better": True,
        "model": {"weights": weights_digest(folder)},
        "settings": {"sampler": "FlowMatchEulerDiscreteScheduler", "size": [8, 8]},
        "rows": [
            {**p.to_dict(), "gflops_per_image": cost_of(p), "scores": {"fd": score_of(p)}}
            for p in POINTS
        ],
    }  # fmt: skip
    (folder / "swept").mkdir()
    (folder / "swept" / "sweep.json").write_text(json.dumps(report))
    return folder


def change(run: Path, **changes) -> None:
    file = run / "swept" / "sweep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def open_quietly(run: Path) -> ElitPipeline:
    pipeline = load_pipeline(run)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_best_within_a_cap_is_chosen(run) -> None:
    pipeline, draw = open_quietly(run), random.Random(0)
    for _ in range(20):
        cap = draw.uniform(min(map(cost_of, POINTS)), 1.2 * max(map(cost_of, POINTS)))
        found = pipeline.choose_operating_point(max_flops=cap * 1e9)
        within = [point for point in POINTS if cost_of(point) <= cap]
        assert found in within
        assert score_of(found) == min(map(score_of, within))


def test_of_equal_scores_the_cheapest_is_chosen(run) -> None:
    rows = [
        {**OperatingPoint(b, 4).to_dict(), "gflops_per_image": b, "scores": {"fd": 1.0}}
        for b in (1.0, 0.25, 0.5)
    ]
    change(run, rows=rows)
    assert open_quietly(run).choose_operating_point(max_flops=9e9).budget == 0.25


def test_a_score_of_which_more_is_better(run) -> None:
    rows = [
        {**OperatingPoint(b, 4).to_dict(), "gflops_per_image": b, "scores": {"is": 10 * b}}
        for b in (0.5, 1.0)
    ]
    change(run, rows=rows, ranked_by="is", lower_is_better=False)
    assert open_quietly(run).choose_operating_point(max_flops=9e9).budget == 1.0


def test_auto_draws_what_it_chose(run, caplog) -> None:
    pipeline = open_quietly(run)
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    with caplog.at_level(logging.INFO, "elit"):
        images = pipeline(
            [0, 1], budget="auto", max_flops=8e9, generator=generator, output_type="pt"
        ).images
    point = pipeline.operating_point
    assert point == OperatingPoint(1.0, 2, "none") or cost_of(point) <= 8
    assert f"chose {point}" in caplog.text
    assert "fd" in caplog.text
    assert "within 8 GFLOPs" in caplog.text
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    again = pipeline(
        [0, 1], budget=point.budget, num_inference_steps=point.steps,
        guidance=point.make_guidance(), generator=generator, output_type="pt",
    ).images  # fmt: skip
    assert torch.equal(images, again)


def test_steps_given_are_kept(run) -> None:
    pipeline = open_quietly(run)
    assert pipeline.choose_operating_point(max_flops=9e9, num_inference_steps=2).steps == 2
    with pytest.raises(ValueError, match="no point of 3 steps; it has those of 2, 4, 8"):
        pipeline.choose_operating_point(max_flops=9e9, num_inference_steps=3)


def test_a_cap_in_milliseconds(run) -> None:
    pipeline = open_quietly(run)
    times = CallTimes(pipeline, [0, 1])
    runs = {p: pipeline.calls(p.budget, p.steps, p.make_guidance()) for p in POINTS}
    times.measure(call for calls in runs.values() for call in calls)
    ms = {p: times.ms_per_image(calls) for p, calls in runs.items()}
    draw = random.Random(0)
    for _ in range(20):
        cap = draw.uniform(min(ms.values()), max(ms.values()))
        found = pipeline.choose_operating_point(2, max_ms=cap)  # the same times, from the cache
        assert ms[found] <= cap
        assert score_of(found) == min(score_of(p) for p in POINTS if ms[p] <= cap)


def test_times_are_measured_once(run) -> None:
    pipeline, ran = open_quietly(run), []
    pipeline.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    pipeline.choose_operating_point(2, max_ms=1e6)
    assert ran
    ran.clear()
    pipeline.choose_operating_point(2, max_ms=1e5)
    open_quietly(run).choose_operating_point(2, max_ms=1e4)
    assert not ran
    pipeline.choose_operating_point(3, max_ms=1e6)  # another batch
    assert ran


def test_times_add_up() -> None:
    """Twice the calls take twice as long, less what a run takes before its first call."""
    pipeline = ElitPipeline(tiny_elastic(in_channels=1), make_scheduler("euler"))
    pipeline.set_progress_bar_config(disable=True)
    times = CallTimes(pipeline, [0, 1], keep=False)
    one, two, four = (times.ms_per_image(pipeline.calls(0.5, n)) for n in (1, 2, 4))
    assert two - one == pytest.approx((four - two) / 2)
    assert times.decode_ms_per_image() >= 0


def test_two_caps_hold_at_once(run) -> None:
    pipeline = open_quietly(run)
    slow = pipeline.choose_operating_point(max_flops=9e9, max_ms=1e9)
    assert cost_of(slow) <= 9
    with pytest.raises(ValueError, match=r"GFLOPs and .* ms an image; the cheapest is budget 1/4"):
        pipeline.choose_operating_point(max_flops=9e9, max_ms=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_flops": 1e9}, r"the cheapest is budget 1/4, 2 steps, guidance none, at 3 GFLOPs"),
        ({}, "needs a cap"),
        ({"max_flops": -1}, "max_flops=-1 is not allowed"),
        ({"max_ms": float("nan")}, "max_ms=nan is not allowed"),
        ({"max_ms": True}, "max_ms=True is not allowed"),
        ({"max_flops": 10**400}, "max_flops=1000"),
        ({"max_flops": 9e9, "guidance": CheapCFG(2.0)}, "leave guidance out"),
        ({"max_flops": 9e9, "height": 16, "width": 16}, "measured at 8x8, not at 16x16"),
        ({"max_flops": 9e9, "budget": 0.5}, "max_flops has no effect at budget=0.5"),
    ],
)
def test_what_cannot_be_met_is_refused(run, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        open_quietly(run)([0], **{"budget": "auto"} | arguments)


def test_a_numpy_number_is_a_cap(run) -> None:
    found = open_quietly(run).choose_operating_point(max_flops=np.float32(9e9))
    assert cost_of(found) <= 9


def test_longer_texts_than_the_sweep_s_are_not_capped_by_its_flops(tmp_path) -> None:
    from sweeps import sweep_report

    model = create_model("elit-mmdit-tiny/2", 16, in_channels=3)
    pipeline = ElitTextPipeline(model, make_scheduler("euler"))
    pipeline.set_progress_bar_config(disable=True)
    report = sweep_report()
    report["model"]["weights"] = None
    report["settings"]["text_tokens"] = 4
    (tmp_path / "sweep.json").write_text(json.dumps(report))
    pipeline.load_operating_points(tmp_path)
    pipeline(["a red disc"], budget="auto", max_flops=1e9)
    with pytest.raises(ValueError, match="texts of up to 4 tokens, but these have 6"):
        pipeline(["a large red disc there"], budget="auto", max_flops=1e9)


def test_a_sweep_of_something_else_is_refused(run, tmp_path) -> None:
    pipeline = open_quietly(run)
    pipeline.scheduler = make_scheduler("heun")
    with pytest.raises(ValueError, match="measured with FlowMatchEulerDiscreteScheduler"):
        pipeline.choose_operating_point(max_flops=9e9)
    change(run, model={"weights": "0123456789abcdef"})
    with pytest.raises(ValueError, match="of other weights"):
        open_quietly(run).choose_operating_point(max_flops=9e9)
    change(run, format=99)
    with pytest.raises(ValueError, match="another version"):
        OperatingPoints.load(run / "swept")
    (run / "swept" / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match="no result of `elit sweep`"):
        OperatingPoints.load(run / "swept")
    (run / "swept" / "sweep.json").unlink()
    with pytest.raises(ValueError, match="run `elit sweep"):
        open_quietly(run).choose_operating_point(max_flops=9e9)


def test_on_the_command_line(run, capsys) -> None:
    words = ["sample", str(run), "--labels", "1", "--budget", "auto", "--device", "cpu", "--json"]
    assert main([*words, "--max-gflops", "8"]) == 0
    captured = capsys.readouterr()
    settings = json.loads(captured.out)["settings"]
    assert settings["steps"] * GFLOPS[settings["budget"][0]] <= 8
    assert "chose budget" in captured.err
    for more, message in (
        (["--max-gflops", "1"], "the cheapest is budget 1/4"),
        ([], "needs a cap; add --max-gflops or --max-ms"),
        (["--max-gflops", "8", "--guidance", "cfg"], "leave --guidance out"),
        (["--max-gflops", "0"], "--max-gflops 0 is not allowed"),
        (["--max-gflops", "8", "--sweep", "nowhere.json"], "there is no nowhere.json"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    (run / "swept" / "sweep.json").rename(run / "moved.json")
    assert main([*words, "--max-gflops", "8"]) == 2
    err = capsys.readouterr().err
    assert f"there is no {run}/swept/sweep.json; run `elit sweep {run}`, or name its" in err
    assert err.endswith("with --sweep\n")
    assert main([*words, "--max-gflops", "8", "--sweep", str(run / "moved.json")]) == 0
    capsys.readouterr()
    assert main(["sample", str(run), "--max-ms", "8"]) == 2
    assert "no effect without --budget auto" in capsys.readouterr().err
