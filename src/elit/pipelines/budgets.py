"""Budgets of a run: of each call of the model, and those that a pipeline chooses by itself."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elit._files import digest_of
from elit.flow.guidance import Forwards, Guidance
from elit.flow.schedulers import start_sampling
from elit.pipelines.folder import weights_digest
from elit.pipelines.operating_points import (
    OperatingPoint,
    OperatingPoints,
    check_cap,
    default_home,
)
from elit.pipelines.sweep_file import SWEEP_FILE
from elit.pipelines.timing import CallTimes, describe

logger = logging.getLogger(__name__)

DEFAULT_STEPS = 40
AUTO = "auto"
Size = tuple[int | None, int | None, int | None]
"""Frames, height and width asked for; None is what the model was made for."""


class RunBudgets:
    """What a pipeline knows of the budgets of its runs.

    Attributes:
        operating_point: what budget="auto" chose last.
    """

    transformer: Any
    scheduler: Any
    config: Any

    operating_point: OperatingPoint | None = None
    _operating_points: OperatingPoints | None = None

    def example_of(self, count: int) -> list[Any]:
        """Something to draw, `count` times, for measuring."""
        raise NotImplementedError

    def check_prompt(self, prompt: Any) -> int:
        """Tokens of the longest text."""
        raise NotImplementedError

    def pixel_size(self) -> tuple[int, ...]:
        """Height and width of the images, or frames, height and width, of what is the default."""
        raise NotImplementedError

    def calls(
        self,
        budget: float | Sequence[float],
        num_inference_steps: int,
        guidance: Guidance | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> list[Forwards]:
        """Forwards of the model in each call of a run: latents per group, and batches in one."""
        levels = self.start(num_inference_steps, "cpu", sigmas)
        kept = self.latents_of_steps(budget, len(levels), guidance)
        if guidance is None:
            return [((n, 1),) for n, _ in kept]
        pairs = zip(levels, kept, strict=True)
        return [guidance.forwards(level, n, guide) for level, (n, guide) in pairs]

    def start(
        self,
        num_inference_steps: int,
        device: Any,
        sigmas: Sequence[float] | None = None,
        size: Sequence[int] | None = None,
    ) -> list[float]:
        """Begin a run: the noise level of each call of the model.

        Args:
            num_inference_steps: of the scheduler.
            device: of the samples.
            sigmas: levels to use instead of the scheduler's own.
            size: of the model's input; by default what it was made for.
        """
        size, patch = size or self.transformer.sample_size, self.transformer.patch_size
        tokens = math.prod(n // p for n, p in zip(size, patch, strict=True))
        return start_sampling(self.scheduler, num_inference_steps, device, sigmas, tokens)

    def load_operating_points(self, file: Any = None) -> OperatingPoints:
        """Read what `elit sweep` measured, for budget="auto".

        Args:
            file: `sweep.json` or its folder; by default where the command writes it, in the
                folder that the pipeline was loaded from.
        """
        name = str(self.config.get("_name_or_path") or "")
        if file is None:
            file = default_home(name) / SWEEP_FILE
            if not name or not file.exists():
                raise ValueError(
                    f"budget='auto' needs what `elit sweep` measured, but there is no {file}; run "
                    f"`elit sweep {name or 'RUN'}`, or name its file with load_operating_points"
                )
        found = OperatingPoints.load(file)
        weights = weights_digest(Path(name)) if name else None
        if found.weights and weights and found.weights != weights:
            raise ValueError(
                f"{found.file} is of other weights than {name} holds now; run `elit sweep` again"
            )
        self._operating_points = found
        return found

    def choose_operating_point(
        self,
        wanted: int | Sequence[Any] = 1,
        max_flops: float | None = None,
        max_ms: float | None = None,
        num_inference_steps: int | None = None,
        size: Size = (None, None, None),
    ) -> OperatingPoint:
        """The best point of a sweep whose cost for an image keeps within the caps.

        Args:
            wanted: labels or texts of a batch, or their number: the time for each depends on it.
            max_flops: operations for an image, all calls, a multiply-add as 2; VAE apart.
            max_ms: milliseconds for an image, measured on this device at the first call; VAE apart.
            num_inference_steps: only points of so many steps.
            size: frames, height and width in pixels.
        """
        caps = {
            name: check_cap(value, name)
            for name, value in (("max_flops", max_flops), ("max_ms", max_ms))
            if value is not None
        }
        if not caps:
            raise ValueError("budget='auto' needs a cap; give max_flops=, max_ms=, or both")
        found = self._operating_points or self.load_operating_points()
        self._check_sweep(found, size)
        if "max_flops" in caps and found.text_tokens is not None and not isinstance(wanted, int):
            tokens = self.check_prompt(wanted)
            if tokens > found.text_tokens:
                raise ValueError(
                    f"the FLOPs of {found.file} are of texts of up to {found.text_tokens} tokens, "
                    f"but these have {tokens}; sweep with such texts, or cap by max_ms"
                )
        allowed = [
            measured
            for measured in found.points
            if num_inference_steps in (None, measured.point.steps)
        ]
        if not allowed:
            steps = sorted({measured.point.steps for measured in found.points})
            raise ValueError(
                f"{found.file} has no point of {num_inference_steps} steps; it has those of "
                f"{', '.join(map(str, steps))}"
            )
        costs = [[m.flops] if "max_flops" in caps else [] for m in allowed]
        if "max_ms" in caps:
            for cost, ms in zip(costs, self._times(allowed, wanted, size), strict=True):
                cost.append(ms)
        chosen = found.choose(allowed, costs, list(caps.values()))
        if chosen is None:
            raise ValueError(_impossible(found, allowed, costs, caps))
        point, cost = allowed[chosen].point, costs[chosen]
        for warning in allowed[chosen].warnings:
            logger.warning("%s, which that choice is by: %s", found.ranked_by, warning)
        logger.info(
            "budget='auto' chose %s: %s %.4g, the best of %d points within %s; it costs %s",
            point, found.ranked_by, allowed[chosen].score, len(allowed),
            _words(caps, caps.values()), _words(caps, cost),
        )  # fmt: skip
        return point

    def resolve_run(
        self,
        wanted: Sequence[Any],
        budget: float | str | Sequence[float],
        num_inference_steps: int | None,
        guidance: Guidance | None,
        max_flops: float | None,
        max_ms: float | None,
        size: Size,
    ) -> tuple[float | Sequence[float], int, Guidance | None]:
        """Budget, steps and guidance of a run: those given, or those that "auto" chooses."""
        if not isinstance(budget, str) or budget != AUTO:
            for name, value in (("max_flops", max_flops), ("max_ms", max_ms)):
                if value is not None:
                    raise ValueError(f"{name} has no effect at budget={budget!s:.60}; give 'auto'")
            steps = DEFAULT_STEPS if num_inference_steps is None else num_inference_steps
            return budget, steps, guidance  # type: ignore[return-value]
        if guidance is not None:
            raise ValueError("budget='auto' chooses the guidance too; leave guidance out")
        point = self.choose_operating_point(wanted, max_flops, max_ms, num_inference_steps, size)
        self.operating_point = point
        return point.budget, point.steps, point.make_guidance()

    def _check_sweep(self, found: OperatingPoints, size: Size) -> None:
        sampler = type(self.scheduler).__name__
        if found.sampler != sampler:
            raise ValueError(
                f"{found.file} was measured with {found.sampler}, but this pipeline has a "
                f"{sampler}; set that scheduler, or sweep with this one"
            )
        if found.sampler_settings not in (None, digest_of(describe(self.scheduler))):
            raise ValueError(
                f"{found.file} was measured with other settings of the {sampler}; sweep again"
            )
        default = self.pixel_size()
        asked = tuple(a or d for a, d in zip(size[-len(default) :], default, strict=True))
        if asked != found.size:
            raise ValueError(
                f"{found.file} was measured at {'x'.join(map(str, found.size))}, not at "
                f"{'x'.join(map(str, asked))}; sweep at that size, or give a budget"
            )

    def _times(
        self, allowed: Sequence[Any], wanted: int | Sequence[Any], size: Size
    ) -> list[float]:
        """Milliseconds for an image of each point."""
        wanted = self.example_of(wanted) if isinstance(wanted, int) else wanted
        hidden = getattr(self, "_progress_bar_config", {}).get("disable", False)
        times = CallTimes(self, wanted, size, progress=not hidden)  # type: ignore[arg-type]
        runs = [self.calls(m.point.budget, m.point.steps, m.point.make_guidance()) for m in allowed]
        times.measure(call for run in runs for call in run)
        return [times.ms_per_image(run) for run in runs]

    def latents_of_steps(
        self, budget: float | Sequence[float], num_calls: int, guidance: Guidance | None
    ) -> list[tuple[int | None, int | None]]:
        """Latents per group of the prediction and of its guide, for each call of the model."""
        model = self.transformer
        if isinstance(budget, Sequence) and not isinstance(budget, str):
            budgets = list(budget)
        else:
            budgets = [budget] * num_calls
        if len(budgets) != num_calls:
            raise ValueError(
                f"{len(budgets)} budgets for {num_calls} calls of the model in this run; "
                f"give one number, or one for each call"
            )
        kept = [model.resolve_budget(b) for b in budgets]
        self._warn_if_untrained("budget", min(budgets))
        if guidance is None or guidance.budget is None:
            return [(n, n) for n in kept]
        if guidance.budget == "lowest":
            guide = model.min_latents or None
        else:
            guide = model.resolve_budget(guidance.budget)
            self._warn_if_untrained("guide budget", guidance.budget)
        if guide is not None and guide > min(n or guide for n in kept):
            logger.warning(
                "the guide keeps %d latents per group, more than the %d that it guides",
                guide,
                min(n or guide for n in kept),
            )
        if not guidance.drop_label and guide in kept:
            logger.warning("autoguidance has no effect where its guide has the same budget")
        return [(n, guide) for n in kept]

    def _warn_if_untrained(self, what: str, budget: float) -> None:
        """Warn of a budget below all that the model was trained with."""
        kept, least = self.transformer.resolve_budget(budget), self.transformer.min_latents
        if kept is not None and kept < least:
            logger.warning(
                "%s %g keeps %d latents per group, but this model was trained with %d or more",
                what, budget, kept, least,
            )  # fmt: skip


def _impossible(
    found: OperatingPoints,
    allowed: Sequence[Any],
    costs: Sequence[Sequence[float]],
    caps: dict[str, float],
) -> str:
    """What to say where no point keeps within the caps."""
    cheapest = min(range(len(costs)), key=lambda i: tuple(costs[i]))
    return (
        f"no point of {found.file} keeps within {_words(caps, caps.values())}; the cheapest is "
        f"{allowed[cheapest].point}, at {_words(caps, costs[cheapest])}"
    )


def _words(caps: dict[str, float], values: Any) -> str:
    """'1.2 GFLOPs and 31 ms an image'."""
    units = {"max_flops": (1e9, "GFLOPs"), "max_ms": (1, "ms")}
    pairs = zip(caps, values, strict=True)
    parts = [f"{value / units[name][0]:.4g} {units[name][1]}" for name, value in pairs]
    return f"{' and '.join(parts)} an image"
