"""Timestep shift and x-prediction, from a config to what is drawn."""

import json
import re
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import TINY as TINY_DIT
from helpers import randomise, tiny_dit, tiny_elastic
from runs import CPU, assert_same_run, tiny_config
from test_flow import MEAN, STD, gaussian_velocity
from torch import Tensor

from elit import CFG, DiT, ElitPipeline, create_model, elasticize, make_scheduler
from elit.choosing.points import OperatingPoint
from elit.cli.main import main
from elit.cost.flops import cost_of
from elit.evaluation.drawing import Drawing
from elit.flow.objective import flow_matching_loss
from elit.flow.schedulers import shift_of
from elit.flow.shift import shifted
from elit.pipelines.load import open_pipeline
from elit.scheduling.schedule import Schedule
from elit.training.build import build_model, read_data
from elit.training.finetune import load_base
from elit.training.loop import draw_rows, train
from elit.training.run import Run
from elit.training.validation import validation_losses

BOTH = {"objective_shift": 3.0, "objective_prediction_type": "sample"}


# ---- x-prediction ----


class KnowsGaussian(DiT):
    """Its last layer gives E[data | x] of N(MEAN, STD^2) data, closed form."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.view(-1, 1, 1, 1)
        gain = (1 - level) * STD**2 / ((1 - level) ** 2 * STD**2 + level**2)
        return self.velocity_of(MEAN + gain * (x - (1 - level) * MEAN), x, sigma)


def test_the_best_sample_is_the_best_velocity() -> None:
    model, sigma = KnowsGaussian(**TINY_DIT, prediction_type="sample"), torch.linspace(0.05, 1, 20)
    x = torch.randn(20, 2, 8, 8)
    expected = gaussian_velocity(x, sigma.view(-1, 1, 1, 1))
    torch.testing.assert_close(model(x, sigma), expected, atol=1e-4, rtol=1e-4)
    assert model(x, torch.zeros(20)).isfinite().all()  # where it would be 0 / 0
    noise = torch.randn(20, 2, 8, 8)
    data = MEAN + STD * x
    losses = [
        flow_matching_loss(lambda x, s, bend=bend: model(x, s) + bend, data, noise, sigma).mean()
        for bend in (-0.2, 0.0, 0.2)
    ]
    assert min(losses) == losses[1]


@pytest.mark.parametrize("preset", ["elit-dit", "elit-uvit", "elit-hdit", "elit-mmdit", "dit"])
def test_every_backbone_predicts_samples_at_mixed_budgets_and_levels(preset: str, tmp_path) -> None:
    model = randomise(create_model(f"{preset}-tiny/2", prediction_type="sample"))
    told, x = model.example_condition(4), torch.randn(4, 1, 16, 16)
    sigma = torch.tensor([0.01, 0.1, 0.5, 1.0])
    latents = {"num_latents": (1, 16, 1, 3)} if model.is_elastic else {}
    most = model.max_latents or None
    velocity = model(x, sigma, **told, **latents).sample
    other = randomise(create_model(f"{preset}-tiny/2"))
    output = other(x, sigma, **told, **latents).sample
    expected = (x - output) / sigma.clamp(0.05).view(-1, 1, 1, 1)
    torch.testing.assert_close(velocity, expected, atol=1e-3, rtol=1e-4)

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.prediction_type == "sample"
    again = loaded(x, sigma, **told, **latents).sample
    torch.testing.assert_close(again, velocity, atol=1e-3, rtol=1e-4)
    assert cost_of(model).flops(most) == cost_of(other).flops(most)


def test_off_it_is_as_before_there_was_such_a_setting(tmp_path) -> None:
    one, other = tiny_elastic(), tiny_elastic(prediction_type="velocity")
    assert one.config.keys() == other.config.keys()
    one.save_pretrained(tmp_path)
    assert "prediction_type" not in json.loads((tmp_path / "config.json").read_text())
    assert not [name for name in one.state_dict() if "prediction" in name]
    with pytest.raises(ValueError, match=r"unknown prediction_type 'smaple'.*'sample'"):
        tiny_dit(prediction_type="smaple")


def test_an_elasticized_model_still_predicts_samples() -> None:
    base = tiny_dit(prediction_type="sample")
    inputs = torch.randn(2, 2, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([0, 1])
    expected = base(*inputs).sample
    elastic = elasticize(base, 1, 1, (2, 2))
    torch.testing.assert_close(elastic(*inputs).sample, expected, atol=1e-4, rtol=1e-4)


# ---- runs ----


def test_a_run_with_both_resumes_to_the_same_weights_and_draws_as_it_trained(tmp_path) -> None:
    train(tiny_config(tmp_path / "a", 4, **BOTH), progress=False)
    train(tiny_config(tmp_path / "b", 2, **BOTH), progress=False)
    train(tiny_config(tmp_path / "b", 4, **BOTH), progress=False)
    assert_same_run(tmp_path / "a", tmp_path / "b", 4)

    pipeline = ElitPipeline.from_pretrained(tmp_path / "a")
    assert pipeline.transformer.config.prediction_type == "sample"
    assert pipeline.scheduler.config.shift == 3
    pipeline.save_pretrained(tmp_path / "again")
    for one in (pipeline, ElitPipeline.from_pretrained(tmp_path / "again")):
        levels = [shifted(level, 3.0) for level in (1, 0.75, 0.5, 0.25)]
        assert one.start(4, "cpu") == pytest.approx(levels)


class Noted:
    """Conditions of a run; notes the levels that a model is called at."""

    def __init__(self, conditioning: Any):
        self.conditioning, self.levels = conditioning, []

    def __call__(self, batch: dict) -> dict:
        return self.conditioning(batch)

    def target(self, condition: dict) -> Any:
        return self.conditioning.target(condition)

    def velocity(self, model: Any, x: Tensor, sigma: Tensor, **told: Any) -> Tensor:
        self.levels.append(sigma)
        return self.conditioning.velocity(model, x, sigma, **told)


def test_the_levels_of_training_and_validation_are_shifted(tmp_path) -> None:
    """By numbers of a sample: here 256 of the digits, a shift of a quarter."""
    seen: dict[object, list[Tensor]] = {}
    for shift in (1.0, 0.5, "dimension"):
        run = Run(tiny_config(tmp_path / str(shift), objective_shift=shift), CPU)
        args = (1, 16, 16), run.density, 3, 7, CPU.device
        rows = draw_rows(range(40), *args)
        assert torch.equal(draw_rows(range(15, 17), *args).sigma, rows.sigma[15:17])
        noted = Noted(run.conditioning)
        validation_losses(run.model, run.held_out, noted, run.density, [16], 0, CPU)
        seen[shift] = [rows.sigma, rows.noise, torch.cat(noted.levels)]
        assert shift_of(run.conditioning.pipeline().scheduler) == shift
        run.close()
    for shift, s in ((0.5, 0.5), ("dimension", 0.25)):
        assert torch.equal(seen[shift][1], seen[1.0][1])
        for found, plain in ((seen[shift][i], seen[1.0][i]) for i in (0, 2)):
            torch.testing.assert_close(found, shifted(plain, s))


def test_a_pipeline_shifts_by_the_size_that_it_draws() -> None:
    pipeline = ElitPipeline(tiny_dit(in_channels=1), make_scheduler("heun", "dimension"))
    pipeline.set_progress_bar_config(disable=True)
    for side in (8, 32):
        pipeline([1], num_inference_steps=2, height=side, width=side, seed=0)
        half = shifted(0.5, side / 64)
        assert pipeline.scheduler.levels == pytest.approx([1, half, half, 0])


def test_forwards_times_and_plans_are_of_the_size_that_is_drawn() -> None:
    """In two steps, the second at the level side / (side + 64): guided from 0.3 on, or not."""
    pipeline = ElitPipeline(tiny_elastic(in_channels=1), make_scheduler("euler", "dimension"))
    guidance = CFG(2.0, interval=(0.3, 1.0))
    schedule = Schedule(pipeline.transformer.max_latents, 1, spectrum=[1.0, 0.5])
    drawing = Drawing(pipeline, [], 2, size=(32, 32))
    point = OperatingPoint(steps=2, guidance="cfg", interval=(0.3, 1.0))
    for side, guided in ((8, 1), (32, 2)):
        size = None, side, side
        calls = pipeline.calls(1.0, 2, guidance, size=size)
        assert sum(times == 2 for ((_, times),) in calls) == guided
        plan = schedule.plan(pipeline, 1e12, None, guidance, 2, size=size)
        assert plan.levels == pytest.approx([1, side / (side + 64)])
        assert sum(n > 0 for n in plan.guides) == guided
    assert drawing.calls(point) == calls


def test_a_retrofit_keeps_the_shift_of_its_base(tmp_path) -> None:
    ElitPipeline(tiny_dit(in_channels=1), make_scheduler("euler", 3.0)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"shift=1.0, but .* draws with shift 3.0; set objective"):
        load_base(str(tmp_path))
    assert isinstance(load_base(str(tmp_path), 3.0), DiT)


def test_a_run_that_predicts_samples_is_made_elastic(tmp_path) -> None:
    of_plain = {"model_preset": "dit-tiny/4", "sample_guidance_scale": 1.0, **BOTH}
    train(tiny_config(tmp_path / "base", 2, **of_plain), progress=False)
    sizes = "--retrofit.head 1 --retrofit.tail 1 --train.steps 2 --train.device cpu"
    quiet = "--data.batch_size 4 --train.validate_every 0 --train.sample_every 0"
    flags = f"--output_dir {tmp_path / 'out'} {sizes} {quiet}"
    assert main(["finetune", str(tmp_path / "base"), *flags.split()]) == 0
    drawn = ElitPipeline.from_pretrained(tmp_path / "out")
    assert drawn.transformer.prediction_type == "sample"
    assert shift_of(drawn.scheduler) == 3.0


def test_a_shift_by_tokens_is_not_dropped_with_its_sampler(tmp_path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    ElitPipeline(tiny_dit(in_channels=1), scheduler).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"which no other sampler can; give a shift beside"):
        open_pipeline(str(tmp_path), "cpu", "fp32", sampler="heun")
    with pytest.raises(ValueError, match=r"or save the pipeline with a scheduler of make_"):
        load_base(str(tmp_path), 3.0)
    opened = open_pipeline(str(tmp_path), "cpu", "fp32", sampler="heun", shift=2.0)
    assert shift_of(opened.scheduler) == 2.0
    assert opened.start(2, "cpu")[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_preset": "elit-sit-tiny/2", "model_overrides": {}}, "they predict velocities"),
        ({"model_overrides": {"prediction_type": "sample"}}, "is objective.prediction_type; give"),
        ({"model_preset": "elit-dit-tiny/2", "model_overrides": {}, "retrofit_base": "x"},
         "retrofit.base says what it predicts"),
        *(({"objective_shift": x}, "objective.shift") for x in (0.0, -1.0, 1e4, "size")),
    ],
)  # fmt: skip
def test_what_is_refused(changes, message: str, tmp_path) -> None:
    def build() -> None:
        config = tiny_config(tmp_path, **{"objective_prediction_type": "sample"} | changes)
        build_model(config, read_data(config).train)

    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_samples_follow_the_run_and_another_shift_is_a_flag(tmp_path, capsys) -> None:
    pipeline = ElitPipeline(tiny_dit(in_channels=1), make_scheduler("euler", 3.0))
    pipeline.save_pretrained(tmp_path / "run")
    drawn = {}
    for flags in ([], ["--shift", "3"], ["--shift", "1"], ["--shift", "dimension"],
                  ["--sampler", "heun"], ["--sampler", "heun", "--shift", "3"]):  # fmt: skip
        out = tmp_path / "-".join(["out", *flags])
        line = ["sample", str(tmp_path / "run"), "--labels", "1", "--steps", "3", "--out", str(out)]
        assert main([*line, *flags]) == 0
        drawn[tuple(flags)] = next(out.glob("*/*.png")).read_bytes()
    assert drawn[()] == drawn["--shift", "3"]
    assert drawn["--sampler", "heun"] == drawn["--sampler", "heun", "--shift", "3"]
    assert len(set(drawn.values())) == 4
    assert main(["sample", str(tmp_path / "run"), "--shift", "0"]) == 2
    assert "shift 0.0 is not allowed; give a number from 0.001" in capsys.readouterr().err
