"""Reads pickled checkpoints without running anything that they bring along."""

import argparse
import ctypes
import pathlib
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# Besides tensors and plain containers: settings of a command line, and paths among them. By name,
# since the module that a path's class says it is from changes with the version of Python.
HARMLESS = [
    (argparse.Namespace, "argparse.Namespace"),
    *(
        (getattr(pathlib, f"Pure{system}Path"), f"{module}.{pure}{system}Path")
        for module in ("pathlib", "pathlib._local")
        for system in ("Posix", "Windows")
        for pure in ("", "Pure")
    ),
]


def read_pickle(path: Path) -> Any:
    """Read a .pt or .safetensors file, its tensors on the CPU.

    Raises:
        ValueError: if it is damaged, or names anything to call that is not known to be harmless.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a checkpoint's file, such as model.pt")
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a checkpoint's file, such as model.pt")
    try:
        if _is_safetensors(path):
            return load_file(path)
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_pickle(path)
        # Mapped, of three copies of the weights and the optimizer's only what is used is read.
        with torch.serialization.safe_globals(list(HARMLESS)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise _damaged(path, "no pickle of tensors and plain settings") from error
        raise ValueError(
            f"{path} wants {named[1]} called to be read, which no checkpoint needs and may be an "
            f"attack; nothing was run. Get the file from its authors, or, if it is your own, save "
            f"its tensors alone: torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:  # damaged bytes make the unpickler fail in any way
        raise _damaged(path, str(error) or type(error).__name__) from error


def check_bytes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if tensors of a file are not as they were saved.

    PyTorch stores a checksum of each storage and never looks at it. Files in the older format,
    without a zip, have none. What else is in the file is not looked at.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        saved = {(member.file_size, member.CRC) for member in archive.infolist()}
    if {checksum for _, checksum in saved} == {0}:
        return  # saved with set_crc32_options(False)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            continue  # it has no bytes of its own
        storage = tensor.untyped_storage()
        view = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        if storage.nbytes() and (storage.nbytes(), zlib.crc32(view)) not in saved:
            raise _damaged(path, f"the bytes of {name} do not match their checksum")


def _check_pickle(path: Path) -> None:
    """Compare the names and shapes in a zip with their checksum, by reading them."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith("/data.pkl") and member.CRC:
                archive.read(member)


def _is_safetensors(path: Path) -> bool:
    """Tell whether a file begins as safetensors' do: a length, then JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) < 9:
        return path.suffix == ".safetensors"
    return start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size


def _damaged(path: Path, reason: str) -> ValueError:
    reason = " ".join(reason.split())[:160]
    return ValueError(
        f"{path} cannot be read ({reason}): it is cut off, damaged, or no checkpoint; download or "
        f"copy it again and compare its size"
    )
