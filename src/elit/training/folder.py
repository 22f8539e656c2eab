"""The files of a run's folder: written aside, then renamed, so that none is ever half there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from elit import _files
from elit._files import as_os_error, sync


def replace_folder_files(target: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a folder aside, then move its files over those of `target` one by one.

    For a folder that readers may have open: each file is at any moment the old or the new one.
    """
    aside = target / ".export.part"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write(aside)
        files = [file for file in aside.rglob("*") if file.is_file()]
        # Weights first and the index last: what the index names is there.
        for file in sorted(files, key=lambda f: (f.suffix == ".json", -len(f.parts), f)):
            _files.open_to_others(file)
            sync(file)
            place = target / file.relative_to(aside)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    except SafetensorError as error:
        raise as_os_error(error, target) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def rename_folder(aside: Path, target: Path) -> None:
    """Give a folder that is complete its name, once the disk holds all of it."""
    for file in aside.rglob("*"):
        if file.is_file():
            sync(file)
    sync(aside)
    aside.rename(target)
    sync(target.parent)


def remove_leftovers(run: Path) -> None:
    """Remove what a killed run left half written or half removed in its folder."""
    for pattern in (".step-*.part", ".step-*.removed"):
        for path in (run / "checkpoints").glob(pattern):
            shutil.rmtree(path)
    _files.remove_leftovers(run)


def remove_folder(path: Path) -> None:
    """Remove a folder; one that is half removed no longer bears its name."""
    aside = path.with_name(f".{path.name}.removed")
    path.rename(aside)
    shutil.rmtree(aside)
