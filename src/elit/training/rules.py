"""Which values the settings of a run may have, each by itself."""

import math
import operator
from collections.abc import Callable
from typing import Any

from elit._choices import check_choice
from elit._numbers import MOST
from elit.data import DATASETS
from elit.models.presets import preset_class

Rule = tuple[Callable[[Any], bool], str]
_AT_LEAST_0: Rule = (lambda value: 0 <= value <= MOST, f"a number of at least 0, at most {MOST}")
_AT_LEAST_1: Rule = (lambda value: 1 <= value <= MOST, f"a number of at least 1, at most {MOST}")
_POSITIVE: Rule = (lambda value: 0 < value < math.inf, "a number above 0")
_SHARE: Rule = (lambda value: 0 <= value < 1, "a number in [0, 1)")
_SHARES: Rule = (lambda values: all(0 <= value < 1 for value in values), "numbers in [0, 1)")

RULES: dict[str, Rule] = {
    "seed": (lambda value: 0 <= value < 2**63, "a number from 0 to 2^63 - 1"),
    "data.batch_size": _AT_LEAST_1,
    "data.num_workers": _AT_LEAST_0,
    "text.max_length": (
        lambda value: value is None or 1 <= value <= MOST,
        f"a number from 1 to {MOST}, or null",
    ),
    "objective.logit_std": _POSITIVE,
    "objective.label_dropout": _SHARE,
    "latents.draws": _AT_LEAST_1,
    "retrofit.rank": _AT_LEAST_1,
    "retrofit.distill": (lambda value: 0 <= value <= 1, "a number in [0, 1]"),
    "retrofit.features": _AT_LEAST_0,
    "retrofit.base_lr": _POSITIVE,
    "optimizer.lr": _POSITIVE,
    "optimizer.betas": _SHARES,
    "optimizer.weight_decay": _AT_LEAST_0,
    "optimizer.warmup_steps": _AT_LEAST_0,
    "optimizer.final_lr": _AT_LEAST_0,
    "optimizer.clip": _POSITIVE,
    "optimizer.ema": _SHARE,
    "train.steps": _AT_LEAST_1,
    "train.accumulation": _AT_LEAST_1,
    # Thousands are a segmentation fault in OpenMP.
    "train.threads": (
        lambda value: value is None or 1 <= value <= 1024,
        "a number from 1 to 1024, or null",
    ),
    "train.shard_size": (
        lambda value: value is None or value >= 1,
        "a number of at least 1, or null",
    ),
    "train.wandb": (lambda value: value is None or value.strip(), "a project's name, or null"),
    "train.peak_tflops": (
        lambda value: value is None or 0 < value < math.inf,
        "a number above 0, or null",
    ),
    "train.log_every": _AT_LEAST_0,
    "train.validate_every": _AT_LEAST_0,
    "train.sample_every": _AT_LEAST_0,
    "train.checkpoint_every": _AT_LEAST_0,
    "train.keep_checkpoints": _AT_LEAST_1,
    "sample.steps": _AT_LEAST_1,
    "sample.guidance_scale": _AT_LEAST_0,
    "sample.columns": _AT_LEAST_1,
}
CHOICES = {
    "objective.density": ("logit_normal", "uniform"),
    "latents.order": ("first", "random"),
    "optimizer.schedule": ("constant", "cosine"),
    "train.precision": ("fp32", "bf16", "fp16"),
    "train.parallel": ("ddp", "fsdp", "hsdp"),
    "retrofit.init": ("identity", "learned"),
    "retrofit.train": ("adapters", "interface", "lora", "all"),
}


def check_values(config: Any) -> None:
    """Raise a ValueError for a setting whose value is not allowed."""
    preset_class(config.model.preset)  # or an error
    check_choice(config.data.name, DATASETS, "data set")
    for key, words in CHOICES.items():
        check_choice(operator.attrgetter(key)(config), words, key)
    for key, (allowed, rule) in RULES.items():
        value = operator.attrgetter(key)(config)
        if not allowed(value):
            raise ValueError(f"{key}={value!r} is not allowed; give {rule}")
