"""`elit eval` and `elit sweep`: what they print and write, their errors, kills and processes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_dit, tiny_elastic
from PIL import Image
from runs import held

from elit import ElitPipeline, make_scheduler
from elit.cli.main import main

TINY_RUN = """
data: {name: shapes, batch_size: 2, options: {count: 40, size: 16}}
model: {overrides: {hidden_size: 16, depth: 3, in_channels: 3}}
train: {steps: 3, log_every: 1, validate_every: 0, sample_every: 0, checkpoint_every: 0}
"""
SWEEP = ["--samples", "8", "--batch-size", "2", "--steps", "2", "3", "--budgets", "1", "1/4",
         "--guidance", "none", "ccfg", "--device", "cpu"]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of `elit train` with three steps behind it."""
    home = tmp_path_factory.mktemp("trained")
    (home / "tiny.yaml").write_text(TINY_RUN)
    words = ["train", str(home / "tiny.yaml"), "--output_dir", str(home / "run")]
    assert main([*words, "--train.device", "cpu"]) == 0
    return home / "run"


def test_eval_scores_a_run(run, tmp_path, capsys) -> None:
    words = ["eval", str(run), "--samples", "20", "--batch-size", "5", "--steps", "3", "--budget",
             "0.25", "--guidance", "cfg", "--scale", "1.5", "--device", "cpu", "--out",
             str(tmp_path), "--save-npz"]  # fmt: skip
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["rows"]
    assert {"fd", "kid", "is", "precision", "recall", "accuracy"} <= row["scores"].keys()
    assert report["settings"]["reference"]["name"] == "shapes, train"
    assert report["model"]["training"]["steps"] == 3
    assert report["model"]["training"]["eflops"] > 0
    assert json.loads(Path(report["out"]).read_text()) == {
        k: v for k, v in report.items() if k != "npz"
    } | {"npz": report["npz"]}
    with np.load(report["npz"]) as file:
        assert file["arr_0"].shape == (20, 16, 16, 3)
    assert main(words) == 0  # what was drawn is there
    shown = capsys.readouterr().out
    assert "Frechet distance" in shown
    for said in ("seed 0", "shapes, train, 40", "classifier", report["model"]["weights"],
                 "budget 1/4, 3 steps, guidance cfg 1.5", "GFLOPs"):  # fmt: skip
        assert said in shown, f"a score is printed without {said}"


def test_flops_of_a_sample_are_those_of_elit_flops(run, tmp_path, capsys) -> None:
    words = ["--samples", "4", "--steps", "3", "--budget", "0.25", "--device", "cpu", "--json"]
    assert main(["eval", str(run), *words, "--out", str(tmp_path)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert main(["flops", str(run), "--budgets", "0.25", "--json"]) == 0
    (counted,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["gflops_per_image"] == pytest.approx(3 * counted["gflops"], rel=1e-9)


def test_sweep_leaves_a_table_and_a_page(run, tmp_path, capsys) -> None:
    assert main(["sweep", str(run), *SWEEP, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "best of their cost" in shown
    assert "seed 0" in shown
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert len(report["rows"]) == 8
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["fd"]) for r in rows] == [r["scores"]["fd"] for r in report["rows"]]
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # the Pareto front, and each guide
    assert report["model"]["weights"] in page


def test_two_sweeps_do_not_share_a_folder(run, tmp_path, capsys) -> None:
    """Both would read the rows that are there, and the later one write its own and these alone."""
    with held(tmp_path / "out"):
        assert main(["sweep", str(run), *SWEEP, "--out", str(tmp_path / "out")]) == 2
    assert "another process sweeps into" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def run_alone(run: Path, out: Path, *more: str, **env: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "elit", "sweep", str(run), *SWEEP, "--out", str(out), *more]
    return subprocess.Popen(words, env=os.environ | env, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_share_a_sweep(run, tmp_path) -> None:
    """test_evaluation.py has the same within one process."""
    assert main(["sweep", str(run), *SWEEP, "--out", str(tmp_path / "one")]) == 0
    ranks = [
        run_alone(run, tmp_path / "four", RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank))
        for rank in range(4)
    ]
    assert [process.wait(300) for process in ranks] == [0] * 4
    files = [(tmp_path / name / "sweep.json").read_bytes() for name in ("one", "four")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "RUN", "--network", "inceptoin"], "did you mean 'inception'?"),
        (["eval", "RUN", "--network", "i3d"], "i3d_torchscript.pt"),
        (["eval", "RUN", "--weights", "dino=x"], "give NAME=PATH"),
        (["eval", "RUN", "--reference", "nowhere"], "no folder, no .npz file and no data set"),
        (["eval", "RUN", "--fit"], "--fit is of a folder of pictures"),
        (["eval", "RUN", "--samples", "1"], "at least 2"),
        (["eval", "RUN", "--scale", "2"], "no effect without guidance"),
        (["eval", "RUN", "--prompts", "README.md"], "draws classes"),
        (["eval", "BARE"], "give real images with --reference"),
        (["eval", "BARE", "--reference", "digits", "--network", "classifier"], "fitted on"),
        (["sweep", "RUN", "--rank-by", "fod", *SWEEP], "did you mean 'fd'?"),
        (["sweep", "RUN", "--guidance", "cfg", "--scale", "1"], "no guidance"),
        (["sweep", "RUN", "--guidance", "none", "--scale", "2"], "--scale has no effect"),
        (["sweep", "RUN", "--guidance", "cfg", "--guide-budget", "1/4"], "add one of ag, ccfg"),
        (["eval", "RUN", "--weights", "clip=x"], "--weights of clip have no effect"),
        (["eval", "BARE", "--reference", "docs", "--split", "train"], "--split is of a data set"),
        (["sample", "RUN", "--sweep", "x"], "no effect without --budget auto"),
        (["sweep", "RUN", "--guidance", "cgf"], "did you mean 'cfg'?"),
        (["sweep", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, words, message) -> None:
    bare = tmp_path / "bare"
    ElitPipeline(tiny_elastic(in_channels=1), make_scheduler("euler")).save_pretrained(bare)
    places = {"RUN": str(run), "BARE": str(bare)}
    words = [places.get(word, word) for word in words]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("elit: error:") == 1
    assert shown.out == ""


def test_a_plain_model_is_swept_over_its_steps(tmp_path, capsys) -> None:
    pipeline = ElitPipeline(tiny_dit(in_channels=1), make_scheduler("euler"))
    pipeline.save_pretrained(tmp_path / "plain")
    folder = tmp_path / "real"
    folder.mkdir()
    for i in range(12):
        noise = torch.randint(0, 256, (8, 8), generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    network = torch.jit.trace(torch.nn.Flatten(), torch.zeros(1, 3, 8, 8))
    network.save(tmp_path / "flat.pt")
    words = ["sweep", str(tmp_path / "plain"), "--reference", str(folder), "--network",
             str(tmp_path / "flat.pt"), "--samples", "8", "--steps", "1", "2", "--device", "cpu",
             "--json"]  # fmt: skip
    assert main(words) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["guidance"], r["steps"]) for r in rows] == [
        ("none", 1), ("cfg", 1), ("none", 2), ("cfg", 2),
    ]  # fmt: skip
    assert main([*words, "--guidance", "ag"]) == 2
    assert "need a lower budget" in capsys.readouterr().err
