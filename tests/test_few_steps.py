"""Runs that learn to draw in few steps."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import randomise, tiny_dit, tiny_elastic
from runs import CPU, assert_same_run, metrics, tiny_config
from test_flow import MEAN, STD, gaussian_velocity
from torch import Tensor

from elit import CFG, ElitPipeline, make_scheduler
from elit._plain import from_plain
from elit.cli.main import command_parser, main
from elit.cli.sweep import grid_of
from elit.cli.train import sample_command
from elit.cost.flops import cost_of
from elit.data import load_dataset
from elit.exporting.export import VelocityOf, _manifest
from elit.flow.objective import SigmaDensity
from elit.flow.shift import shifted
from elit.flow.words import GUIDANCES
from elit.models.base import FEW_STEPS, LEARNED_GUIDANCE
from elit.pipelines.load import load_pipeline, open_pipeline
from elit.scheduling.schedule import load_schedule
from elit.serving.settings import Settings
from elit.serving.worker import find_facts
from elit.studio.drawing import ElitDrawer
from elit.studio.studio import Studio
from elit.training import few_steps
from elit.training.build import build_model
from elit.training.config import TrainConfig
from elit.training.estimate import estimate
from elit.training.few_steps import FewSteps
from elit.training.loop import train
from elit.training.preflight import check_config
from elit.training.run import Run


class Gaussian:
    """A "model" that knows the velocity of Gaussian data, moved by the label."""

    config = SimpleNamespace(num_classes=9)

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor, return_dict: bool) -> tuple:
        moved = torch.where(labels == 9, 0.0, labels.float())
        return (gaussian_velocity(x, sigma[:, None]) + moved[:, None],)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_teacher_is_its_own_solution_over_each_step(shift: float, monkeypatch) -> None:
    """From x, on the path MEAN (1 - sigma) + deviation(sigma) z of the exact solution."""
    monkeypatch.setattr(few_steps, "SUBSTEPS", 64)
    sigma, end = (shifted(torch.arange(n, n + 4) / 4, shift) for n in (1, 0))
    x, labels = torch.randn(4, 5), torch.zeros(4, dtype=torch.long)

    def deviation(level: Tensor) -> Tensor:
        return ((1 - level) ** 2 * STD**2 + level**2).sqrt()[:, None]

    z = (x - MEAN * (1 - sigma)[:, None]) / deviation(sigma)
    expected = MEAN * (1 - end)[:, None] + deviation(end) * z
    velocity = FewSteps(Gaussian(), 4, 1.0, shift).velocity(x, sigma, labels)
    found = x + (end - sigma)[:, None] * velocity
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_the_guidance_is_learned_with_the_steps() -> None:
    sigma, x = torch.tensor([1.0, 0.5]), torch.randn(2, 3)
    labels = torch.tensor([2, 3])
    plain, guided = (FewSteps(Gaussian(), 2, scale, 1.0)._guided for scale in (1.0, 3.0))
    difference = guided(x, sigma, labels) - plain(x, sigma, labels)
    torch.testing.assert_close(difference, 2 * labels[:, None].expand(2, 3).float())
    null = torch.full((2,), 9)
    torch.testing.assert_close(guided(x, sigma, null), plain(x, sigma, null))


def test_a_plan_counts_the_teacher() -> None:
    """As many forwards of it as there are, beside three of the student."""
    calls: list[int] = []

    class Counted(Gaussian):
        def __call__(self, x: Tensor, *given: Any, **more: Any) -> tuple:
            calls.append(len(x))
            return super().__call__(x, *given, **more)

    plain = estimate(tiny_config(Path("unused"), latents_min=4, latents_max=4), gpus=1)
    full = cost_of(build_model(tiny_config(Path("unused")), load_dataset("digits"))).flops()
    for scale in (1.0, 2.0):
        calls.clear()
        x, sigma = torch.randn(5, 3), torch.ones(5)
        FewSteps(Counted(), 4, scale, 1.0).velocity(x, sigma, torch.zeros(5, dtype=torch.long))
        few = {"base": "r", "guidance_scale": scale}
        config = few_config(Path("unused"), 6, few, latents_min=4, latents_max=4)
        found = estimate(config, gpus=1)
        more = 1e12 * (found["step_tflops"] - plain["step_tflops"])
        assert more == pytest.approx(sum(calls) / 5 * config.data.batch_size * full)
        assert found["state_gb"] == pytest.approx(1.2 * plain["state_gb"])


def test_only_the_levels_of_the_steps_are_drawn() -> None:
    density = SigmaDensity("uniform", shift=3.0, steps=4)
    sigma = density.sample(1000, torch.Generator().manual_seed(0))
    expected = [shifted(level, 3.0) for level in (0.25, 0.5, 0.75, 1.0)]
    assert sorted(set(sigma.tolist())) == pytest.approx(expected)


def few_config(folder: Path, steps: int, few: dict[str, Any], **changes: Any) -> TrainConfig:
    values = tiny_config(folder, steps, **changes).to_dict()
    return from_plain(TrainConfig, {**values, "few_steps": few})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    train(tiny_config(folder, steps=12, data_batch_size=16, optimizer_lr=1e-2), progress=False)
    return str(folder)


@pytest.mark.slow
def test_a_run_takes_a_models_steps_together(base: str, tmp_path, caplog) -> None:
    few, shown = {"base": base, "steps": 3}, {"train_validate_every": 6, "train_sample_every": 6}
    at = {"sample_budgets": [1.0, 0.25]}
    begun = Run(few_config(tmp_path / "begun", 6, few, **at), CPU)
    trained = ElitPipeline.from_pretrained(base).transformer.state_dict()
    assert all(torch.equal(trained[name], x) for name, x in begun.model.state_dict().items())
    begun.validate()
    begun.close()
    train(few_config(tmp_path / "a", 6, few, **shown, **at), progress=False)
    train(few_config(tmp_path / "b", 4, few, **at), progress=False)
    train(few_config(tmp_path / "b", 6, few, **at), progress=False)
    assert_same_run(tmp_path / "a", tmp_path / "b", 6)
    (before,), (*_, after) = (
        [line["validation/loss_1"] for line in metrics(folder) if "validation/loss_1" in line]
        for folder in (tmp_path / "begun", tmp_path / "a")
    )
    assert after < before

    config = few_config(tmp_path / "a", 6, few)
    assert " --steps 3" in sample_command(config)
    assert "--guidance" not in sample_command(config)
    pipeline = ElitPipeline.from_pretrained(tmp_path / "a")
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline.start(None, "cpu")) == 3
    caplog.clear()
    caplog.set_level(logging.WARNING, "elit")
    drawn = [
        pipeline([1], seed=0, output_type="pt", num_inference_steps=n).images for n in (None, 3)
    ]
    assert torch.equal(*drawn)
    assert not caplog.messages
    pipeline([1], num_inference_steps=3, guidance=CFG(2.0))
    assert "has learned guidance of scale 2" in caplog.messages[-1]
    pipeline([1], num_inference_steps=4)
    assert "trained to draw in 3 steps of the sampler euler" in caplog.messages[-1]
    pipeline.scheduler = make_scheduler("heun")
    pipeline([1])
    assert len(caplog.messages) == 3
    again = few_config(tmp_path / "c", 6, {"base": str(tmp_path / "a")})
    with pytest.raises(ValueError, match="draws in few steps already"):
        Run(again, CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_overrides": {"hidden_size": 16, "num_heads": 2, "depth": 3}},
         r"of another model: a DiT, hidden_size 32 there, 16 here; train by its own config"),
        ({"model_preset": "elit-mmdit-tiny/2", "model_overrides": {},
          "data_name": "captioned-shapes", "data_options": {"count": 8, "size": 16}},
         "is for those that draw classes"),
        ({"objective_density": "uniform"}, "levels of its steps; leave them out"),
        ({"few": {"steps": 2}}, "no effect without few_steps.base"),
        ({"model_preset": "elit-dit-tiny/2", "model_overrides": {}, "retrofit_base": "x"},
         "are two runs"),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], message: str, base: str, tmp_path) -> None:
    def begin(few: Any = None, **changes: Any) -> None:
        Run(few_config(tmp_path / "run", 6, few or {"base": base}, **changes), CPU)

    with pytest.raises(ValueError, match=message):
        begin(**changes)


@pytest.fixture
def few(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path / "cache"))
    run, model = tmp_path / "run", tiny_elastic(in_channels=1, sample_size=16, num_classes=10)
    model.register_to_config(**{FEW_STEPS: 3})
    ElitPipeline(randomise(model), make_scheduler("euler")).save_pretrained(run)
    (run / "config.yaml").write_text(yaml.safe_dump(tiny_config(run).to_dict()))
    return str(run)


def told(capsys, *words: object) -> dict[str, Any]:
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_that_draws_takes_the_models_own_steps(few: str, capsys) -> None:
    assert told(capsys, "calibrate", few, "--labels", 1, 2, "--degree", 1)["steps"] == 3
    plans = told(capsys, "schedule", few, "--by", "spectrum", "--images", 2)["plans"]
    assert {len(plan["budgets"]) for plan in plans} == {3}
    pipeline = load_pipeline(few)
    plan = load_schedule(few).plan(pipeline, 1e12)
    assert plan.num_inference_steps == len(plan.levels) == 3
    assert Studio(ElitDrawer(pipeline, few)).steps == 3
    assert find_facts(pipeline, Settings(few, batch_size=2)).way.steps == 3
    manifest = _manifest(pipeline, VelocityOf(pipeline.transformer, (16, 16)), "torch-export", None)
    assert manifest["levels"] == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_a_check_reads_the_base_without_its_numbers(tmp_path, recwarn) -> None:
    config = tiny_config(tmp_path / "base")
    model = build_model(config, load_dataset("digits"))
    ElitPipeline(model, make_scheduler("euler")).save_pretrained(tmp_path / "base")
    recwarn.clear()
    check_config(few_config(tmp_path / "run", 6, {"base": str(tmp_path / "base")}))
    assert not [one for one in recwarn if "meta" in str(one.message)]


def test_guidance_needs_the_label_for_none(tmp_path) -> None:
    config = tiny_config(tmp_path / "base", objective_label_dropout=0.0, sample_guidance_scale=1.0)
    model = build_model(config, load_dataset("digits"))
    ElitPipeline(model, make_scheduler("euler")).save_pretrained(tmp_path / "base")
    (tmp_path / "base/config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    few = {"base": str(tmp_path / "base")}
    with pytest.raises(ValueError, match=r"has not learned, of objective.label_dropout=0; give 1"):
        check_config(few_config(tmp_path / "run", 6, few))
    check_config(few_config(tmp_path / "run", 6, few | {"guidance_scale": 1.0}))


def test_a_guide_that_was_not_learned_is_told(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    config = tiny_config(run, objective_label_dropout=0.0, sample_guidance_scale=1.0)
    model = build_model(config, load_dataset("digits"))
    ElitPipeline(model, make_scheduler("euler")).save_pretrained(run)
    (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    for kind, is_told in (("none", False), ("ag", False), ("ccfg", True)):
        words = "sample", str(run), "--labels", "1", "--steps", "1", "--budget", "1"
        assert main([*words, "--guidance", kind, "--out", str(tmp_path / kind)]) == 0
        assert ("guides by chance" in capsys.readouterr().err) == is_told
    (run / "config.yaml").write_text("of: another program")
    assert main([*words, "--guidance", "cfg", "--out", str(tmp_path / "other")]) == 0


def test_a_model_of_few_steps_is_not_elasticized(tmp_path) -> None:
    model = tiny_dit(in_channels=1, sample_size=16, num_classes=10)
    model.register_to_config(**{FEW_STEPS: 3})
    ElitPipeline(model, make_scheduler("euler")).save_pretrained(tmp_path / "run")
    changes: dict[str, Any] = {"model_preset": "elit-dit-tiny/2", "model_overrides": {}}
    config = tiny_config(tmp_path / "out", retrofit_base=str(tmp_path / "run"), **changes)
    with pytest.raises(ValueError, match="draws in 3 steps, which a retrofit would unlearn"):
        Run(config, CPU)


def test_a_learned_guidance_is_not_guided_again_unless_asked(few: str, capsys, caplog) -> None:
    def schedule(*words: object) -> float:
        measured = "schedule", few, "--by", "spectrum", "--images", 2
        return told(capsys, *measured, *words)["full_gflops"]

    def guides(*words: str) -> list[str]:
        parser = command_parser("sweep")
        return list(grid_of(parser.parse_args([few, *words]), load_pipeline(few)).guides)

    guided = schedule()
    assert guides() == [*GUIDANCES]
    pipeline = load_pipeline(few)
    pipeline.transformer.register_to_config(**{LEARNED_GUIDANCE: 2.0})
    pipeline.save_pretrained(few)
    assert schedule() == guided / 2
    assert schedule("--scale", 2) == guided
    assert guides() == ["none"]
    assert guides("--scale", "3") == [*GUIDANCES]
    caplog.set_level(logging.WARNING, "elit")
    open_pipeline(few, "cpu", shift=1.0)
    assert not caplog.messages
    open_pipeline(few, "cpu", shift=3.0)
    assert caplog.messages == ["this model was trained to draw at shift 1.0 alone"]


def test_a_run_goes_on_with_its_own_base_alone(tmp_path) -> None:
    model = build_model(tiny_config(tmp_path), load_dataset("digits"))
    base = ElitPipeline(model, make_scheduler("euler"))
    base.save_pretrained(tmp_path / "base")
    few = {"base": str(tmp_path / "base")}
    train(few_config(tmp_path / "run", 2, few), progress=False)
    next(model.parameters()).data += 1
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"another base: few_steps.base has changed since"):
        Run(few_config(tmp_path / "run", 4, few), CPU)


@pytest.mark.slow
def test_scores_are_of_the_models_own_steps(few: str, capsys) -> None:
    scored = few, "--network", "classifier", "--samples", 4, "--guidance", "none"
    (row,) = told(capsys, "eval", *scored)["rows"]
    assert (row["steps"], row["calls"]) == (3, 3)
    (row,) = told(capsys, "sweep", *scored, "--budgets", 1)["rows"]
    assert row["steps"] == 3


def test_a_run_without_it_says_nothing_of_it(base: str) -> None:
    pipeline = ElitPipeline.from_pretrained(base)
    assert not {FEW_STEPS, LEARNED_GUIDANCE} & pipeline.transformer.config.keys()
    assert pipeline.few_steps is None
