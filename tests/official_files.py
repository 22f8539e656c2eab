"""Files in the public checkpoints' layout, and folders made of them."""

import argparse
import pathlib
from pathlib import Path

import pytest
import torch
from prepare_sources import tiny_vae
from safetensors.torch import load_file
from sit_reference import make_state
from torch import Tensor

from elit.cli.main import main

GOLDEN = Path(__file__).parent / "golden_sit"
TINY = {"encoder_depth": 2, "num_heads": 4}
FLAGS = ["--encoder-depth", "2", "--num-heads", "4"]


def public_file(path: Path, state: dict[str, Tensor], **changes) -> Path:
    """A .pt file in the public files' layout."""
    content = {
        "ema": state,
        "model": {name: value * 0.5 for name, value in state.items()} | {
            "pos_embed": state["pos_embed"]
        },
        "opt": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}],
        },
        "args": argparse.Namespace(
            exp_name="tiny", output_dir=pathlib.PosixPath("exps"), learning_rate=1e-4, resume=None
        ),
        "steps": 400_000,
    }  # fmt: skip
    torch.save(content | changes, path)
    return path


def elastic_state(**changes) -> dict[str, Tensor]:
    return make_state(**{"width": 32, "depth": 5} | changes)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {
        name: value.float()
        for name, value in load_file(GOLDEN / "elit_tiny.weights.safetensors").items()
    }


@pytest.fixture(scope="module")
def file(state, tmp_path_factory) -> Path:
    return public_file(tmp_path_factory.mktemp("public") / "elit_tiny.pt", state)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A tiny autoencoder of four channels, half the size."""
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae(latent_channels=4, scaling_factor=0.18215, shift_factor=None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(file, vae, tmp_path_factory) -> Path:
    """A converted folder with an autoencoder."""
    out = tmp_path_factory.mktemp("converted") / "elit"
    assert main(["convert", "official", str(file), str(out), *FLAGS, "--vae", str(vae)]) == 0
    return out
