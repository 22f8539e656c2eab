"""Caches that work at any budget, and why others don't."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig

from elit._files import typed_path, write_json
from elit._numbers import check_threshold, is_real, is_whole
from elit._plain import from_plain, read_json

CALIBRATION_FILE = "teacache.json"  # beside a pipeline
MAX_DEGREE = 4  # of the polynomial


@dataclass(frozen=True)
class TeaCacheConfig:
    """TeaCache: skip steps until the output is likely to have changed by `threshold`.

    At each step the input of the first block, normalised and modulated by the noise level, is
    compared with that of the step before: mean |x - x'| / mean |x'|. A polynomial turns this into
    the change of the output that is to be expected, and these changes add up. While the sum is
    below the threshold, steps are skipped; a computed step sets it to 0. The first step of a run
    is always computed, and so is the last one where the number of steps is known.

    Attributes:
        threshold: expected relative change of the output; 0 skips nothing.
        coefficients: of the polynomial, highest power first, as `calibrate_cache` fits them. The
            default takes the input's change for the output's.
        fitted_range: input changes that the polynomial was fitted to. Outside it goes on in
            proportion to the input's change: a polynomial may go anywhere there.
        num_inference_steps: calls of the model in a run, where a pipeline doesn't tell; ours do.
        probe: name, within the first block, of the module whose input is compared. None takes
            the first one that gets tokens other than the block's own, and is no norm: the
            attention, or its first projection.
        weights: digest of those that it was fitted to, where `elit calibrate` has noted it.
    """

    threshold: float = 0.1
    coefficients: Sequence[float] = (1.0, 0.0)
    fitted_range: Sequence[float] | None = None
    num_inference_steps: int | None = None
    probe: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        numbers = _numbers(self.coefficients, "coefficients", 1, MAX_DEGREE + 1)
        object.__setattr__(self, "coefficients", numbers)
        if self.fitted_range is not None:
            numbers = _numbers(self.fitted_range, "fitted_range", 2, 2)
            if not 0 < numbers[0] <= numbers[1]:
                raise ValueError(f"fitted_range {numbers} is not allowed; give 0 < low <= high")
            object.__setattr__(self, "fitted_range", numbers)
        if self.num_inference_steps is not None and not is_whole(self.num_inference_steps):
            raise ValueError(
                f"num_inference_steps {self.num_inference_steps!r} is not allowed; give the calls "
                f"of the model in a run, or None"
            )

    def output_change(self, input_change: float) -> float:
        """Relative change of the output to be expected, at least 0."""
        if not math.isfinite(input_change):
            return math.inf
        inside, outside = input_change, 1.0
        if self.fitted_range is not None and input_change > 0:
            low, high = self.fitted_range
            inside = min(max(input_change, low), high)
            outside = input_change / inside
        change = 0.0
        for coefficient in self.coefficients:
            change = change * inside + coefficient
        return max(0.0, change * outside)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as JSON has them."""
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"cache": "TeaCache", **lists}

    def save(self, path: str | PathLike) -> None:
        """Write as JSON."""
        write_json(Path(typed_path(path)), self.to_dict())

    @classmethod
    def load(cls, path: str | PathLike, **changes: Any) -> "TeaCacheConfig":
        """Read what `save` or `elit calibrate` wrote, with changes such as `threshold=0.2`."""
        name = typed_path(path)
        values = read_json(Path(name), "`elit calibrate` writes it")
        if values.pop("cache", None) != "TeaCache":
            raise ValueError(f"{name} is no TeaCache's; `elit calibrate` writes one")
        try:
            return replace(from_plain(cls, values), **changes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _numbers(values: Any, name: str, least: int, most: int) -> tuple[float, ...]:
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    if not listed or not least <= len(values) <= most or not all(map(is_real, values)):
        count = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(f"{name} {values!r:.80} are not allowed; give {count} finite numbers")
    return tuple(map(float, values))


CACHES = (FirstBlockCacheConfig, MagCacheConfig, TeaCacheConfig)

_OF_EARLIER = "which has another number of latents when the budget has changed"
_REFUSED = {
    "PyramidAttentionBroadcastConfig":
        f"it gives a block the attention of an earlier step, {_OF_EARLIER}",
    "TaylorSeerCacheConfig":
        f"it extrapolates what each block gave at earlier steps, {_OF_EARLIER}",
    "FasterCacheConfig":
        "it needs both branches of guidance in one batch of one budget, which cheap guidance "
        "doesn't have, and keeps attention of earlier steps",
}  # fmt: skip


def check_cache(model: Any, config: Any) -> None:
    """Raise a ValueError for a cache that an elastic model can't have."""
    name = type(config).__name__
    if not isinstance(config, CACHES):
        reason = _REFUSED.get(name, "it is not known to work there")
        raise ValueError(
            f"{name.removesuffix('Config')} is not for elastic transformers or elit's own, this "
            f"{type(model).__name__}: {reason}; use FirstBlockCacheConfig, MagCacheConfig or "
            f"TeaCacheConfig"
        )
    check_threshold(config.threshold)
    if isinstance(config, MagCacheConfig) and config.calibrate:
        raise ValueError(
            "MagCacheConfig(calibrate=True) only prints its ratios; use elit.calibrate_cache, "
            "whose result has them: calibration.magcache()"
        )
