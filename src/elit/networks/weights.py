"""Weights of feature networks: files here, on the hub or on the web, and their checksums."""

import os
import pickle
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from elit._files import cache_advice, sha256_of, typed_path
from elit._hub import hub_reason
from elit._pickles import read_pickle
from elit._wrappers import HOLDERS, digest_of_weights, without_wrapping

INCEPTION_FILES = (
    "pt_inception-2015-12-05-6726825d.pth",  # of pytorch-fid
    "weights-inception-2015-12-05-6726825d.pth",  # of torch-fidelity
)
INCEPTION_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILES[0]}"
)
INCEPTION_VARIABLE = "ELIT_INCEPTION_WEIGHTS"


def find_inception(weights: str | Path | None = None) -> Path:
    """The weights of FID's Inception: given, named by the environment, here already, or fetched."""
    weights = weights or os.environ.get(INCEPTION_VARIABLE)
    if weights:
        return find_file(weights, "inception")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in INCEPTION_FILES:
        if (folder / name).is_file():
            return folder / name
    try:
        with redirect_stdout(sys.stderr):  # torch.hub tells what it does
            torch.hub.load_state_dict_from_url(
                INCEPTION_URL, str(folder), "cpu", progress=False, check_hash=True,
                weights_only=True,
            )  # fmt: skip
    except (URLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        blocked = isinstance(getattr(error, "filename", None), str)
        advice = f"or {cache_advice(folder)}" if blocked else f"or put it into {folder}"
        raise ValueError(
            f"the weights of inception cannot be fetched ({_reason(error)}); get "
            f"{INCEPTION_URL} and give its path as the weights or in {INCEPTION_VARIABLE}, {advice}"
        ) from error
    return folder / INCEPTION_URL.rpartition("/")[2]


def find_file(weights: str | Path, network: str) -> Path:
    """A file here, or one of the hub: "user/repository/file", also with "hf://" before it."""
    text = typed_path(weights)
    path = Path(text)
    if not text.startswith("hf://"):
        if path.is_file():
            return path
        if path.is_dir():
            raise ValueError(f"the weights of {network} are a file, but {text} is a folder")
    parts = text.removeprefix("hf://").split("/")
    on_hub = text.startswith("hf://") or (path.suffix and not path.is_absolute())
    if not on_hub or len(parts) < 3 or not all(parts) or parts[0] in (".", ".."):
        raise ValueError(
            f"no file {text} with the weights of {network}; give the path of a file, or "
            f"user/repository/file of one on the hub"
        )
    return _from_hub("/".join(parts[:2]), "/".join(parts[2:]), network)


def _from_hub(repository: str, name: str, network: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"no file {repository}/{name} with the weights of {network}, neither here nor on the "
            f"hub ({hub_reason(error) or _reason(error)}); give the path of a file"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by their names, of a .safetensors file or one of PyTorch; runs no code of theirs."""
    with warnings.catch_warnings():  # of a TorchScript file, which is none of these
        warnings.simplefilter("ignore", UserWarning)
        content = read_pickle(path)
    for holder in HOLDERS:
        if isinstance(content, dict) and isinstance(content.get(holder), dict):
            content = content[holder]
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise ValueError(
            f"{path} holds a {type(content).__name__} that is no plain dictionary of tensors; give "
            f"a file with a network's state dict alone"
        )
    return without_wrapping(content)


def read_scripted(path: Path, device: torch.device) -> Any:
    """The network of a TorchScript file."""
    try:
        with warnings.catch_warnings():  # such files are what FVD comes as
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(path, map_location=device).eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is no TorchScript file ({_reason(error)}); save a network by "
            f"torch.jit.script(network).save, or an exported program as .pt2"
        ) from error


def read_exported(path: Path) -> nn.Module:
    """The network of an exported program."""
    try:
        return torch.export.load(path).module()
    except Exception as error:  # it raises whatever a broken archive leads to
        raise ValueError(
            f"{path} is no exported program ({_reason(error)}); save one by torch.export.save"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def checksum_of(module: nn.Module) -> str:
    """SHA-256 of a module's state dict: names, types, shapes and numbers."""
    return digest_of_weights(module, lambda name, x: f"{name} {x.dtype} {tuple(x.shape)}\n")


def folder_checksum(name: str, module: nn.Module) -> str:
    """SHA-256 of what transformers loaded: of its file, if it is one, as the hub shows it."""
    from transformers.utils import cached_file

    try:
        file = cached_file(name, "model.safetensors")
    except OSError:  # several files, or an older format
        file = None
    return checksum_of(module) if file is None else sha256_of(Path(file))
