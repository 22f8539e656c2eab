"""SIGKILL at any moment, and two runs in one folder at once: nothing lost, nothing twice."""

import io
import json
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from prepare_sources import class_folder, tiny_vae
from runs import fork_elit, metrics
from safetensors import safe_open

from elit import ElitPipeline
from elit.cli.main import main
from elit.evaluation.sweep import csv_of

pytestmark = pytest.mark.slow

KILLS = 25
TIMED = {"images_per_second", "tflops_per_second", "data_wait", "memory_gb", "seconds", "digest",
         "ms_per_image", "decode_ms_per_image", "drawn_ms_per_image", "front_ms", "seen",
         "decode_seconds", "files"}  # fmt: skip
TRAIN = """
data: {name: digits, batch_size: 4, num_workers: 1}
model: {preset: elit-dit-tiny/2, overrides: {hidden_size: 16, num_heads: 2, depth: 3}}
train: {steps: 18, log_every: 1, validate_every: 6, sample_every: 9, checkpoint_every: 3,
        keep_checkpoints: 2, device: cpu}
sample: {steps: 1, columns: 2, budgets: [1, 0.25]}
"""
DRAW = ["--samples", "20", "--batch-size", "2", "--device", "cpu", "--steps"]


@dataclass
class Case:
    """A command on the tiniest settings, and the folders that it writes."""

    home: Path
    words: Callable[[Path], list[str]]  # for an output folder

    def start(self, name: str, number: int = 0, *more: str) -> multiprocessing.Process:
        """In a process, into folders of this name."""
        folder = self.home / name
        folder.mkdir(exist_ok=True)
        words = [*self.words(folder / "out"), *more]
        return fork_elit(words, self.home / f"{name}{number}", ELIT_CACHE=str(folder / "cache"))

    def errors(self, name: str, number: int = 0) -> str:
        return (self.home / f"{name}{number}.err").read_text()

    def end(self, name: str) -> None:
        """Run to the end."""
        process = self.start(name)
        process.join(120)
        assert process.exitcode == 0, self.errors(name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("trained")
    (home / "tiny.yaml").write_text(TRAIN)
    words = ["train", str(home / "tiny.yaml"), "--output_dir", str(home / "run")]
    assert main([*words, "--train.steps", "3"]) == 0
    return home


@pytest.fixture(params=["train", "prepare", "sweep", "eval"])
def case(request, trained, tmp_path) -> Case:
    command, run = request.param, str(trained / "run")
    if command == "train":
        config = str(trained / "tiny.yaml")
        return Case(tmp_path, lambda out: ["train", config, "--output_dir", str(out)])
    if command == "prepare":
        source = class_folder(tmp_path / "images", 120, broken=(7, 100))
        tiny_vae().save_pretrained(tmp_path / "vae")
        return Case(tmp_path, lambda out: [
            "prepare", str(source), str(out), "--vae", str(tmp_path / "vae"), "--resolution", "16",
            "--workers", "1", "--part-size", "4", "--flips", "--device", "cpu",
        ])  # fmt: skip
    more = {"sweep": [*DRAW, "2", "3", "--budgets", "1", "1/4", "--guidance", "none", "ccfg"],
            "eval": [*DRAW, "12", "--budget", "1/4", "--save-npz"]}[command]  # fmt: skip
    return Case(tmp_path, lambda out: [command, run, *more, "--out", str(out)])


def state(folder: Path) -> dict[str, object]:
    """What every file holds, but times and the folder's own name."""
    return {
        str(path.relative_to(folder)): content(path, folder)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def content(path: Path, folder: Path) -> object:
    """Of a whole file; anything but a whole one is an error."""
    raw = path.read_bytes()
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {n: t.numpy().tobytes() for n, t in tensors.items() if n not in TIMED}
    if path.name == "metrics.jsonl":
        return timeless(metrics(path.parent))
    if path.suffix == ".json":
        return timeless(json.loads(raw.replace(str(folder).encode(), b"FOLDER")))
    if path.suffix == ".png":
        Image.open(io.BytesIO(raw)).load()
    if path.suffix == ".html":  # with times
        assert raw.rstrip().endswith(b"</html>")
        return None
    if path.suffix == ".csv":  # likewise: a line for each row, or it is cut off
        assert raw.endswith(b"\n")
        assert len({line.count(b",") for line in raw.splitlines()}) == 1
        return None
    return raw.replace(str(folder).encode(), b"FOLDER")


def timeless(value: object) -> object:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMED}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def assert_same(one: Path, other: Path) -> None:
    found, wanted = state(one), state(other)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    if (report := one / "out" / "sweep.json").exists():
        table = report.with_suffix(".csv").read_text()
        assert table == csv_of(json.loads(report.read_text()))


def assert_nothing_half(folder: Path) -> None:
    """Every file that has its name is whole, however the process ended."""
    for path in folder.rglob("*"):
        inner = path.relative_to(folder).parts
        named = path.is_file() and not any(part.startswith(".") for part in inner)
        if named and path.name != "metrics.jsonl":  # whose last line may be torn
            content(path, folder)
    if (folder / "out" / "model_index.json").exists():
        ElitPipeline.from_pretrained(folder / "out")


def test_sigkill_at_any_moment(case) -> None:
    case.end("whole")
    started = time.monotonic()
    case.end("timed")
    seconds = time.monotonic() - started
    assert_same(case.home / "timed", case.home / "whole")
    draw, kills, ended, leftovers, begun = random.Random(0), 0, 0, 0, time.monotonic()
    while kills < KILLS:
        process = case.start("killed")
        process.join(draw.uniform(0, 0.7) * seconds)  # what goes on is shorter
        process.kill()
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 0), case.errors("killed")
        killed = process.exitcode != 0
        kills += killed
        leftovers += any((case.home / "killed").rglob(".*.part*"))
        assert_nothing_half(case.home / "killed")
        if not killed:
            ended += 1
            assert_same(case.home / "killed", case.home / "whole")
            shutil.rmtree(case.home / "killed")
    case.end("killed")
    assert_same(case.home / "killed", case.home / "whole")
    # Training's writes are short: no kill came in one.
    assert leftovers or case.words(Path())[0] == "train"
    print(f"{kills} kills, {leftovers} while it wrote, {ended} ends, {seconds:.1f} s a run, "
          f"{time.monotonic() - begun:.0f} s in all")  # fmt: skip


def test_two_at_once(case) -> None:
    case.end("whole")
    for number in range(3):
        both = [case.start(f"both{number}", i) for i in range(2)]
        for process in both:
            process.join(120)
        codes = [process.exitcode for process in both]
        errors = [case.errors(f"both{number}", i) for i in range(2)]
        assert sorted(codes) in ([0, 0], [0, 2]), errors
        for code, error in zip(codes, errors, strict=True):
            assert error.count("elit: error:") == (code == 2)
            assert code == 0 or "another process" in error
        print(codes)
        assert_same(case.home / f"both{number}", case.home / "whole")
