"""A step cache in plain values, as an operating point holds it; nothing heavy is imported."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from elit._choices import check_choice
from elit._numbers import check_threshold

if TYPE_CHECKING:
    from elit.caching.configs import TeaCacheConfig


Kind = Literal["FirstBlockCache", "TeaCache"]


@dataclass(frozen=True)
class StepCache:
    """A FirstBlockCache or a TeaCache, with all that it depends on.

    Attributes:
        kind: which.
        threshold: as in its config.
        coefficients: TeaCache's, as calibrated, with `fitted_range` and `probe`.
    """

    kind: Kind
    threshold: float
    coefficients: tuple[float, ...] | None = None
    fitted_range: tuple[float, ...] | None = None
    probe: str | None = None

    def __post_init__(self) -> None:
        check_choice(self.kind, get_args(Kind), "step cache")
        check_threshold(self.threshold)

    @classmethod
    def of_teacache(cls, config: "TeaCacheConfig", threshold: float) -> "StepCache":
        """A calibrated TeaCache at a threshold."""
        coefficients = tuple(config.coefficients)
        fitted = None if config.fitted_range is None else tuple(config.fitted_range)
        return cls("TeaCache", threshold, coefficients, fitted, config.probe)

    def config(self) -> Any:
        """What `enable_cache` takes."""
        if self.kind == "FirstBlockCache":
            from diffusers.hooks import FirstBlockCacheConfig

            return FirstBlockCacheConfig(threshold=self.threshold)
        from elit.caching.configs import TeaCacheConfig

        return TeaCacheConfig(
            self.threshold, self.coefficients or (1.0, 0.0), self.fitted_range, probe=self.probe
        )

    def __str__(self) -> str:
        return f"{self.kind} {self.threshold:.3g}"
