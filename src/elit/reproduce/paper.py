"""The paper's own runs, too large to be trained here: their commands, and what they cost."""

from typing import Any

from elit.training.config_files import load_config
from elit.training.estimate import estimate

CONFIGS = tuple(
    f"imagenet-{side}/{name}"
    for side in (256, 512)
    for name in ("dit", "elit-dit", "elit-dit-mb", "uvit", "elit-uvit", "elit-uvit-mb")
)


def paper_runs(gpus: int = 8) -> list[dict[str, Any]]:
    """The command of each run, with what `estimate` says of it."""
    start = f"torchrun --nproc-per-node {gpus} -m elit train"
    return [
        {"command": f"{start} {name}", **estimate(load_config(name, {}), gpus)} for name in CONFIGS
    ]
