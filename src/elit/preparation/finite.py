"""Numbers that are not finite: whether computing or storing made them, and what helps."""

import torch
from torch import Tensor

from elit.preparation.settings import DTYPES

COMPUTED, STORED = 1, 2


def faults(computed: Tensor, stored: Tensor) -> Tensor:
    """Of each row (n, ...), what made it not finite: (n,) of 0 for nothing, COMPUTED or STORED."""
    if not stored.is_floating_point():
        return torch.zeros(len(stored), dtype=torch.int64)
    bad, bad_stored = (~x.isfinite().flatten(1).all(1) for x in (computed, stored))
    return torch.where(bad, COMPUTED, STORED * bad_stored.long())


def reason_of_fault(whose: str, fault: int, dtype: torch.dtype, store: torch.dtype) -> str:
    """Why a row was skipped, and what to do, as prepared into another folder."""
    compute_word, store_word = (
        next(word for word, name in DTYPES.items() if getattr(torch, name) == x)
        for x in (dtype, store)
    )
    if fault == STORED:
        return (
            f"the {whose}'s numbers are beyond {store_word}, which they are stored in; give "
            f"--store-dtype {'bf16 or fp32' if store_word == 'fp16' else 'fp32'} and a new folder"
        )
    reason = f"the {whose} computes numbers that are not finite in {compute_word}; "
    if compute_word == "fp32":
        return f"{reason}look at its weights"
    helps = "bf16 or fp32" if compute_word == "fp16" else "fp32"
    return f"{reason}give --dtype {helps} and a new folder"
