"""Schedules: errors that are known, plans against brute force, a round trip of the commands."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomise, tiny_dit
from retrofit_models import FOREIGN
from runs import scheduled_run
from stock_pipelines import ALL
from stock_pipelines import run as run_stock
from test_retrofit_pipelines import elastic_pipeline, watch_core

import elit
from elit import (
    CFG,
    AutoGuidance,
    CheapCFG,
    ElitPipeline,
    ElitTextPipeline,
    MMDiT,
    elasticize,
    load_schedule,
)
from elit.cli.main import main
from elit.flow.sampling import sample
from elit.flow.schedulers import make_scheduler, start_sampling
from elit.inspection.inspector import Subject
from elit.scheduling.allot import allot, exchange
from elit.scheduling.measure import measure_errors, measure_pipeline, power_spectrum
from elit.scheduling.plan import Plan, call_of
from elit.scheduling.schedule import Schedule, call_weights, ladder

MOST, LATENTS = 4, [1, 2]


# ---- one option for each step ----


def brute_force(costs, values, cap: float, total) -> tuple[float, float]:
    """Least (value, cost) of all choices within a cap."""
    return min(
        (total([v[o] for v, o in zip(values, chosen, strict=True)]), cost)
        for chosen in itertools.product(*(range(len(c)) for c in costs))
        if (cost := sum(c[o] for c, o in zip(costs, chosen, strict=True))) <= cap
    )


def test_allot_is_exact_also_with_ties_and_at_the_edges() -> None:
    rng = np.random.default_rng(0)
    for case in range(60):
        sizes = rng.integers(1, 5, rng.integers(1, 6))
        whole = case % 2  # whole numbers make ties
        costs = [rng.integers(1, 6, n).astype(float) for n in sizes]
        errors = [rng.integers(0, 4, n) * 1.0 if whole else rng.random(n) ** 4 for n in sizes]
        least, most = sum(c.min() for c in costs), sum(c.max() for c in costs)
        for cap in (least, (least + most) // 2, most, most + 1):
            chosen = allot(costs, errors, cap)
            cost = sum(c[o] for c, o in zip(costs, chosen, strict=True))
            error = sum(e[o] for e, o in zip(errors, chosen, strict=True))
            assert (error, cost) == pytest.approx(brute_force(costs, errors, cap, sum))
        with pytest.raises(ValueError, match="the cheapest options cost"):
            allot(costs, errors, least - 1)


def test_exchanges_keep_the_cap_and_find_errors_that_cancel() -> None:
    costs = [np.array([1.0, 2.0])] * 2
    # Both cheap options err, but in opposite directions: together they are the best.
    effects = [np.array([[1.0, 0.0], [0.2, 0.1]]), np.array([[-1.0, 0.0], [0.2, 0.1]])]
    assert exchange([1, 1], costs, effects, np.eye(2), 4.0) == [0, 0]
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = [rng.random(3) for _ in range(4)]
        effects = [rng.standard_normal((3, 2)) for _ in range(4)]
        start = [int(c.argmin()) for c in costs]
        cap = 1.3 * sum(c.min() for c in costs)
        end = exchange(start, costs, effects, np.eye(2), cap)

        def square(chosen: list[int], effects=effects) -> float:
            return float(sum(e[o] for e, o in zip(effects, chosen, strict=True)) @ sum(
                e[o] for e, o in zip(effects, chosen, strict=True)))  # fmt: skip

        assert square(end) <= square(start)
        assert sum(c[o] for c, o in zip(costs, end, strict=True)) <= cap


# ---- errors that are known ----


def velocity(x, sigma, condition, num_latents):
    """One that looks at no sample: what it lacks at n latents is known."""
    label = condition["class_labels"].view(-1, 1, 1, 1).float()
    lack = 0.0 if num_latents in (None, MOST) else (1 + sigma) * (label + 1) / num_latents
    pattern = torch.tensor([1.0, -2.0, 0.5, 0.0]).view(1, 1, 2, 2)
    return (sigma + label + lack * pattern.roll(num_latents or 0, 3)).expand(x.shape)


def null_of(condition):
    return {name: torch.full_like(value, 3) for name, value in condition.items()}


def measured(levels: list[float]) -> Schedule:
    labels = torch.tensor([0, 1, 2])
    subject = Subject(torch.randn(3, 1, 2, 2), {"class_labels": labels}, draws=2, batch_size=4)
    errors = measure_errors(velocity, null_of, subject, levels, LATENTS, torch.device("cpu"))
    return Schedule(MOST, 1).with_errors(levels, LATENTS, errors)


def test_errors_are_those_of_a_known_velocity() -> None:
    schedule = measured([1.0, 0.5])
    assert schedule.squares().shape == (2, 5)
    lack = torch.tensor([1.0, 2.0, 3.0]).square().mean() * (1 + 4 + 0.25) / 4  # of labels 0 to 2
    guide = 4.0**2 * (1 + 4 + 0.25) / 4
    label = torch.tensor([3.0, 2.0, 1.0]).square().mean()
    at_1 = [4 * lack, lack, 4 * guide, guide, label]
    assert schedule.squares()[0] == pytest.approx(np.array(at_1), rel=1e-4)
    assert schedule.squares()[1, 0] == pytest.approx(2.25 * float(lack), rel=1e-4)
    # Across levels: the same direction, 2 and 1.5 as long.
    assert schedule.products()[0, 5] == pytest.approx(3 * float(lack), rel=1e-4)
    each = torch.tensor([1.0, 4.0, 9.0]) * (1 + 4 + 0.25)
    assert schedule.standard_errors[0][0] == pytest.approx(float(each.std() / 3**0.5), rel=1e-2)


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc", "dpm-solver"])
@pytest.mark.parametrize("guidance", [None, CFG(3.0), CFG(2.0, (0.3, 0.8))])
def test_predicted_errors_are_those_of_the_samples(sampler: str, guidance) -> None:
    scheduler = make_scheduler(sampler)
    levels = start_sampling(scheduler, 4, "cpu")
    weights = call_weights(scheduler)
    assert sum(weights) == pytest.approx(-levels[0], abs=1e-4)  # as a constant velocity's
    schedule = measured(sorted({*levels}, reverse=True))
    labels = {"class_labels": torch.tensor([0, 1, 2])}
    rng = np.random.default_rng(0)

    def draw(kept):
        start_sampling(scheduler, 4, "cpu")
        noise = torch.zeros(3, 1, 2, 2)
        return sample(velocity, noise, scheduler, guidance, kept, labels, null_of(labels))

    for _ in range(3):
        kept = [(int(rng.choice([1, 2, 4])), int(rng.choice([0, 1, 2, 4]))) for _ in levels]
        kept = [
            (n, m if guidance and guidance.is_active(sigma) else 0)
            for sigma, (n, m) in zip(levels, kept, strict=True)
        ]
        error = float((draw(kept) - draw([(MOST, MOST)] * len(levels))).square().mean())
        assert schedule.error(levels, weights, kept, guidance) == pytest.approx(error, rel=1e-3)


def test_levels_between_measured_ones_are_interpolated() -> None:
    schedule = measured([1.0, 0.5])
    exact = measured([1.0, 0.75, 0.5])
    kept = [(1, 2)]
    errors = [s.error([0.75], [1.0], kept, CFG(2.0)) for s in (schedule, exact)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)  # it is linear in sigma


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_weights_of_calls(sampler: str) -> None:
    scheduler = make_scheduler(sampler)
    start_sampling(scheduler, 2, "cpu")
    expected = {"euler": [-0.5, -0.5], "heun": [-0.25, -0.25, -0.5]}[sampler]
    assert call_weights(scheduler) == pytest.approx(expected)
    noisy = make_scheduler("euler-maruyama")
    start_sampling(noisy, 3, "cpu")
    assert all(w < 0 for w in call_weights(noisy))


# ---- plans ----


def cost_of(call) -> float:
    return float(sum(n * times for n, times in call))


@pytest.mark.parametrize("guidance", [None, CFG(2.0)])
def test_a_plan_keeps_its_cap_and_bounds_are_met(guidance) -> None:
    levels = [1.0, 0.75, 0.5, 0.25]
    schedule, weights = measured(levels), [-0.25] * 4
    full = MOST * 4 * (2 if guidance else 1)
    errors = []
    for cap in (4, 0.5 * full, full):
        plan = schedule.plan_calls(levels, weights, cost_of, cap, guidance)
        assert sum(map(cost_of, plan.calls)) == plan.cost <= cap
        kept = list(zip(plan.latents, plan.guides, strict=True))
        assert plan.error == schedule.error(levels, weights, kept, guidance)
        errors.append(plan.error)
    assert errors[0] > errors[1] > errors[2] == 0
    assert plan.latents == (MOST,) * 4
    with pytest.raises(ValueError, match="the cheapest plan costs 4, more than the cap of 3"):
        schedule.plan_calls(levels, weights, cost_of, 3, guidance)
    if guidance:
        plan = schedule.plan_calls(levels, weights, cost_of, 8, guidance, drops_guide=False)
        assert all(plan.guides)
        with pytest.raises(ValueError, match="the cheapest plan costs 8"):
            schedule.plan_calls(levels, weights, cost_of, 7, guidance, drops_guide=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"cap": 0}, "cap 0 is not allowed"),
        ({"guidance": CheapCFG(2.0)}, r"a plan chooses the guide's budgets: give CFG\(2\)"),
        ({"guidance": AutoGuidance(2.0)}, r"give CFG\(2\)"),
        ({"by": "spectrum"}, "this schedule has no spectrum"),
        ({"by": "eye"}, "by 'eye'"),
    ],
)
def test_plans_that_cannot_be(words, message: str) -> None:
    schedule = measured([1.0, 0.5])
    given = {"levels": [1.0, 0.5], "weights": [-0.5] * 2, "cost_of": cost_of, "cap": 8} | words
    with pytest.raises(ValueError, match=message):
        schedule.plan_calls(**given)


def test_the_spectrum_keeps_what_stands_above_the_noise() -> None:
    noise = torch.randn(200, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    assert power_spectrum(noise, 8) == pytest.approx([1.0] * 8, rel=0.1)
    assert len(power_spectrum(torch.randn(2, 1, 2, 8, 8))) == 64  # clips
    # Power 1 up to half of the highest frequency, then 0.01: 1/4 of the tokens, or all.
    schedule = Schedule(16, 1, spectrum=[1.0] * 4 + [0.01] * 4)
    levels = [0.95, 0.6, 0.4, 0.05]
    plan = schedule.plan_calls(levels, [-0.25] * 4, cost_of, 1 + 1 + 4 + 16, CFG(1.0))
    assert plan.latents == (1, 1, 4, 16)
    assert (plan.error, schedule.by) == (None, "spectrum")
    guided = schedule.plan_calls(levels, [-0.25] * 4, cost_of, 2 * 22, CFG(2.0))
    assert guided.latents == guided.guides == (1, 1, 4, 16)
    with pytest.raises(ValueError, match="the cheapest plan costs 4"):
        schedule.plan_calls(levels, [-0.25] * 4, cost_of, 3)


# ---- with pipelines ----


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A tiny pipeline that could draw digits, with its schedule."""
    return scheduled_run(tmp_path_factory.mktemp("scheduling") / "run", steps=3, std=0.1, depth=3)


