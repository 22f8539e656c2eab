"""When each cache skips a step. What is compared comes from the hooks."""

import math
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig
from diffusers.hooks.mag_cache import nearest_interp
from torch import Tensor

from elit.caching.configs import TeaCacheConfig
from elit.caching.state import BranchState, Steps


def relative_change(new: Tensor, old: Tensor) -> float:
    """mean |new - old| / mean |old|, in float32; infinite where old is all zeros."""
    new, old = new.float(), old.float()
    change = float((new - old).abs().mean() / old.abs().mean())
    return math.inf if math.isnan(change) else change


def first_block_skips(config: FirstBlockCacheConfig, state: BranchState, added: Tensor) -> bool:
    """FirstBlockCache: whether the first block adds what it added at the last computed step.

    Args:
        config: with the threshold.
        state: of the branch.
        added: (B, N, D), what the first block added to the tokens.
    """
    if state.before is not None and not relative_change(added, state.before) > config.threshold:
        return state.residual is not None
    state.before = added
    return False


def mag_skips(config: MagCacheConfig, state: BranchState, steps: Steps) -> bool:
    """MagCache: whether the residual's magnitude has moved little, by the calibrated ratios."""
    num_steps = steps.num_steps or config.num_inference_steps
    ratios: Any = config.mag_ratios
    if len(ratios) != num_steps:  # a pipeline told of another number of steps
        ratios = nearest_interp(torch.as_tensor(ratios), num_steps)
    if steps.step < int(config.retention_ratio * num_steps + 0.5):
        return False
    state.ratio *= float(ratios[steps.step]) if steps.step < len(ratios) else 1.0
    state.skipped += 1
    state.total += abs(1.0 - state.ratio)
    if (
        state.residual is not None
        and state.total <= config.threshold
        and state.skipped <= config.max_skip_steps
    ):
        return True
    state.ratio, state.skipped, state.total = 1.0, 0, 0.0
    return False


def tea_skips(config: TeaCacheConfig, state: BranchState, steps: Steps, probed: Tensor) -> bool:
    """TeaCache: whether the output is likely to have changed by less than the threshold.

    Args:
        config: with the threshold.
        state: of the branch.
        steps: of the run.
        probed: (B, N, D), modulated input of the first block.
    """
    before, state.before = state.before, probed
    if before is not None:
        state.total += config.output_change(relative_change(probed, before))
    if state.residual is not None and not steps.is_last_step and state.total < config.threshold:
        return True
    state.total = 0.0
    return False
