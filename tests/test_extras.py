"""What is said where the package of an extra is missing: how to install it, from a clone too."""

import ast
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from elit._extras import missing
from elit.exporting.formats import check_format
from elit.networks.encoders import load_dinov2
from elit.pipelines.text_encoder import encoder_settings
from elit.preparation.images import _by_ffmpeg
from elit.preparation.source import datasets_module
from elit.training.finetune import add_lora
from elit.training.metrics import summary_writer_class, wandb_module
from elit.viz.sheet import check_mp4

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "elit").rglob("*.py"))


def test_the_message_helps_in_a_clone_and_from_pypi() -> None:
    text = missing("videos need imageio-ffmpeg", "video", "write .gif")
    assert text.startswith("videos need imageio-ffmpeg; in a clone of elit: pip install -c con")
    assert "pip install -c constraints.txt -e '.[video]';" in text
    assert "from PyPI: pip install 'elit-diffusion[video]'; or write .gif" in text
    assert missing("a", "b").endswith("'elit-diffusion[b]'")


def test_it_is_made_in_one_place_of_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = []
    for path in SOURCES:
        text = path.read_text()
        assert path.name == "_extras.py" or "pip install" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "missing":
                named.append(node.args[1].value)
    assert len(named) == 11
    assert set(named) == {
        "export", "lora", "prepare", "serve", "studio", "tensorboard", "text", "video", "wandb"
    }  # fmt: skip
    assert set(named) <= set(extras)


@pytest.mark.parametrize(("package", "call", "extra", "who"), [
    ("datasets", datasets_module, "prepare", "preparing data needs Hugging Face datasets"),
    ("onnxruntime", lambda: check_format("onnx", "auto", "fp32"), "export", "--format onnx needs"),
    ("imageio_ffmpeg", lambda: _by_ffmpeg(b"", None), "video", "videos need imageio-ffmpeg"),
    ("transformers", lambda: encoder_settings("a"), "text", "the text encoder 'a' needs"),
    ("transformers", lambda: load_dinov2("a"), "text", "the feature network .* needs"),
    ("peft", lambda: add_lora(None, 1), "lora", "retrofit.train=lora needs peft"),
    ("torch.utils.tensorboard", summary_writer_class, "tensorboard", "train.tensorboard needs"),
    ("wandb", wandb_module, "wandb", "train.wandb needs"),
])  # fmt: skip
def test_each_package_that_is_missing_is_told(monkeypatch, package, call, extra, who) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"^{who}.*-e '\.\[{extra}\]'"):
        call()


def test_pipelines_and_their_training_need_no_extra() -> None:
    """As after a plain install, where diffusers hides what needs transformers."""
    code = """
import sys
for name in ("transformers", "peft", "sentencepiece", "datasets", "litserve", "starlette"):
    sys.modules[name] = None
import elit.studio.drawing, elit.training.quickstart
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_mp4_without_its_encoder(monkeypatch) -> None:
    monkeypatch.setattr("elit.viz.sheet.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^MP4 needs .*-e '\.\[video\]'.*; or write \.gif$"):
        check_mp4()


def test_the_example_tells_before_its_work(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(sys, "argv", ["own_images.py"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "examples" / "own_images.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert "pip install -c constraints.txt -e '.[prepare]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
