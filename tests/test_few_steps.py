"""Runs that learn to draw in few steps."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import CPU, assert_same_run, metrics, tiny_config
from test_flow import MEAN, STD, gaussian_velocity
from torch import Tensor

from elit import CFG, ElitPipeline, make_scheduler
from elit._plain import from_plain
from elit.cli.train import sample_command
from elit.flow.objective import SigmaDensity
from elit.flow.shift import shifted
from elit.models.base import FEW_STEPS, LEARNED_GUIDANCE
from elit.training import few_steps
from elit.training.config import TrainConfig
from elit.training.few_steps import FewSteps
from elit.training.loop import train
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


def test_a_run_without_it_says_nothing_of_it(base: str) -> None:
    pipeline = ElitPipeline.from_pretrained(base)
    assert not {FEW_STEPS, LEARNED_GUIDANCE} & pipeline.transformer.config.keys()
    assert pipeline.few_steps is None
