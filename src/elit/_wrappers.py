"""What training puts around a model, and so around the names of its weights."""

from collections.abc import Mapping
from typing import TypeVar

# Around any part: torch.compile, FSDP and activation checkpoints
PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Around the whole: DistributedDataParallel and AveragedModel, Lightning
WHOLES = ("module.", "model.")
HOLDERS = ("state_dict", "model_state_dict", "module")  # keys of files, over those of weights

Value = TypeVar("Value")


def without_wrapping(theirs: Mapping[str, Value]) -> dict[str, Value]:
    """Weights by the names that they have in the bare model."""
    found: dict[str, Value] = {}
    for key, value in theirs.items():
        name = ".".join(part for part in key.split(".") if part not in PARTS)
        if name in found:
            raise ValueError(f"it has {name} twice, wrapped and bare; save one model's weights")
        found[name] = value
    if any(key.startswith("module.") for key in found):
        found.pop("n_averaged", None)  # AveragedModel counts
    for prefix in WHOLES:
        if found and all(key.startswith(prefix) for key in found):
            return without_wrapping({key[len(prefix) :]: v for key, v in found.items()})
    return found
