"""`elit quickstart`: its rows, the plain model beside them, what it leaves and prints."""

import itertools
import json

import pytest
from runs import reads as reads  # a fixture
from runs import tiny_config

from elit.cli.main import main
from elit.models.presets import create_model
from elit.training import quickstart as module
from elit.training.config_files import load_config


@pytest.mark.parametrize(
    ("group", "min_latents", "kept"),
    [
        (4, 1, [16, 8, 4, 2, 1]),
        (8, 1, [64, 16, 4, 1]),
        (8, 2, [64, 16, 4, 2]),
        (4, 4, [16, 8, 4]),
        (2, 4, [4]),
        (1, 1, [1]),
    ],
)
def test_rows_go_down_to_the_fewest_latents(group, min_latents, kept) -> None:
    model = create_model("elit-dit-tiny/2", group=group, min_latents=min_latents)
    assert [model.resolve_budget(b) for b in module.budgets_to_draw(model)] == kept


@pytest.mark.parametrize("family", ["dit", "uvit", "hdit", "sit"])
def test_the_plain_model_has_the_same_blocks(family) -> None:
    name = f"elit-{family}-tiny/2"
    model = create_model(name)
    plain = module.plain_model(model, name.upper())
    assert not plain.is_elastic
    assert [type(b) for b in plain.blocks] == [type(b) for b in model.blocks]
    assert {k: v.shape for k, v in plain.blocks.named_parameters()} == {
        k: v.shape for k, v in model.blocks.named_parameters()
    }


def test_what_it_leaves_and_prints(tmp_path, monkeypatch, capsys, reads) -> None:
    monkeypatch.setattr(module, "IMAGES_PER_CLASS", 1)
    monkeypatch.setattr(module, "ROUNDS", 2)
    config = tiny_config(tmp_path, steps=2, sample_guidance_scale=1.5)
    monkeypatch.setattr("elit.cli.quickstart.load_config", lambda *_: config)
    assert main(["quickstart", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert reads == ["train", "validation"]

    report = json.loads((tmp_path / "summary.json").read_text())
    rows, plain = report["rows"], report["plain"]
    assert [row["num_latents"] for row in rows] == [16, 8, 4, 2, 1]
    shares = [row["mflops"] / rows[0]["mflops"] for row in rows]
    assert [row["share"] for row in rows] == pytest.approx(shares)
    assert all(a["mflops"] > b["mflops"] for a, b in itertools.pairwise(rows))
    assert all(row["ms_per_image"] > 0 and row["loss"] > 0 for row in rows)
    assert all(0 <= row["accuracy"] <= 1 and row["distance"] > 0 for row in rows)
    assert 0 < plain["mflops"] < rows[0]["mflops"]
    assert plain["ms_per_image"] > 0
    numbers = {name: report[name] for name in ("num_groups", "images_per_row", "images_per_batch")}
    assert list(numbers.values()) == [4, 20, 10]
    assert (tmp_path / "samples.png").stat().st_size
    lines = printed.splitlines()
    assert "latents per picture" in lines[0]
    assert lines[2].split()[:2] == ["1", "64"]
    assert lines[6].split()[:2] == ["1/16", "4"]
    assert lines[7].startswith("plain model, time only")
    assert "poor digits" in printed


def test_another_preset_comes_without_the_overrides(tmp_path, monkeypatch, capsys) -> None:
    seen = []

    def note(config, data):
        seen.append(config)
        return {"finished": False}  # stopped

    monkeypatch.setattr(module, "quickstart", note)
    own = load_config("digits", {}).model
    for preset in ("elit-uvit-tiny/2", "elit-hdit-tiny/2", "elit-dit-tiny/2"):
        main(["quickstart", "--preset", preset, "--out", str(tmp_path)])
        assert (seen[-1].model.preset, seen[-1].model.overrides) == (preset, {})
        assert f"{preset} without the config's overrides: hidden_size=48" in capsys.readouterr().err
    for flags in ([], ["--preset", own.preset]):
        main(["quickstart", *flags, "--out", str(tmp_path)])
        assert seen[-1].model == own
        assert not capsys.readouterr().err
