"""Weights by their names: what training puts around these, and a checksum."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

# Around any part: torch.compile, FSDP, activation checkpoints, DeepSpeed under Lightning
PARTS = {
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"
}  # fmt: skip
# Around the whole: DistributedDataParallel and AveragedModel, Lightning
WHOLES = ("module.", "model.")
HOLDERS = ("state_dict", "model_state_dict", "module")  # keys of files, over those of weights

Value = TypeVar("Value")


def without_wrapping(theirs: Mapping[str, Value]) -> dict[str, Value]:
    """Weights by the names that they have in the bare model."""
    bare: dict[str, Value] = {}
    for key, value in theirs.items():
        name = ".".join(part for part in key.split(".") if part not in PARTS)
        if name in bare:
            raise ValueError(f"it has {name} twice, wrapped and bare; save one model's weights")
        bare[name] = value
    if any(key.startswith("module.") for key in bare):
        bare.pop("n_averaged", None)  # AveragedModel counts
    for prefix in WHOLES:
        if bare and all(key.startswith(prefix) for key in bare):
            return without_wrapping({key[len(prefix) :]: v for key, v in bare.items()})
    return bare


def digest_of_weights(module: Any, about: Callable[[str, Any], str]) -> str:
    """SHA-256 of a module's weights, and of what is told `about` each by its name."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(about(name, value).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
