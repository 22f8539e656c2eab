"""Searched schedules: known optima, caps that hold, kills, and what really ran."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ELASTIC, refuses
from PIL import Image
from runs import scheduled_run
from sweeps import sweep_report
from test_evaluation import CORNERS, ONE, without_times
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elit import CFG, CheapCFG, choose, load_pipeline, load_schedule
from elit._process import Process
from elit.caching.configs import TeaCacheConfig
from elit.caching.step_cache import StepCache
from elit.choosing.points import OperatingPoint
from elit.choosing.sweep_file import plain_rows, read_sweep
from elit.cli.main import main
from elit.cost.flops import forward_flops, skipped_flops
from elit.evaluation.drawing import Drawing
from elit.evaluation.evaluation import Evaluation, score_points
from elit.evaluation.images import open_images
from elit.evaluation.sweep import Grid, join_sweep, merged, sheets, sweep
from elit.scheduling.scheduled import scheduled_point
from elit.scheduling.search import Candidate, Found, descend, neighbours, search, the_best
from elit.viz.page import sweep_page

TEACACHE = StepCache.of_teacache(TeaCacheConfig(0.1, (0.5, 0.0), (0.01, 2.0)), 0.3)
FIRST = StepCache("FirstBlockCache", 0.4)
PLAN = OperatingPoint(
    0.5, 3, "cfg", 2.0, None, None, (1.0, 0.25, 0.25), (None, 0.25, 0.5), StepCache("TeaCache", 0.1)
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A tiny pipeline of random weights, with its schedule."""
    return scheduled_run(tmp_path_factory.mktemp("search") / "run", steps=4, std=0.05)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A folder of 40 pictures of 16x16."""
    folder = tmp_path_factory.mktemp("real")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i:02d}.png")
    return folder


def make_evaluation(run: Path, real: Path, home: Path, count: int = 16, **of) -> Evaluation:
    pipeline = load_pipeline(run)
    pipeline.set_progress_bar_config(disable=True)
    drawing = Drawing(pipeline, [CORNERS], count, batch_size=4)
    process = of.get("process", ONE)
    return Evaluation(str(run), drawing, open_images(str(real)), process, home, progress=False)


def cap_of(run: Path, steps: int) -> float:
    """FLOPs of an image at full budget with CFG."""
    return 2.0 * steps * forward_flops(load_pipeline(run).transformer)


def found_in(run: Path, real: Path, home: Path, **options) -> tuple[Found, Evaluation]:
    evaluation = make_evaluation(run, real, home)
    given = {"guidance": CFG(2.0), "caches": [FIRST], "moves": 3} | options
    return search(evaluation, load_schedule(run), cap_of(run, 3), **given), evaluation


# ---- the way down ----


def test_a_known_optimum_is_found() -> None:
    best = Candidate(18, tilt=1.25, guide_tilt=-0.5, guide=1.0, cache=StepCache("TeaCache", 0.3))

    def value(one: Candidate) -> float:
        return (
            8 * math.log(one.steps / best.steps) ** 2 + (one.tilt - best.tilt) ** 2
            + (one.guide - best.guide) ** 2 + (one.guide_tilt - best.guide_tilt) ** 2
            + 2 * math.log(one.cache.threshold / best.cache.threshold) ** 2
        )  # fmt: skip

    asked: list[Candidate] = []

    def values(some) -> list[float]:
        asked.extend(some)
        return [value(one) for one in some]

    start = Candidate(10, cache=StepCache("TeaCache", 0.1))
    tried = descend(start, value(start), partial(neighbours, guided=True), values, 200)
    found = min(tried, key=tried.__getitem__)
    assert abs(found.steps - best.steps) <= 1
    assert found.cache.threshold == pytest.approx(best.cache.threshold, rel=0.1)
    for name in ("tilt", "guide", "guide_tilt"):
        assert getattr(found, name) == pytest.approx(getattr(best, name), abs=0.13)
    assert len(asked) == len(set(asked)) <= 200  # nothing twice
    few = descend(start, value(start), partial(neighbours, guided=True), values, 5)
    assert len(few) == 6
    assert all(len(pair) for pair in neighbours(Candidate(1), 1.0, guided=False)[1:])


def test_a_round_keeps_a_third_and_the_best_of_each_kind() -> None:
    words = ["aa", "ab", "ac", "ba", "bb", "ca"]
    assert the_best(words, [1, 2, 3, 9, 8, 7], lambda word: word[0]) == ["aa", "ab", "bb", "ca"]


# ---- within the cap, whatever happens ----


def test_nothing_costs_more_than_the_cap(run, real, tmp_path) -> None:
    found, evaluation = found_in(run, real, tmp_path, caches=[FIRST, TEACACHE])
    cap, drawing = cap_of(run, 3), evaluation.drawing
    searches = [row["searches"] for row in found.rows]
    ways = {one["way"] for (one,) in searches}
    assert {"steps alone", "constant budget", "budgets alone"} <= ways
    assert ways & {"cache alone", "budgets and cache"}
    (best,) = [row for row in found.rows if row["searches"][0].get("best")]
    assert OperatingPoint.from_dict(best) == found.point
    assert found.score == best["scores"]["fd"] == min(r["scores"]["fd"] for r in found.rows)
    for row in found.rows:
        point = OperatingPoint.from_dict(row)
        assert row["searches"][0]["max_flops"] == cap
        assert row["gflops_per_image"] * 1e9 <= cap * (1 + 1e-9)
        if point.cache is None:
            assert row["gflops_per_image"] * 1e9 > 0.5 * cap, point
            assert row["gflops_per_image"] * 1e9 == pytest.approx(drawing.flops(point))
        else:
            assert 0 < row["skipped"] < 1
            assert row["gflops_per_image"] * 1e9 < drawing.flops(point)


@pytest.mark.slow
def test_a_cap_on_time_holds_too(run, real, tmp_path) -> None:
    evaluation = make_evaluation(run, real, tmp_path)
    (cap,) = evaluation.times().ms_of_points([OperatingPoint(1.0, 4)])
    found = search(evaluation, load_schedule(run), None, cap, None, [6], [FIRST], moves=1)
    ms = evaluation.times().ms_of_points([OperatingPoint.from_dict(row) for row in found.rows])
    assert max(ms) <= cap * (1 + 1e-9)
    assert all(row["searches"][0]["max_ms"] == cap for row in found.rows)


@pytest.mark.slow
def test_a_killed_search_ends_as_one_that_was_not(run, real, tmp_path, monkeypatch) -> None:
    whole, _ = found_in(run, real, tmp_path / "a")
    draw, left = Drawing.draw, [0]

    def dies(self, point, samples):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return draw(self, point, samples)

    monkeypatch.setattr(Drawing, "draw", dies)
    again, kills = None, 0
    while again is None:
        left[0] = 15
        try:
            again, _ = found_in(run, real, tmp_path / "b")
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 2
    assert again == whole
    left[0] = 0  # nothing is drawn twice
    assert found_in(run, real, tmp_path / "b")[0] == whole


# ---- what really ran ----


def counted(draw: Callable[[], object]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        draw()
    return counter.get_total_flops()


@pytest.mark.parametrize("cache", [FIRST, TEACACHE], ids=str)
def test_flops_of_a_planned_and_cached_point_are_those_that_were_done(
    run, real, tmp_path, cache
) -> None:
    evaluation = make_evaluation(run, real, tmp_path, count=4)
    drawing = replace(evaluation.drawing, batch_size=1)  # batches share some queries
    evaluation = replace(evaluation, drawing=drawing)
    for guidance, error in ((None, 1e-6), (CFG(2.0), 0.02)):
        cap = cap_of(run, 7) / (1 if guidance else 2)
        plan = load_schedule(run).plan(drawing.pipeline, cap, None, guidance, 12)
        point = plan.point(cache)
        assert point.budgets_of_steps == tuple(plan.budgets())
        (row,) = score_points(evaluation, [point], "")
        assert 0 < row["skipped"] < 1
        done = counted(lambda: drawing.draw(point, range(4)))  # noqa: B023
        assert row["gflops_per_image"] * 4e9 == pytest.approx(done, rel=error)
        assert row["gflops_per_image"] * 1e9 < drawing.flops(point)
        (ms,) = evaluation.times().ms_of_points([point])
        assert ms > 0


@pytest.mark.parametrize("backbone", ["dit", "hdit", "uvit", "mmdit"])
@pytest.mark.parametrize("cache", [FIRST, TEACACHE], ids=str)
def test_a_skipped_forward_costs_its_ends_alone(backbone, cache) -> None:
    model = ELASTIC[backbone]()
    least, most = (forward_flops(model, n) for n in (model.min_latents, model.max_latents))
    skipped = skipped_flops(model, cache, model.max_latents)
    assert 0 < skipped < least < most
    assert skipped == skipped_flops(model, cache, model.min_latents)
    assert not model.is_cache_enabled


def test_a_pipeline_has_a_cache_for_one_run_alone(run) -> None:
    pipe = load_pipeline(run)
    pipe.set_progress_bar_config(disable=True)
    draw = partial(pipe, [1, 2], seed=0, output_type="latent", num_inference_steps=8)
    plain = draw().images
    pipe.transformer.enable_cache(FIRST.config())
    cached = draw().images
    refuses("a step cache is on already", draw, step_cache=FIRST.config())
    pipe.transformer.disable_cache()
    assert not plain.equal(cached)
    assert draw(step_cache=FIRST.config()).images.equal(cached)
    assert draw().images.equal(plain)
    refuses("guide_budgets_of_steps .* are not for", draw, step_cache=FIRST.config(),
            guidance=CFG(2.0), guide_budgets_of_steps=[1.0])  # fmt: skip
    assert draw().images.equal(plain)  # it is off after an error too


# ---- in a sweep ----


def test_points_of_all_kinds_go_through_files(tmp_path) -> None:
    assert OperatingPoint.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN
    plain = OperatingPoint(0.5, 3, "cfg", 2.0)
    assert set(plain.to_dict()) == {
        "budget", "steps", "guidance", "scale", "guide_budget", "interval"
    }  # fmt: skip
    assert str(PLAN) == "budget 1/2 on average, 3 steps, guidance cfg 2, TeaCache 0.1"
    report = sweep_report()  # as older versions wrote it
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(report))
    assert plain_rows(read_sweep(file)) == report["rows"]
    for changes, message in (
        ({"budgets_of_steps": [2.0]}, r"row 0: budgets_of_steps \[2.0\]"),
        ({"guide_budgets_of_steps": [None, "x"]}, "row 0: guide_budgets_of_steps"),
        ({"cache": {"kind": "MagCache", "threshold": 0.1}}, "row 0: cache"),
        ({"searches": [{"max_flops": 1.0}]}, "row 0: searches"),
    ):
        rows = [report["rows"][0] | changes]
        file.write_text(json.dumps(report | {"rows": rows}))
        refuses(message, read_sweep, file)


def test_searched_points_join_the_sweep_and_are_chosen(
    run, real, tmp_path, monkeypatch, capsys, caplog
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    found, evaluation = found_in(folder, real, tmp_path)
    home, cap = folder / "swept", cap_of(run, 3)
    grid = Grid([1.0], [3, 4], ["cfg"], [2.0])
    sweep(evaluation, grid, home)
    joined = join_sweep(evaluation, found.rows, home)
    again = sweep(evaluation, grid, home)  # which has one of the search's points too
    assert without_times(again) == without_times(joined)
    assert len(joined["rows"]) == len(found.rows) + 1
    page = sweep_page(joined, sheets(joined, evaluation))
    signs = {"planned": "✚", "cached": "✖", "both": "⬢"}
    for row in joined["rows"]:
        planned, cached = (row.get(k) is not None for k in ("budgets_of_steps", "cache"))
        if planned or cached:
            kind = "both" if planned and cached else "planned" if planned else "cached"
            assert signs[kind] in page
    assert "Within a cap" in page

    # A plan with a cache is the best that the sweep knows.
    report = json.loads((home / "sweep.json").read_text())
    wanted = next(row for row in report["rows"] if row.get("budgets_of_steps"))
    for row in report["rows"]:
        for one in row.get("searches", ()):
            one.pop("best", None)
        row["scores"]["fd"] = 5.0
    wanted |= {"cache": {"kind": "FirstBlockCache", "threshold": 0.4}}
    wanted["scores"]["fd"], wanted["searches"][0]["best"] = 1.0, True
    for other in ({"max_flops": 5 * cap}, {"max_ms": 1e6}, {"max_ms": 1e-6}):
        wanted["searches"].append({"way": "searched", "best": True} | other)
    (home / "sweep.json").write_text(json.dumps(report))
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    point = choose(pipe, cap)
    assert point == OperatingPoint.from_dict(wanted)
    assert point.cache == FIRST
    images = pipe([1, 2], seed=0, output_type="pt", **point.arguments()).images
    assert choose(pipe, max_ms=1e6) == point

    gflops = f"--max-gflops {cap / 1e9} --out {tmp_path / 'drawn'} --json"
    for words in ("auto", f"schedule --guidance cfg --scale {2.0}"):
        capsys.readouterr()
        assert main(["sample", str(folder), "--labels", "1", "2",
                     *f"--budget {words} {gflops}".split()]) == 0  # fmt: skip
        settings = json.loads(capsys.readouterr().out)["settings"]
        assert settings["budgets_of_steps"] == list(point.budgets_of_steps)
        assert settings["step_cache"]["threshold"] == 0.4
        file = next((tmp_path / "drawn").rglob("label-1-seed-0.png"))
        drawn = np.asarray(Image.open(file).convert("L"), np.float32) / 255
        assert np.abs(drawn - images[0, 0].numpy()).max() < 0.01
        shutil.rmtree(tmp_path / "drawn")
    command = f"sample {folder} --labels 1 --budget auto {gflops} --teacache 0.1"
    assert main(command.split()) == 2
    assert "FirstBlockCache 0.4 of its own; leave --teacache out" in capsys.readouterr().err

    # The searched plan for caps from its own on; derived ones for others.
    taken = partial(scheduled_point, str(folder), pipe, guidance=CFG(2.0))
    caplog.set_level("INFO", "elit")
    assert taken(cap) == taken(1.09 * cap) == point
    assert "searched: budget" in caplog.text
    assert taken(5 * cap) == taken(max_ms=1e6) == point
    steps = {"num_inference_steps": point.steps}
    assert taken(cap, **steps) == point
    for other in (
        taken(1.2 * cap, **steps), taken(0.99 * cap, **steps),
        taken(cap, num_inference_steps=point.steps + 1),
        scheduled_point(str(folder), pipe, cap, guidance=CFG(3.0), **steps),
    ):  # fmt: skip
        assert other.cache is None
        assert other != point
    assert "derived: no search of this cap" in caplog.text
    (folder / "schedule.json").unlink()
    refuses("`elit schedule RUN` measures", taken, max_ms=1e-6)  # it takes more than that here


def test_a_point_that_two_searches_found_is_of_both_caps(tmp_path) -> None:
    row = sweep_report()["rows"][0]

    def within(**search) -> dict:
        return row | {"searches": [search]}

    first, second = ({"way": "budgets alone", "max_flops": cap} for cap in (1e9, 2e9))
    timed = {"way": "searched", "max_ms": 3.0, "best": True}
    one = merged([within(**first), within(**second)], [within(**timed), row])
    assert one == [row | {"searches": [first, second, timed]}]
    (again,) = merged(one, [within(**second, best=True)])  # searched once more
    assert again["searches"] == [first, second | {"best": True}, timed]
    page = sweep_page(sweep_report() | {"rows": [again]})
    for cap in ("1 GFLOPs", "2 GFLOPs", "3 ms"):
        assert f"<td>{cap}</td>" in page
    assert "budgets alone, searched" in page


def test_a_large_cap_is_no_reason_for_many_steps(run, real, tmp_path, monkeypatch, caplog) -> None:
    drawn: list[OperatingPoint] = []

    def scores(_evaluation, points, _title) -> list[dict]:
        drawn.extend(points)
        return [point.to_dict() | {"scores": {"fd": 1 / point.steps}, "gflops_per_image": 1e-3}
                for point in points]  # fmt: skip

    monkeypatch.setattr("elit.scheduling.search.score_points", scores)
    evaluation, schedule = make_evaluation(run, real, tmp_path), load_schedule(run)
    for steps, most in (((), 100), ((150,), 150)):
        drawn.clear()
        found = search(evaluation, schedule, cap_of(run, 400), None, None, steps, [], moves=4)
        assert max(point.steps for point in drawn) == found.point.steps == most
        assert f"GFLOPs an image pay for {most} steps of full budget and more" in caplog.text


def test_a_search_is_refused_with_reasons(run, real, tmp_path) -> None:
    evaluation, schedule = make_evaluation(run, real, tmp_path), load_schedule(run)
    refuses("needs one cap", search, evaluation, schedule)
    refuses("cap -1 is not allowed", search, evaluation, schedule, -1)
    refuses("nothing that could be drawn keeps within", search, evaluation, schedule, 10.0)
    refuses("has its own guide", search, evaluation, schedule, 1e9, None, CheapCFG(2.0, 0.25))
    refuses("score 'fdx'", search, evaluation, schedule, 1e9, ranked_by="fdx")
    several = make_evaluation(run, real, tmp_path, process=Process(0, 2))
    refuses("run it in one process", search, several, schedule, 1e9)
    by_spectrum = type(schedule)(schedule.max_latents, 1, spectrum=[1.0])
    refuses("a search starts from measured errors", search, evaluation, by_spectrum, 1e9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--search", "--search needs a cap"),
        ("--max-ms 3", "are of --search; add it"),
        ("--moves 3", "are of --search; add it"),
        ("--search --max-gflops 0", "a cap of 0 is not allowed"),
        ("--search --max-gflops 1 --budgets 0.5", "leave --budgets out"),
        ("--search --max-gflops 1 --guidance ccfg", "give --guidance none, or cfg"),
        ("--search --max-gflops 1 --scale 2 3", "give --guidance none, or cfg"),
        ("--search --max-gflops 1 --guidance cfg --guide-budget 0.5", "--guide-budget has no"),
    ],
)
def test_flags_without_effect_are_errors(run, words, message, capsys) -> None:
    assert main(["sweep", str(run), *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_the_command_searches_and_writes_a_page(run, tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    words = f"sweep {folder} --search --samples 16 --batch-size 8 --moves 1 --steps 4 --scale 2 "
    network = tmp_path / "corners.pt"
    torch.jit.trace(CORNERS.module.cpu(), torch.zeros(1, 3, 16, 16)).save(network)
    words += f"--network {network} --reference digits --max-gflops {cap_of(run, 2) / 1e9} --json"
    assert main(words.split()) == 0
    report = json.loads(capsys.readouterr().out)
    searches = [one for row in report["rows"] for one in row.get("searches", ())]
    assert sum(one.get("best", False) for one in searches) == 1
    assert "Within a cap" in (folder / "swept" / "sweep.html").read_text()
    assert "searches" in (folder / "swept" / "sweep.csv").read_text().splitlines()[0]
