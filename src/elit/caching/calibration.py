"""Fit a cache to a model: what a change of the input does to the output, step by step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.hooks import MagCacheConfig
from torch import Tensor, nn

from elit._numbers import is_whole
from elit.caching.configs import MAX_DEGREE, TeaCacheConfig
from elit.caching.hooks import (
    BlockHook,
    TeaLeader,
    blocks_of,
    put_hooks,
    relative_change,
    remove_hooks,
)
from elit.caching.state import BranchState, Steps


@dataclass(frozen=True)
class StepChange:
    """Change of one branch from one step to the next."""

    step: int  # of its run, at least 1
    input: float  # relative change of the first block's modulated input
    output: float  # relative change of the tokens that leave the last block
    ratio: float  # magnitude of what the blocks added, over that of the step before


@dataclass(frozen=True)
class Calibration:
    """Changes that were seen in runs of a model, and caches that fit them."""

    changes: tuple[StepChange, ...]
    coefficients: tuple[float, ...]  # from the input's change to the output's, highest power first
    fit_error: float  # root mean square of what the polynomial misses, over the mean change

    @property
    def num_steps(self) -> int:
        """Steps of a run."""
        return 1 + max(change.step for change in self.changes)

    @property
    def mag_ratios(self) -> list[float]:
        """MagCache's ratio of each step, a mean over branches and runs; 1 for the first."""
        return [1.0, *self._means("ratio")]

    def teacache(self, threshold: float = 0.1, **settings: Any) -> TeaCacheConfig:
        """A TeaCache of this model."""
        inputs = [change.input for change in self.changes]
        fitted = {"coefficients": self.coefficients, "fitted_range": (min(inputs), max(inputs))}
        return TeaCacheConfig(threshold, **{**fitted, **settings})

    def magcache(self, threshold: float = 0.06, **settings: Any) -> MagCacheConfig:
        """A MagCache of this model."""
        fitted = {"mag_ratios": self.mag_ratios, "num_inference_steps": self.num_steps}
        return MagCacheConfig(threshold, **{**fitted, **settings})

    def computed_steps(self, threshold: float) -> int:
        """Steps of a run like these that TeaCache would compute, first and last included."""
        config, total, computed = self.teacache(threshold), 0.0, 2
        for change in self._means("input")[:-1]:
            total += config.output_change(change)
            if total >= threshold:
                total, computed = 0.0, computed + 1
        return computed

    def _means(self, name: str) -> list[float]:
        """Mean of each step from the second on; a step of no branch is as the one before."""
        means: list[float] = []
        for step in range(1, self.num_steps):
            values = [getattr(change, name) for change in self.changes if change.step == step]
            means.append(sum(values) / len(values) if values else (means or [1.0])[-1])
        return means


def calibrate_cache(
    transformer: nn.Module,
    run: Callable[[], Any],
    degree: int = MAX_DEGREE,
    probe: str | None = None,
    blocks: Sequence[nn.Module] | None = None,
) -> Calibration:
    """Watch a transformer while `run` uses it, and fit TeaCache and MagCache to what is seen.

        calibration = calibrate_cache(pipe.transformer, lambda: pipe(prompts))
        pipe.transformer.enable_cache(calibration.teacache(threshold=0.1))

    Args:
        transformer: one of elit's, an elasticized one, or any that a cache can be put on.
        run: draws something, at the steps and budgets that will be used later. Some tens of
            steps in all are needed; more samples in a batch make the means more certain.
        degree: of the polynomial, 1 to 4.
        probe: as in `TeaCacheConfig`.
        blocks: as in `enable_step_cache`.

    Raises:
        ValueError: if a cache is on, the transformer has no modulated input, or the run is too
            short for the degree.
    """
    if not is_whole(degree, 1, MAX_DEGREE):
        raise ValueError(f"degree {degree!r} is not allowed; give 1 to {MAX_DEGREE}")
    steps, changes = Steps(), list[StepChange]()
    config = TeaCacheConfig(0.0, probe=probe)

    class Watch(TeaLeader):
        """Compares the modulated input with that of the step before."""

        change: float | None = None

        def skips(self, state: BranchState, probed: Tensor) -> bool:
            before, state.before = state.before, probed
            Watch.change = None if before is None else relative_change(probed, before)
            return False

    class Record(BlockHook):
        """Compares what leaves the last block with that of the step before."""

        before: ClassVar[dict[str, Tensor]] = {}  # by the name of the branch

        def keep(self, state: BranchState, result: Any) -> None:
            old = state.residual
            super().keep(state, result)
            tokens, name = self.port.streams_out(result)[0], self.steps.context.name
            if Watch.change is not None and old is not None and state.residual is not None:
                norms = [torch.linalg.norm(x[0].float(), dim=-1) for x in (state.residual, old)]
                ratio = float((norms[0] / (norms[1] + 1e-8)).mean())
                change = relative_change(tokens, self.before[name])
                changes.append(StepChange(state.step, Watch.change, change, ratio))
            self.before[name] = tokens

    parts = blocks_of(transformer, blocks)
    put_hooks(transformer, parts, steps, lambda port: Watch(steps, port, config), Record)
    try:
        with torch.no_grad():
            run()
    finally:
        remove_hooks(transformer)
    coefficients, error = fit_polynomial(
        [change.input for change in changes], [change.output for change in changes], degree
    )
    return Calibration(tuple(changes), coefficients, error)


def fit_polynomial(
    inputs: Sequence[float], outputs: Sequence[float], degree: int
) -> tuple[tuple[float, ...], float]:
    """Least squares: coefficients, highest power first, and the error as in `Calibration`."""
    x, y = np.asarray(inputs), np.asarray(outputs)
    distinct = len(np.unique(x))
    if distinct <= degree or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(
            f"{distinct} different changes from step to step are too few for a polynomial of "
            f"degree {degree}, or not finite; draw more steps, at least {degree + 2} in a run, or "
            f"lower the degree"
        )
    polynomial = np.polynomial.Polynomial.fit(x, y, degree)
    error = float(np.sqrt(np.mean((polynomial(x) - y) ** 2)) / np.mean(y))
    fitted = polynomial.convert().coef
    padded = np.zeros(degree + 1)
    padded[: len(fitted)] = fitted
    return tuple(float(value) for value in padded[::-1]), error
