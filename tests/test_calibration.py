"""Calibration of TeaCache and MagCache: the library's, the file, the command line's."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomise, tiny_dit, tiny_elastic
from retrofit_models import Stack
from torch import Tensor, nn

import elit
from elit import TeaCacheConfig, calibrate_cache
from elit.caching.calibration import fit_polynomial
from elit.cli.main import main


class Follows(nn.Module):
    """Gives its input times what the test says for this call."""

    def __init__(self, factors: Sequence[float]):
        super().__init__()
        self.part, self.factors, self.calls = nn.Identity(), list(factors), 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        factor = self.factors[self.calls % len(self.factors)]
        self.calls += 1
        return self.part(1.0 * hidden_states) * factor


def test_calibration_recovers_a_known_polynomial() -> None:
    known = (0.3, -0.2, 0.1, 0.7, 0.05)
    changes = np.linspace(0.1, 1.0, 12)
    levels = np.cumprod([1.0, *(1 + changes)])
    outputs = np.cumprod([1.0, *(1 + np.polyval(known, changes))])
    stack = Stack(Follows([1.0]), Follows(outputs / levels))
    tokens = torch.rand(1, 4, 3) + 0.5

    def draw_it() -> None:
        for i, level in enumerate(levels):
            stack(tokens * float(level), timestep=torch.tensor(1 - i / 20))

    calibration = calibrate_cache(stack, draw_it)
    assert calibration.coefficients == pytest.approx(known, abs=2e-3)
    assert calibration.fit_error < 1e-4
    assert calibration.num_steps == 13
    seen = calibration.changes
    assert [change.input for change in seen] == pytest.approx(list(changes), rel=1e-4)
    residuals = np.abs(outputs - levels)[1:]  # the first step adds nothing
    assert calibration.mag_ratios[2:] == pytest.approx(
        list(residuals[1:] / residuals[:-1]), rel=1e-3
    )
    config = calibration.teacache(threshold=0.2)
    assert config.fitted_range == pytest.approx((0.1, 1.0), rel=1e-4)
    assert config.output_change(0.5) == pytest.approx(np.polyval(known, 0.5), rel=1e-3)
    assert config.output_change(2.0) == pytest.approx(2 * config.output_change(1.0), rel=1e-3)
    assert config.output_change(0.0) >= 0
    assert calibration.magcache().num_inference_steps == 13
    assert calibration.computed_steps(0.0) == 13
    assert calibration.computed_steps(1e9) == 2
    assert not hasattr(stack, "_cache_config")
    with pytest.raises(
        ValueError, match=r"2 different changes.*too few for a polynomial of degree"
    ):
        fit_polynomial([0.1, 0.2, 0.1], [1, 2, 1], 4)
    with pytest.raises(ValueError, match="degree 5 is not allowed; give 1 to 4"):
        calibrate_cache(stack, draw_it, degree=5)


@pytest.fixture
def pipe() -> elit.ElitPipeline:
    pipe = elit.ElitPipeline(tiny_elastic(depth=5), elit.make_scheduler("euler"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: elit.ElitPipeline) -> None:
    noise = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe([0, 2], num_inference_steps=6, output_type="latent", noise=noise)


def test_the_steps_foreseen_are_the_steps_computed(pipe) -> None:
    calibration = calibrate_cache(pipe.transformer, lambda: draw(pipe), degree=2)
    for threshold in (0.0, 0.1, 0.5, 1e9):
        pipe.transformer.enable_cache(calibration.teacache(threshold))
        draw(pipe)
        computed = pipe.transformer.cache_counts()[0]
        # A skipped step changes the next one's input, so that others may follow.
        assert abs(computed - calibration.computed_steps(threshold)) <= 1
        pipe.transformer.disable_cache()


def test_a_config_is_a_small_file(tmp_path) -> None:
    config = TeaCacheConfig(0.2, (1, 2.5, -3), fitted_range=(0.1, 0.9), probe="attn")
    config.save(tmp_path / "teacache.json")
    assert TeaCacheConfig.load(tmp_path / "teacache.json") == config
    assert TeaCacheConfig.load(tmp_path / "teacache.json", threshold=0.5).threshold == 0.5
    values = json.loads((tmp_path / "teacache.json").read_text())
    assert values["coefficients"] == [1.0, 2.5, -3.0]

    def load(text: str) -> None:
        (tmp_path / "broken.json").write_text(text)
        TeaCacheConfig.load(tmp_path / "broken.json")

    for text, reason in (
        ("{", "is not JSON"),
        ("[]", "`elit calibrate` writes"),
        ('{"cache": "TeaCache", "treshold": 1}', "'treshold'.*did you mean 'threshold'"),
        ('{"cache": "TeaCache", "threshold": -1}', "threshold -1.0 is not allowed"),
    ):
        with pytest.raises(ValueError, match=reason):
            load(text)
    with pytest.raises(ValueError, match=r"there is no .*; `elit calibrate` writes it"):
        TeaCacheConfig.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "threshold -0.1 is not allowed; give 0 to skip nothing"),
        ({"threshold": "much"}, "threshold 'much' is not allowed"),
        ({"coefficients": ()}, r"coefficients \(\) are not allowed; give 1 to 5 finite numbers"),
        ({"coefficients": [1.0] * 6}, "give 1 to 5 finite numbers"),
        ({"coefficients": [1.0, float("nan")]}, "give 1 to 5 finite numbers"),
        ({"coefficients": 3}, "coefficients 3 are not allowed"),
        ({"fitted_range": (0.5, 0.1)}, "give 0 < low <= high"),
        ({"fitted_range": (0.5,)}, "give 2 finite numbers"),
        ({"num_inference_steps": 0}, "num_inference_steps 0 is not allowed"),
    ],
)
def test_settings_that_cannot_be(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        TeaCacheConfig(**settings)


# ---- the command line ----


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, model in (("run", tiny_elastic(in_channels=1)), ("plain", tiny_dit(in_channels=1))):
        elit.ElitPipeline(model, elit.make_scheduler("euler")).save_pretrained(name)
    return tmp_path


def test_calibrate_then_sample(folders, capsys) -> None:
    words = "--steps 6 --labels 0 2 --budget 1 1/4 --guidance ccfg --scale 2".split()  # noqa: SIM905
    assert main(["calibrate", "run", *words, "--degree", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    config = TeaCacheConfig.load("run/teacache.json")
    assert config.coefficients == tuple(report["coefficients"])
    assert (report["steps"], len(report["mag_ratios"]), report["fitted_to"]) == (6, 6, 20)
    computed = list(report["computed_steps"].values())
    assert computed == sorted(computed, reverse=True)

    draws = ["sample", "run", "--steps", "6", "--labels", "0", "2", "--json"]
    for threshold in ("0", "1e9"):
        assert main([*draws, "--teacache", threshold, "--out", threshold]) == 0
    assert main([*draws, "--out", "none"]) == 0
    capsys.readouterr()
    none, strict, lax = (
        [file.read_bytes() for file in sorted((folders / out / "budget-1").glob("*.png"))]
        for out in ("none", "0", "1e9")
    )
    assert none == strict != lax
    settings = [
        json.loads((folders / out / "samples.json").read_text())["settings"]
        for out in ("none", "1e9")
    ]
    assert "teacache" not in settings[0]
    assert settings[1]["teacache"] == config.to_dict() | {"threshold": 1e9}
    # The same settings again write to the same folder.
    assert main([*draws, "--teacache", "1e9", "--out", "1e9"]) == 0
    assert main([*draws[:-1], "--teacache", "1e9"]) == 0
    assert "TeaCache skipped 4 of 6 calls of the blocks" in capsys.readouterr().out


def test_calibrate_prints_a_table(folders, capsys) -> None:
    words = ["calibrate", "plain", "--steps", "5", "--degree", "1", "--out", "other.json"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["threshold", "steps", "computed"]
    assert lines[-1].startswith("fitted to 4 changes from step to step, to within ")
    assert (folders / "other.json").exists()
    assert not (folders / "plain" / "teacache.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sample run --teacache 0.1", "there is no run/teacache.json; `elit calibrate` writes it"),
        ("sample run --teacache much", "'much' is not allowed; give a number"),
        ("calibrate run --steps 5", "4 different changes from step to step are too few"),
        ("calibrate run --steps 2", "give a whole number, at least 3"),
        ("calibrate run --degree 5", "at least 1 and at most 4"),
        ("calibrate run --prompts x", "--prompts is for models that draw texts"),
        ("calibrate run --scale 2", "--scale has no effect without guidance"),
        ("calibrate plain --budget 0.5", "budget 0.5 asked of a model that is not elastic"),
        ("calibrate nowhere", "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(folders, capsys, words, message) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_of_texts_is_calibrated_too(folders, capsys) -> None:
    model = randomise(elit.create_model("elit-mmdit-tiny/2", 16, in_channels=3), std=0.05)
    elit.ElitTextPipeline(model, elit.make_scheduler("euler")).save_pretrained("texts")
    words = ["texts", "--prompts", "a red disc", "a blue ring", "--steps", "4"]
    assert main(["calibrate", *words, "--degree", "1"]) == 0
    assert main(["sample", *words, "--guidance", "ccfg", "--teacache", "1e9"]) == 0
    assert "TeaCache skipped 4 of 8 calls of the blocks" in capsys.readouterr().out


def test_a_calibration_of_other_weights_is_refused(folders, capsys) -> None:
    words = ["--steps", "6", "--labels", "0", "--out", "x"]
    assert main(["calibrate", "run", *words[:-2], "--degree", "2"]) == 0
    assert main(["sample", "run", *words, "--teacache", "0.1"]) == 0
    other = tiny_elastic(in_channels=1)
    torch.nn.init.normal_(next(other.parameters()))
    elit.ElitPipeline(other, elit.make_scheduler("euler")).save_pretrained("run")
    assert main(["sample", "run", *words, "--teacache", "0.1"]) == 2
    said = capsys.readouterr().err
    assert "fitted to other weights than run holds now; run `elit calibrate run` again" in said
