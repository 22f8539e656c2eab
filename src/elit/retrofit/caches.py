"""Which of diffusers' step caches work on an elastic model, and why the others don't."""

from typing import Any

_REFUSED = {
    "PyramidAttentionBroadcastConfig": (
        "it gives attention of an earlier step to a block, which has another number of latents "
        "when the budget has changed"
    ),
    "TaylorSeerCacheConfig": (
        "it extrapolates what the blocks gave at earlier steps, which has another number of "
        "latents when the budget has changed"
    ),
    "FasterCacheConfig": (
        "it needs both branches of guidance in one batch of one budget, and keeps attention of "
        "earlier steps"
    ),
}


def check_cache(model: Any, config: Any) -> None:
    """Raise a ValueError for a cache that an elastic model can't have."""
    name = type(config).__name__
    if name in _REFUSED:
        raise ValueError(
            f"{name.removesuffix('Config')} doesn't work on an elastic {type(model).__name__}: "
            f"{_REFUSED[name]}; use FirstBlockCacheConfig, MagCacheConfig or TeaCacheConfig"
        )
