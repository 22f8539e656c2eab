"""From a folder of pictures to samples, by the commands of docs/data.md."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from elit.cli.main import main

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_images.py"
TINY = [
    "--model.overrides.hidden_size", "32", "--model.overrides.num_heads", "2",
    "--model.overrides.depth", "3", "--data.batch_size", "8", "--sample.steps", "2",
    "--train.log_every", "1", "--train.validate_every", "6", "--train.checkpoint_every", "3",
]  # fmt: skip


def command(line: str, *words: str) -> None:
    assert main([*line.split(), *words]) == 0


@pytest.fixture(autouse=True)
def _example(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["own_images.py", "--count", "60", "--steps", "2"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_prepare_train_resume_and_sample() -> None:
    command("prepare images prepared --vae tiny-vae --resolution 32 --flips --workers 0")
    manifest = json.loads(Path("prepared/manifest.json").read_text())
    assert manifest["flips"]
    command("train own-images --train.steps 6 --train.sample_every 6", *TINY)
    command("train own-images --train.steps 9 --train.sample_every 9", *TINY)  # goes on
    command("train own-images --output_dir whole --train.steps 9 --train.sample_every 0", *TINY)
    runs = [Path(folder) / "metrics.jsonl" for folder in ("runs/own-images", "whole")]
    losses = [
        [line["loss"] for line in map(json.loads, file.read_text().splitlines()) if "loss" in line]
        for file in runs
    ]
    assert losses[0] == losses[1]
    command("sample runs/own-images --labels 0 1 --budget 1 0.25 --steps 2 --out drawn")
    pictures = sorted(Path("drawn").rglob("*.png"))
    assert pictures
    assert any(Image.open(picture).size == (32, 32) for picture in pictures)


@pytest.mark.slow
def test_two_processes_prepare_and_train() -> None:
    """As on a cluster, by torchrun."""
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for line in (
        "prepare images prepared --vae tiny-vae --resolution 32 --part-size 16 --workers 0",
        "train own-images --train.steps 6 --train.sample_every 6 --train.parallel fsdp",
    ):
        words = line.split() + (TINY if line.startswith("train") else [])
        done = subprocess.run([*two, "-m", "elit", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    command("sample runs/own-images --labels 0 1 --budget 1 0.25 --steps 2 --out drawn")
    assert list(Path("drawn").rglob("*.png"))
