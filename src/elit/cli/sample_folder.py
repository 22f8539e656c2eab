"""Where `elit sample` writes, a folder of its own for each setting, and what."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elit.choosing.sweep_file import default_home
from elit.cli.common import output_folder

if TYPE_CHECKING:
    from PIL import Image

    from elit.pipelines.base import ElasticPipeline


def choose_folder(args: argparse.Namespace, settings: dict[str, Any]) -> Path:
    """Where the images go: never over those of other settings."""
    if args.out is not None:
        folder = output_folder(args.out, "--out")
        if _holds_others(folder, settings):
            raise ValueError(
                f"{folder} holds samples of other settings, or other files; "
                f"choose another folder with --out, or remove it"
            )
        return folder
    home = default_home(args.run)
    number = 1
    while _holds_others(home / "sampled" / str(number), settings):
        number += 1
    return output_folder(home / "sampled" / str(number), "--out")


def _holds_others(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder holds samples, and not of these settings."""
    try:
        earlier = json.loads((folder / "samples.json").read_text())["settings"]
    except FileNotFoundError:
        return folder.is_dir() and any(folder.iterdir())  # somebody's
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return earlier != settings


def save_picture(picture: Any, path: Path, args: argparse.Namespace) -> str:
    """Write an image, or a clip, and give the name of the file."""
    from elit.viz.sheet import save_clip, save_image

    is_clip = isinstance(picture, list)
    path = path.with_name(f"{path.name}.{args.video if is_clip else 'png'}")
    if is_clip:
        save_clip(picture, path)
    else:
        save_image(picture, path)
    return str(path)


def save_sheet(
    path: Path,
    images: Sequence[Sequence["Image.Image"]],
    rows: Sequence[dict[str, Any]],
    wanted: Sequence[Any],
    pipeline: "ElasticPipeline",
) -> None:
    """One row for each budget and column for each label; further images per label go below."""
    from elit.interface.budget import format_budget
    from elit.training.validation import cell_size
    from elit.viz.sheet import contact_sheet, save_image

    width = len(wanted)
    captions, lines = [], []
    for first in range(0, len(images[0]), width):
        for row, drawn in zip(rows, images, strict=True):
            captions.append(format_budget(row["budget"]))
            lines.append(drawn[first : first + width])
    sheet = contact_sheet(lines, captions, list(map(str, wanted)), cell_size(pipeline))
    save_image(sheet, path)
