"""What each command imports before it says something: torch takes a second, diffusers four."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from elit.cli.main import COMMANDS

HEAVY = (
    "torch", "torch._dynamo", "diffusers", "transformers", "peft", "accelerate", "sklearn", "scipy",
    "pandas", "datasets", "numpy", "PIL", "matplotlib", "tensorboard", "huggingface_hub",
)  # fmt: skip
# Help, a preset's sizes, and every mistake in a command, a name or a flag.
NOTHING = [
    "--help", "--version", "sampel", *(f"{name} --help" for name in COMMANDS),
    "info", "info elit-dit-xl/2", "info dit-xxl/2", "flops elit-dit-xl/2",
    "flops elit-mmdit-qwen/2 --resolution 1024 --text-tokens 64", "flops video-dit-b/2 --frames 5",
    "flops dit-xl/2 --budgets 0", "flops nowhere", "flops dit-xl/2 --resolutio 512",
    "sample nowhere", "sample nowhere --sampler eulr", "sample nowhere --guidance cgf",
    "serve nowhere", "serve nowhere --p95-ms 0", "serve nowhere --guidance ccfg",
    "eval nowhere", "eval nowhere --split tests", "sweep nowhere --guidance cgf",
    "compare nowhere elsewhere", "calibrate nowhere", "export nowhere --format onnx",
    "export nowhere --format onxx", "inspect nowhere", "finetune nowhere", "schedule nowhere",
    "convert official nowhere.pt out", "sample nowhere --guidance ccfg", "prepare nowhere",
    "reproduce --scale huge", "quickstart --sed 1",
    "train nowhere.yaml", "train digits --model.preset dit-xxl/2", "train digits --data.name digit",
    "train digits --optimizer.lr fast", "train digits --optimiser.lr 1", "plan digits --gpu h10",
    "quickstart --preset dit-xxl/2",
]  # fmt: skip
DRY_RUN = "train moving-shapes --model.preset elit-video-dit-tiny/2 --dry-run"


def imported(lines: list[str]) -> dict[str, list[str]]:
    """Run command lines in a fresh process; the heavy modules that each was the first to import."""
    code = f"""
import contextlib, io, json, sys
from elit.cli.main import main
found, seen = {{}}, set()
for line in {lines!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(line.split())
    assert code == 0 or code == 2, (line, code)
    now = set({HEAVY!r}) & set(sys.modules)
    found[line], seen = sorted(now - seen), now
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_mistakes_help_and_presets_import_nothing_heavy() -> None:
    asks_torch = not version("torch").endswith("+cpu")  # `info`, which device there is
    lines = [line for line in NOTHING if not (asks_torch and line == "info")]
    assert not {line: new for line, new in imported(lines).items() if new}


def test_a_dry_run_imports_what_its_model_needs() -> None:
    """Not what draws, decodes, scores or adapts."""
    (found,) = imported([DRY_RUN]).values()
    assert {"torch", "diffusers"} <= set(found)
    assert not {"peft", "sklearn", "scipy", "pandas", "datasets", "matplotlib"} & set(found)


def said_on_stderr(code: str, folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_the_first_line_comes_before_torch_is_imported(tmp_path) -> None:
    code = """
import sys, time
from elit.cli.main import main
from elit.cli import waiting
say = waiting._Watch.say
def noting(self, text):
    say(self, text + " not" * ("torch._C" not in sys.modules))
waiting._Watch.say = noting
main(["train", "digits", "--dry-run"])
"""
    assert said_on_stderr(code, tmp_path)[0] == "elit: importing torch not"


def test_what_takes_long_is_said_once(tmp_path) -> None:
    (tmp_path / "slow_package.py").write_text("import time; time.sleep(1.2)")
    code = """
import time
from elit.cli import waiting
waiting.PATIENCE = 0.3
with waiting.telling_what_takes_long(), waiting.stage("at work"):
    import slow_package
    with waiting.stage("loading it"):
        time.sleep(1.5)
    with waiting.stage("a moment"):
        time.sleep(0.05)
    time.sleep(1)
"""
    lines = said_on_stderr(code, tmp_path)
    assert lines == ["elit: importing slow_package", "elit: loading it", "elit: at work"]