def test_a_plan_of_a_pipeline_is_what_it_runs(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path))  # of times
    pipe, schedule = elit.load_pipeline(run), load_schedule(run)
    pipe.set_progress_bar_config(disable=True)
    cost = pipe.forward_cost()

    def flops(calls) -> int:
        return sum(cost.flops(n) * times for call in calls for n, times in call)

    for steps, guidance in ((4, CFG(2.0)), (4, None), (6, CFG(2.0, (0.2, 0.7)))):
        cap = 0.75 * flops(pipe.calls(1.0, steps, guidance))
        plan = schedule.plan(pipe, cap, None, guidance, steps)
        calls = pipe.calls(**plan.arguments())
        assert calls == plan.calls
        assert flops(calls) == plan.cost <= cap
        assert pipe([1], seed=0, output_type="pt", **plan.arguments()).images.isfinite().all()
    with pytest.raises(ValueError, match="a plan needs one cap"):
        schedule.plan(pipe)
    by_time = schedule.plan(pipe, None, 1e6, CFG(2.0), 4)
    assert by_time.latents == (pipe.transformer.max_latents,) * 4


def test_commands_measure_and_draw(run, tmp_path, capsys) -> None:
    out = tmp_path / "drawn"
    words = f"sample {run} --labels 1 2 --steps 4 --budget schedule --guidance cfg --out {out}"
    pipe, schedule = elit.load_pipeline(run), load_schedule(run)
    cap = 0.5 * 8 * pipe.forward_cost().flops() / 1e9
    capsys.readouterr()
    assert main([*words.split(), "--max-gflops", str(cap), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    plan = schedule.plan(pipe, cap * 1e9, None, CFG(2.0), 4)
    assert report["settings"]["budgets_of_steps"] == plan.budgets()
    assert report["settings"]["guide_budgets_of_steps"] == plan.guide_budgets()
    (row,) = report["rows"]
    assert row["budget"] == pytest.approx(sum(plan.budgets()) / 4)
    assert sorted(path.name for path in (out / "schedule").iterdir()) == [
        "label-1-seed-0.png", "label-2-seed-1.png"
    ]  # fmt: skip
    assert (run / "schedule.png").is_file()
    words = f"schedule {run} --by spectrum --data digits --images 4 --steps 3 --out {tmp_path}"
    assert main(words.split()) == 0
    printed = capsys.readouterr().out
    assert "schedule.png" in printed
    assert "%, 3 steps, guidance cfg 2\n  budgets" in printed
    assert load_schedule(tmp_path / "schedule.json").by == "spectrum"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--budget schedule", "--budget schedule needs a cap"),
        ("--budget schedule 0.5 --max-ms 1", "--budget schedule stands alone"),
        ("--budget schedule --max-ms 1 --max-gflops 1", "takes one cap"),
        ("--budget schedule --max-ms 1 --guidance ccfg", "use --guidance cfg instead of ccfg"),
        ("--budget schedule --max-ms 1 --sweep x", "--sweep has no effect without --budget auto"),
        ("--max-ms 1", "no effect without --budget auto or schedule"),
        ("--budget schedule --max-gflops 1e-9", "cap of 1e-09 GFLOPs an image; raise"),
        ("--budget schedule --max-ms 1e-3", "cap of 0.001 ms an image; raise"),
    ],
)
def test_mistakes_in_commands(run, words: str, message: str, capsys) -> None:
    assert main(["sample", str(run), "--labels", "1", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_plain_model_has_no_schedule_to_make(tmp_path, capsys) -> None:
    ElitPipeline(tiny_dit(in_channels=1), make_scheduler("euler")).save_pretrained(tmp_path)
    words = f"sample {tmp_path} --labels 1 --budget schedule --max-gflops 1"
    assert main(words.split()) == 2
    assert "is a plain DiT without a latent interface" in capsys.readouterr().err


def test_a_schedule_of_other_weights_or_a_damaged_one_is_refused(run, tmp_path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    weights = next((copy / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="of other weights than"):
        load_schedule(copy)
    content = json.loads((run / "schedule.json").read_text())
    content["gram"].pop()
    (tmp_path / "cut.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged"):
        load_schedule(tmp_path / "cut.json")
    with pytest.raises(ValueError, match="`elit schedule RUN` measures and writes it"):
        load_schedule(tmp_path / "none.json")


def test_guides_by_step(run) -> None:
    pipe = elit.load_pipeline(run)
    pipe.set_progress_bar_config(disable=True)

    def draw(**options):
        return pipe([3], seed=0, num_inference_steps=3, output_type="pt", **options).images

    def close(a, b) -> bool:
        return torch.allclose(a, b, atol=1e-5)

    quarter = draw(guidance=CFG(3.0), guide_budgets_of_steps=[0.25] * 3)
    assert close(quarter, draw(guidance=CheapCFG(3.0, 0.25)))
    never = draw(guidance=CFG(3.0), guide_budgets_of_steps=[None] * 3)
    assert close(never, draw())
    late = draw(guidance=CFG(3.0), guide_budgets_of_steps=[None, 1.0, 1.0])
    assert close(late, draw(guidance=CFG(3.0, (0.0, 0.7))))
    for options, message in (
        ({"guidance": CheapCFG(3.0)}, "give CFG"),
        ({}, "give CFG"),
        ({"guidance": CFG(3.0), "guide_budgets_of_steps": [1.0]}, "not for the 3 calls"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(**{"guide_budgets_of_steps": [1.0] * 3} | options)


def test_of_texts_the_guide_reads_an_empty_one() -> None:
    model = randomise(
        MMDiT(
            sample_size=8, in_channels=3, patch_size=2, hidden_size=32, num_heads=2, depth=3,
            group=2, head=1, tail=1, max_text_length=12, vocab_size=64,
        )
    )  # fmt: skip
    pipe = ElitTextPipeline(model, make_scheduler("euler"))
    condition, null = pipe.encode_prompt(["a red disc", "a blue square above it"], "")
    subject = Subject(torch.randn(2, 3, 8, 8), condition, draws=2)
    errors = measure_pipeline(pipe, subject, [0.5], [1, 2])
    alike = measure_pipeline(pipe, Subject(subject.images, null, draws=2), [0.5], [1, 2])
    squares = errors.gram.diagonal()
    assert (squares > 0).all()
    assert torch.allclose(alike.gram.diagonal()[:2], squares[2:4], rtol=1e-3)  # as its own guide
    assert float(alike.gram.diagonal()[4]) < 1e-9


def test_a_callback_sets_budgets_of_a_stock_pipeline() -> None:
    model = elasticize(
        elit.create_model("dit-tiny/2", hidden_size=16, num_heads=2, depth=3), 1, 1, 2
    )
    schedule = measured([1.0, 0.5])
    plan = schedule.plan_calls([1.0, 0.5], [-0.5] * 2, cost_of, 9, CFG(2.0), drops_guide=False)
    after_step = plan.callback(model)
    branches = model._elit_session.branches
    seen = [(branches.num_latents(False), branches.num_latents(True))]
    assert after_step(None, 0, None, {}) == {}
    seen.append((branches.num_latents(False), branches.num_latents(True)))
    after_step(None, 1, None, {})  # the last step sets the first one's again
    assert (branches.num_latents(False), branches.num_latents(True)) == seen[0]
    assert seen == list(zip(plan.latents, plan.guides, strict=True))
    dropping = schedule.plan_calls([1.0, 0.5], [-0.5] * 2, cost_of, 4, CFG(2.0))
    assert 0 in dropping.guides
    with pytest.raises(ValueError, match="is of 16 latents per group, but the transformer has 4"):
        replace(plan, max_latents=16).callback(model)
    with pytest.raises(ValueError, match="plan with drops_guide=False"):
        dropping.callback(model)


@pytest.mark.parametrize("name", ["qwen", "sd3"])
def test_a_stock_pipeline_runs_a_plan(name: str) -> None:
    pipe = elastic_pipeline(name)
    guidance = CFG(3.0)
    plan = Plan((1.0, 0.5), (16, 8), (4, 2), 16, guidance, 2, cost=0.0, error=None)
    seen = watch_core(pipe.transformer)
    run_stock(pipe, name, callback_on_step_end=plan.callback(pipe.transformer))
    ran, longer = list(seen), replace(plan, latents=(16, 8, 8), guides=(4, 2, 2))
    with pytest.raises(ValueError, match="is of 3 calls of the transformer, but the run has 2"):
        run_stock(pipe, name, callback_on_step_end=longer.callback(pipe.transformer))
    groups = torch.Size(FOREIGN[ALL[name].transformer].grid).numel() // 16
    tokens = [ALL[name].text_in_core + groups * n for n in (4, 16, 2, 8)]
    order = tokens if ALL[name].calls != ("cond", "uncond") else [tokens[i] for i in (1, 0, 3, 2)]
    assert ran == [(1, n) for n in order]


def test_ladder_and_calls() -> None:
    assert ladder(1, 16) == [1, 2, 3, 4, 6, 8, 12]
    assert ladder(3, 16) == [3, 4, 6, 8, 12]
    assert ladder(1, 1) == []
    assert call_of(4, 0) == ((4, 1),)
    assert call_of(4, 4) == ((4, 2),)
    assert call_of(4, 1) == ((4, 1), (1, 1))
