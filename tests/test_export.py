"""Exported models: one file for all budgets and batches, and drawing with it without elit."""

import json
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomise, tiny_dit, tiny_elastic
from prepare_sources import tiny_vae

from elit import (
    CheapCFG,
    ElitPipeline,
    ElitTextPipeline,
    create_model,
    elasticize,
    make_scheduler,
)
from elit.cli.main import main
from elit.exporting.export import VelocityOf, compare, export
from elit.exporting.formats import check_format, open_exported

RUNNER = Path(__file__).parents[1] / "examples" / "run_export.py"
NEEDS_ONNX = pytest.mark.skipif(not find_spec("onnxscript"), reason="needs the extra `export`")
FORMATS = [
    "torch-export",
    pytest.param("onnx", marks=NEEDS_ONNX),
    pytest.param("aoti", marks=pytest.mark.slow),
]
CASES = [
    pytest.param(f"{form}{name}-tiny/2", to, marks=marks)
    for form in ("elit-", "")
    for name in ("dit", "uvit", "hdit", "mmdit", "sit", "video-dit")
    for to in ("torch-export", "onnx", "aoti")
    for marks in [[pytest.mark.slow, *[NEEDS_ONNX] * (to == "onnx")]]
]


def pipeline_of(model: Any) -> Any:
    kind = ElitTextPipeline if model.takes_text else ElitPipeline
    return kind(model, make_scheduler("euler"))


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_draws_what_the_pipeline_draws(form, tmp_path, capsys, monkeypatch) -> None:
    """At any budget and batch, guided by a lower budget, in a process that knows no elit."""
    pipe = pipeline_of(tiny_elastic(in_channels=1))
    pipe.save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--format", form, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["checks"]
    assert [(row["batch"], row["num_latents"]) for row in rows] == [
        (batch, n) for batch in (1, 2, 5) for n in (1, 2, 4, 8, 16)
    ]
    assert max(row["difference"] for row in rows) < 5e-5
    file = Path(report["out"])
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name, f"{file.name}.json"]
    manifest = json.loads(Path(f"{file}.json").read_text())
    assert manifest["bytes"] == file.stat().st_size
    assert manifest["levels"] == pytest.approx([1 - i / 40 for i in range(41)])
    assert manifest["num_latents"] == {"1": 16, "0.5": 8, "0.25": 4, "0.125": 2, "0.0625": 1}

    code = f"""
import runpy, sys
sys.modules["elit"] = sys.modules["diffusers"] = None  # whoever imports them, fails
sys.argv = ["run_export.py", {str(file)!r}, *"--labels 2 0 1 --budget 0.3 --steps 4 --scale 3 \
--guide-budget 0.1 --seed 7".split(), "--out", {str(tmp_path / "samples.npy")!r}]
runpy.run_path({str(RUNNER)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'samples.npy'}\n"
    noise = np.random.default_rng(7).standard_normal((3, 1, 8, 8), np.float32)
    (wanted,) = pipe(
        [2, 0, 1], 0.3, 4, CheapCFG(3.0, 0.1), noise=torch.from_numpy(noise),
        output_type="latent", return_dict=False,
    )  # fmt: skip
    np.testing.assert_allclose(np.load(tmp_path / "samples.npy"), wanted, atol=1e-4)

    def refused(words: str, message: str) -> None:
        monkeypatch.setattr(sys, "argv", ["run_export.py", str(file), *words.split()])
        with pytest.raises(SystemExit, match=message):
            runpy.run_path(str(RUNNER), run_name="__main__")

    refused("--budget 0", r"give a budget in \(0, 1\]")
    refused("--labels 99", "labels below")
    file.write_bytes(file.read_bytes() + b"0")
    refused("--budget 1", "is not the file that")


@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_model_in_every_format(name, form, tmp_path) -> None:
    pipe = pipeline_of(randomise(create_model(name), std=0.05))
    rows = export(pipe, form, tmp_path)["checks"]
    assert max(row["difference"] for row in rows) < 1e-5


def test_a_model_that_was_made_elastic_is_refused(tmp_path) -> None:
    pipe = pipeline_of(elasticize(tiny_dit(in_channels=1), head=1, tail=1, group=(2, 2)))
    with pytest.raises(ValueError, match="was made elastic places its latents by their number"):
        export(pipe, "torch-export", tmp_path)


@pytest.mark.slow
def test_a_text_of_any_length_and_its_padding(tmp_path) -> None:
    pipe = pipeline_of(randomise(create_model("elit-mmdit-tiny/2"), std=0.05))
    manifest = export(pipe, "torch-export", tmp_path)
    names = [entry["name"] for entry in manifest["inputs"]]
    assert names[2:] == ["encoder_hidden_states", "encoder_attention_mask", "latent_indices"]
    condition, null = pipe.encode_prompt(["a red circle", "two"], "")
    what, nothing = ([one[name].numpy() for name in names[2:4]] for one in (condition, null))
    assert what[0].shape[1] < pipe.transformer.config.max_text_length
    runner = runpy.run_path(str(RUNNER))
    velocity = runner["load"](tmp_path / manifest["file"], manifest)
    noise = torch.randn(2, 1, 16, 16)
    got = runner["sample"](velocity, manifest, noise.numpy(), what, nothing, 0.5, 3, 2.0, 0.25)
    embeds, guidance = (condition, null), CheapCFG(2.0, 0.25)
    (wanted,) = pipe(
        prompt_embeds=embeds, budget=0.5, num_inference_steps=3, guidance=guidance, noise=noise,
        output_type="latent", return_dict=False,
    )  # fmt: skip
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_the_runner_makes_no_levels_of_its_own_where_they_are_shifted() -> None:
    about = {"levels": [1.0, 0.75, 0.0], "max_latents": 4}
    with pytest.raises(ValueError, match="levels are shifted; run `elit export` with --steps 3"):
        runpy.run_path(str(RUNNER))["sample"](None, about, np.zeros(1), [], [], steps=3)


@pytest.mark.slow
def test_a_plain_model_and_one_of_a_single_latent(tmp_path) -> None:
    """There the number of latents is no input, or a constant."""
    manifest = export(pipeline_of(tiny_dit()), "torch-export", tmp_path)
    assert [entry["name"] for entry in manifest["inputs"]] == ["samples", "sigma", "class_labels"]
    assert [row["num_latents"] for row in manifest["checks"]] == [None] * 3
    manifest = export(pipeline_of(tiny_elastic(group=1)), "torch-export", tmp_path)
    assert [row["num_latents"] for row in manifest["checks"]] == [1] * 3


@pytest.mark.slow
def test_another_size_of_input(tmp_path) -> None:
    manifest = export(pipeline_of(tiny_elastic()), "torch-export", tmp_path, (8, 16), steps=3)
    assert manifest["inputs"][0]["shape"] == ["batch", 2, 8, 16]
    assert manifest["levels"] == pytest.approx([1, 2 / 3, 1 / 3, 0])


@pytest.mark.slow
def test_bf16(tmp_path) -> None:
    manifest = export(pipeline_of(tiny_elastic().bfloat16()), "torch-export", tmp_path)
    types = {entry["name"]: entry["dtype"] for entry in manifest["inputs"]}
    assert (types["samples"], types["sigma"]) == ("bfloat16", "float32")


def test_a_file_that_says_something_else_is_refused() -> None:
    velocity = VelocityOf(tiny_elastic(), (8, 8))
    with pytest.raises(ValueError, match=r"off by 0\.001 of the largest velocity at batch 1 and"):
        compare(velocity, lambda *given: velocity(*given) * 1.001)


def test_it_tells_the_autoencoders_numbers(tmp_path) -> None:
    pipe = ElitPipeline(
        tiny_elastic(in_channels=1), make_scheduler("heun"), tiny_vae(latent_channels=1)
    )
    manifest = export(pipe, "torch-export", tmp_path)
    decoding = manifest["decoding"]
    assert decoding["class"] == "AutoencoderKL"
    assert (decoding["scale"], decoding["shift"]) == ((0.5,), (0.25,))
    assert manifest["levels"] == pytest.approx([1 - i / 40 for i in range(41)])  # each once


@pytest.mark.parametrize(("words", "text"), [
    (["--format", "onxx"], "unknown format 'onxx': use one of 'onnx', 'aoti', 'torch-export'; did"),
    ([], "--format"),
    (["--format", "onnx", "--dtype", "bf16"], "onnx on auto in bf16 is not made here; leave"),
    (["--format", "onnx", "--device", "cuda"], "onnx on cuda in fp32 is not made here; leave"),
    (["--format", "aoti", "--out", "run/model_index.json"], "is not a folder; choose another"),
    (["--format", "torch-export", "--size", "7", "8"], "7 is not a multiple of 4"),
])  # fmt: skip
def test_mistakes(words, text, tmp_path, capsys, monkeypatch) -> None:
    pipeline_of(tiny_elastic(in_channels=1)).save_pretrained(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "run", *words]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "export").exists()


def test_aoti_needs_a_compiler(monkeypatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match=r"--format aoti needs a C\+\+ compiler; install g\+\+"):
        check_format("aoti", "auto", "fp32")


def test_opened_from_python(tmp_path) -> None:
    model = tiny_elastic()
    manifest = export(pipeline_of(model), "torch-export", tmp_path)
    names = [entry["name"] for entry in manifest["inputs"]]
    run = open_exported("torch-export", names, tmp_path / manifest["file"])
    given = VelocityOf(model, (8, 8)).example(3, 7)
    with torch.no_grad():
        wanted = model(*given[:3], num_latents=7).sample
        torch.testing.assert_close(run(*given), wanted)
