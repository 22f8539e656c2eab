"""Samples as files: a folder of its own for each setting, a picture each, a sheet of budgets."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from elit._files import output_folder
from elit.interface.budget import format_budget
from elit.pipelines.base import ElasticPipeline
from elit.pipelines.budgets import draw_budgets
from elit.viz.sheet import contact_sheet, film_strip, save_clip, save_image

FILE, SHEET = "samples.json", "samples.png"


def choose_folder(out: str | None, home: Path, settings: dict[str, Any]) -> Path:
    """Where samples go, never over those of other settings: `out`, or a number below `home`."""
    if out is not None:
        folder = output_folder(out, "--out")
        if _holds_others(folder, settings):
            raise ValueError(
                f"{folder} holds samples of other settings, or other files; "
                f"choose another folder with --out, or remove it"
            )
        return folder
    number = 1
    while _holds_others(home / str(number), settings):
        number += 1
    return output_folder(home / str(number), "--out")


def _holds_others(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder holds samples, and not of these settings."""
    try:
        earlier = json.loads((folder / FILE).read_text())["settings"]
    except FileNotFoundError:
        return folder.is_dir() and any(folder.iterdir())  # somebody's
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return earlier != settings


def draw_into(
    folder: Path,
    pipeline: ElasticPipeline,
    what: Sequence[Any],
    costs: Mapping[int | None, float],
    seed: int = 0,
    count: int = 1,
    batch_size: int = 32,
    video: str | None = None,
    progress: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Draw and write images at several budgets, all from the same noise, and a sheet of them.

    Args:
        folder: of the pictures; each budget has a folder of its own in it.
        pipeline: on its device.
        what: labels or texts.
        costs: GFLOPs of a forward by the number of latents; each is drawn.
        seed: of the first image; image i draws from seed + i.
        count: images of each label or text.
        batch_size: images drawn at a time.
        video: format of clips, "gif" or "mp4".
        progress: whether to show a bar.
        **options: further arguments of the pipeline; with `budgets_of_steps` the costs hold one
            entry, of a forward on average.

    Returns:
        Budget (of budgets of steps their mean), latents, GFLOPs, milliseconds of an image and files
        of each number of latents.
    """
    model, all_of_it = pipeline.transformer, list(what) * count
    seeds, budgets = range(seed, seed + len(all_of_it)), [model.budget_of(n) for n in costs]
    of_steps = options.get("budgets_of_steps")
    names = [
        f"prompt-{i % len(what)}-seed-{one}" if model.takes_text else f"label-{label}-seed-{one}"
        for i, (label, one) in enumerate(zip(all_of_it, seeds, strict=True))
    ]
    drawn = draw_budgets(pipeline, all_of_it, budgets, seeds, batch_size, **options)
    if of_steps is not None:
        budgets = [sum(of_steps) / len(of_steps)]
    rows, pictures = [], []
    for (n, cost), budget in zip(costs.items(), budgets, strict=True):
        pipeline.set_progress_bar_config(
            desc=f"budget {format_budget(budget)}", disable=not progress, leave=False
        )
        images, seconds = next(drawn)
        place = "schedule" if of_steps else f"budget-{budget:g}"
        suffix = video if pipeline.draws_clips else "png"
        files = [folder / place / f"{name}.{suffix}" for name in names]
        for image, file in zip(images, files, strict=True):
            (save_clip if pipeline.draws_clips else save_image)(image, file)
        ms = 1000 * seconds / len(images)
        row = {
            "budget": budget,
            "num_latents": None if of_steps else n,
            "gflops": cost,
            "ms_per_image": ms,
        }
        rows.append({**row, "files": [str(file) for file in files]})
        pictures.append([film_strip(i) for i in images] if pipeline.draws_clips else images)
    save_sheet(folder / SHEET, pictures, budgets, what, cell_size(pipeline))
    return rows


def save_sheet(
    path: Path,
    pictures: Sequence[Sequence[Image.Image]],
    budgets: Sequence[float],
    what: Sequence[Any],
    cell: int,
) -> None:
    """A row for each budget and a column for each label; further images of a label go below."""
    width = len(what)
    captions, lines = [], []
    for first in range(0, len(pictures[0]), width):
        for budget, drawn in zip(budgets, pictures, strict=True):
            captions.append(format_budget(budget))
            lines.append(drawn[first : first + width])
    sheet = contact_sheet(lines, captions, list(map(str, what)), cell, "budget")
    save_image(sheet, path)


def cell_size(pipeline: ElasticPipeline) -> int:
    """Least side of a picture on a sheet: a strip of frames, or one with a text above, is wide."""
    if pipeline.draws_clips:
        return 256
    return 96 if pipeline.transformer.takes_text else 64
