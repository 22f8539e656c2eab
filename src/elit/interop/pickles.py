"""Reads pickled checkpoints without running anything that they bring along."""

import argparse
import pathlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# Besides tensors and plain containers: settings of a command line, and paths among them. By name,
# since the module that a path's class says it is from changes with the version of Python.
HARMLESS = [
    (argparse.Namespace, "argparse.Namespace"),
    *(
        (pure, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for pure, names in (
            (pathlib.PurePosixPath, ("PosixPath", "PurePosixPath")),
            (pathlib.PureWindowsPath, ("WindowsPath", "PureWindowsPath")),
        )
        for name in names
    ),
]


def read_pickle(path: Path) -> Any:
    """What a .pt or .safetensors file holds, its tensors on the CPU.

    Raises:
        ValueError: if it is damaged, or names anything to call that is not known to be harmless.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a checkpoint's file, such as model.pt")
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a checkpoint's file, such as model.pt")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped, of three copies of the weights and the optimizer's only what is used is read.
        mapped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(list(HARMLESS)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise _damaged(path, error) from error
        raise ValueError(
            f"{path} wants {named[1]} called to be read, which no checkpoint needs and may be an "
            f"attack; nothing was run. Get the file from its authors, or, if it is your own, save "
            f"its tensors alone"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return ValueError(
        f"{path} cannot be read ({reason}): it is cut off, damaged, or no checkpoint; download or "
        f"copy it again and compare its size"
    )
