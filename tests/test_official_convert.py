"""Folders made of public checkpoints: what is in them, and what converts and takes them."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import refuses
from official_files import FLAGS, GOLDEN, TINY
from official_files import file as file  # fixtures
from official_files import folder as folder
from official_files import state as state
from official_files import vae as vae
from prepare_sources import tiny_vae

from elit import ElitPipeline, _files, from_official_checkpoint, load_pipeline
from elit.cli.main import main
from elit.interop import convert
from elit.interop.convert import ConversionSettings, convert_official

# ---- what is in a folder ----


def test_a_converted_folder_is_the_checkpoint(folder, state) -> None:
    pipeline = load_pipeline(folder)
    assert type(pipeline) is ElitPipeline
    assert type(pipeline.scheduler).__name__ == "FlowMatchUniformEulerScheduler"  # the published
    expected = from_official_checkpoint(GOLDEN / "elit_tiny.weights.safetensors", **TINY)
    x, sigma, label = torch.randn(1, 4, 16, 16), torch.tensor([0.4]), torch.tensor([3])
    for kept in (1, 16):
        with torch.no_grad():
            found = pipeline.transformer(x, sigma, label, num_latents=kept).sample
            wanted = expected(x, sigma, label, num_latents=kept).sample
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    (image,) = pipeline([3], budget=0.25, num_inference_steps=2, output_type="np").images
    assert image.shape == (32, 32, 3)
    wide = pipeline([3], num_inference_steps=1, height=16, width=48, output_type="np").images
    assert wide.shape == (1, 16, 48, 3)


def test_the_card_has_source_licence_and_settings(folder, file) -> None:
    import hashlib

    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: other\nlicense_name: snap-non-commercial\n")
    for said in ("Snap Inc.'s non-commercial\nlicence", "| file | `elit_tiny.pt` |", "400,000",
                 "| head | 2 |", "| group | 4 |", "| weights | ema |",
                 hashlib.sha256(file.read_bytes()).hexdigest()):  # fmt: skip
        assert said in card
    assert "AutoencoderKL" not in card  # the folder has one
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    compile(code, "card", "exec")


def test_a_folder_of_others_is_never_written_into(folder, file, tmp_path, vae, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    words = ["convert", "official", str(file)]
    for out, message in (
        (tmp_path / "mine", "is not empty and holds no conversion"),
        (folder, "holds another conversion, of elit_tiny.pt or with other settings"),
        (file, "is not a folder"),
    ):
        assert main([*words, str(out), *FLAGS]) == 2
        assert message in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    words += [str(folder), *FLAGS, "--vae", str(vae)]
    assert main(words) == 0  # this very one: nothing to do
    assert "holds this conversion already" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_conversion_that_fails_leaves_nothing(file, tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("elit.interop.convert.model_card", full)
        with pytest.raises(OSError, match="No space"):
            convert_official(file, tmp_path / "out", ConversionSettings(**TINY))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())
    convert_official(file, tmp_path / "out", ConversionSettings(**TINY))
    assert (tmp_path / "out" / "model_index.json").exists()


def test_a_conversion_that_was_damaged_is_not_taken_for_whole(file, tmp_path) -> None:
    settings, out = ConversionSettings(**TINY), tmp_path / "out"
    convert_official(file, out, settings)
    (weights,) = out.glob("transformer/*.safetensors")
    weights.write_bytes(b"1")
    refuses(r"safetensors is missing or was changed; remove", convert_official, file, out, settings)
    (out / "conversion.json").write_text('{"source": 5}')
    refuses(r"holds no conversion", convert_official, file, out, settings)


def test_two_conversions_at_once_are_one(file, tmp_path, monkeypatch) -> None:
    settings, out = ConversionSettings(**TINY), tmp_path / "out"
    card = convert.model_card

    def slow(report) -> str:
        monkeypatch.undo()
        convert_official(file, out, settings)  # another process, in the meantime
        return card(report)

    monkeypatch.setattr(convert, "model_card", slow)
    assert convert_official(file, out, settings)["parameters"] == 561_936
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_conversion_left_is_removed(file, tmp_path) -> None:
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, check=True).stdout
    left = tmp_path / f".out.{_files._place()}-{int(dead)}-00000000.part"
    (left / "transformer").mkdir(parents=True)
    alive = tmp_path / f".out.{_files._place()}-{os.getpid()}-00000000.part"
    alive.mkdir()
    convert_official(file, tmp_path / "out", ConversionSettings(**TINY))
    assert {p.name for p in tmp_path.iterdir()} == {"out", alive.name}


def test_places_of_the_folder(file, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = ConversionSettings(**TINY)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for out in (tmp_path / "link", "~/home", tmp_path / ("x" * 250)):
        convert_official(file, out, settings)
    for name in ("real", "home", "x" * 250):
        assert (tmp_path / name / "model_index.json").exists()


def test_convert_tells_what_it_did(file, tmp_path, capsys) -> None:
    words = ["convert", "official", str(file), str(tmp_path / "a"), *FLAGS]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "ELIT-SiT of 561.9 k parameters, ema, 400000 steps" in shown
    assert "head 2, core 2, tail 2, group 4" in shown
    assert "README.md has the licence" in shown
    assert "with --vae stabilityai/sd-vae-ft-mse" in shown
    assert "elit sample" not in shown  # which could draw no image from it
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"out", "source", "kind", "elastic", "num_classes", "config"} | {
        "weights", "stored", "steps", "parameters", "left_out",
    }  # fmt: skip
    assert (report["steps"], report["elastic"], report["parameters"]) == (400_000, True, 561_936)
    assert main(["convert", "pickle", "x", "y"]) == 2
    assert "unknown format 'pickle': use one of 'official', 'dit'" in capsys.readouterr().err
    assert main(["convert", "official", str(file), str(tmp_path / "b")]) == 2
    assert "give --num-heads" in capsys.readouterr().err


def test_an_autoencoder_that_does_not_fit(file, tmp_path) -> None:
    tiny_vae(latent_channels=8).save_pretrained(tmp_path / "vae")
    settings = ConversionSettings(**TINY, vae=str(tmp_path / "vae"))
    message = r"VAE latents of 8 channels, but the model takes 4"
    refuses(message, convert_official, file, tmp_path / "out", settings)


def test_commands_work_from_a_converted_folder(folder, tmp_path, capsys) -> None:
    def run_json(*words: object) -> dict:
        assert main([*map(str, words), "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    flops = run_json("flops", folder)
    assert flops["resolution"] == 32
    assert [row["num_latents"] for row in flops["rows"]] == [16, 8, 4, 2, 1]
    info = run_json("info", folder)
    assert (info["split"], info["min_latents"], info["max_latents"]) == ([2, 2, 2], 1, 16)
    words = ["--labels", 3, "--budget", 1, 0.25, "--steps", 2, "--guidance", "ccfg"]
    drawn = run_json("sample", folder, *words, "--out", tmp_path / "drawn")
    assert [row["num_latents"] for row in drawn["rows"]] == [16, 4]
    assert all(Path(name).exists() for row in drawn["rows"] for name in row["files"])
