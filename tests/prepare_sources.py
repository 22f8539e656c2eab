"""Sources and autoencoders for the tests of `elit prepare`: small, real, made on the spot."""

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from elit.preparation.run import PrepareResult, prepare
from elit.preparation.settings import PrepareSettings


def picture(seed: int, height: int = 20, width: int = 24) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def class_folder(folder: Path, count: int = 6, broken: tuple[int, ...] = ()) -> Path:
    """Pictures in subfolders "cat" and "dog", in turns; some of them are no pictures."""
    for number in range(count):
        path = folder / ("cat", "dog")[number % 2] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no picture" if number in broken else png(number))
    return folder


def tiny_vae(**changes: Any) -> Any:
    """An AutoencoderKL that halves the side."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    config = {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 2, "norm_num_groups": 4,
        "scaling_factor": 0.5, "shift_factor": 0.25,
    }  # fmt: skip
    return AutoencoderKL(**config | changes).eval()


def clip_vae() -> Any:
    """An AutoencoderKLWan that divides the side by 8 and the time by 4."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4, z_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.2], latents_std=[0.5, 2.0],
    ).eval()  # fmt: skip


def run(source: Path | str, out: Path, vae: Path | None = None, **settings: Any) -> PrepareResult:
    """Prepare in this process, small; without a VAE as pixels."""
    settings = {"resolution": [16], "workers": 0, "device": "cpu"} | settings
    return prepare(PrepareSettings(str(source), str(out), vae=vae and str(vae), **settings))


def shard(out: Path, name: str = "train-00000-16x16") -> dict[str, torch.Tensor]:
    return load_file(out / f"{name}.safetensors")


def contents(folder: Path) -> dict[str, str]:
    """Checksum of every file of a folder, without what records say of the source's times."""
    found = {}
    for path in folder.iterdir():
        content = re.sub(rb'"seen": .*', b"", path.read_bytes() if path.is_file() else b"")
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found
