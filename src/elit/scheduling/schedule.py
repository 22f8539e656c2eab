"""`schedule.json`: the errors of fewer latents at each noise level, and what follows for a cap."""

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from elit._choices import check_choice
from elit._files import typed_path, write_text
from elit._numbers import is_real
from elit._plain import from_plain, read_json
from elit.choosing.choose import in_words
from elit.choosing.sweep_file import default_home
from elit.choosing.timing import times_of
from elit.flow.guidance import UNGUIDED, Forwards, Guidance
from elit.flow.sampling import levels_of, sample
from elit.interface.budget import default_budgets
from elit.pipelines.base import ElasticPipeline
from elit.pipelines.folder import weights_digest
from elit.scheduling.allot import allot, exchange
from elit.scheduling.measure import Errors
from elit.scheduling.plan import Plan, call_of

SCHEDULE_FILE = "schedule.json"  # within a pipeline's folder
By = Literal["errors", "spectrum"]


@dataclass(frozen=True)
class Schedule:
    """What `elit schedule` measured. Guidance, sampler and steps of a plan are chosen later.

    Attributes:
        max_latents: J of the model.
        min_latents: fewest that it was trained with.
        levels: noise levels at which errors were measured, falling.
        latents: numbers of latents below J that were measured, rising.
        gram: lower triangle of `Errors.gram`; empty where the model was not measured.
        standard_errors: `Errors.standard_errors`.
        spectrum: power of the data's frequencies, in rings.
        space: axes of the data, 2 of images.
        about: the run, its weights and data.
    """

    max_latents: int
    min_latents: int
    levels: list[float] = field(default_factory=list)
    latents: list[int] = field(default_factory=list)
    gram: list[list[float]] = field(default_factory=list)
    standard_errors: list[list[float]] = field(default_factory=list)
    spectrum: list[float] = field(default_factory=list)
    space: int = 2
    about: dict[str, Any] = field(default_factory=dict)

    def with_errors(
        self, levels: Sequence[float], latents: Sequence[int], errors: Errors
    ) -> "Schedule":
        """The same with what was measured of the model."""
        rows = [row[: i + 1] for i, row in enumerate(errors.gram.tolist())]
        short = [[float(f"{x:.5g}") for x in row] for row in rows]
        each = [[float(f"{x:.3g}") for x in row] for row in errors.standard_errors.tolist()]
        new = {"levels": list(levels), "latents": list(latents), "gram": short}
        return Schedule(**{**vars(self), **new, "standard_errors": each})

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        write_text(file, json.dumps(asdict(self)) + "\n")

    @property
    def by(self) -> By:
        """What it plans by, unless that is said."""
        return "errors" if self.gram else "spectrum"

    def products(self) -> np.ndarray:
        """`Errors.gram`."""
        size = len(self.gram)
        half = np.zeros((size, size))
        half[np.tril_indices(size)] = list(itertools.chain.from_iterable(self.gram))
        return half + np.tril(half, -1).T

    def squares(self) -> np.ndarray:
        """Mean square of each error, (N, E)."""
        return self.products().diagonal().reshape(len(self.levels), -1)

    def counting(self, prediction: Sequence[float], guide: Sequence[float]) -> "Schedule":
        """The same with errors that count so many times as much, at each level.

        Args:
            prediction: of what is guided.
            guide: of the guide, and of its absence.
        """
        count = len(self.latents)
        factors = [[p] * count + [g] * (count + 1) for p, g in zip(prediction, guide, strict=True)]
        each = np.concatenate(factors)
        rows = (each[:, None] * self.products() * each).tolist()
        return replace(self, gram=[row[: i + 1] for i, row in enumerate(rows)])

    def effect(self, sigma: float, latents: int, guide: int, scale: float) -> np.ndarray:
        """What a call's velocity loses against full budget with its guide, in the errors (N * E,).

        v = g + s (c - g), so that it loses s e_c - (s - 1) e_g, and without a guide e_c -
        (s - 1) (c - g). Between levels that were measured, errors are interpolated.
        """
        count = len(self.latents)
        errors = np.zeros(2 * count + 1)
        if latents != self.max_latents:
            errors[self.latents.index(latents)] = scale if guide else 1.0
        if guide == 0:
            errors[-1] = 1 - scale
        elif guide != self.max_latents:
            errors[count + self.latents.index(guide)] = 1 - scale
        rising = self.levels[::-1]
        near = [np.interp(sigma, rising, one[::-1]) for one in np.eye(len(rising))]
        return np.outer(near, errors).ravel()

    def error(
        self,
        levels: Sequence[float],
        weights: Sequence[float],
        kept: Sequence[tuple[int, int]],
        guidance: Guidance | None = None,
    ) -> float:
        """Predicted mean square by which samples differ from full budget's, per element.

        E |sum of w e|^2 over the calls: to first order, as if errors didn't change where later
        calls look.

        Args:
            levels: noise level of each call.
            weights: of each call, by `call_weights`.
            kept: latents per group of each call and of its guide, 0 for none.
            guidance: CFG of a scale, or None.
        """
        total = sum(
            w * self.effect(sigma, n, m, _scale(guidance, sigma))
            for sigma, w, (n, m) in zip(levels, weights, kept, strict=True)
        )
        return max(0.0, float(total @ self.products() @ total))

    def plan(
        self,
        pipeline: ElasticPipeline,
        max_flops: float | None = None,
        max_ms: float | None = None,
        guidance: Guidance | None = None,
        num_inference_steps: int | None = None,
        by: By | None = None,
        what: int | str | Sequence[Any] = 1,
        size: Sequence[int | None] = (None, None, None),
    ) -> Plan:
        """The budgets of a run that lose least within a cap.

        Args:
            pipeline: on its device, with the sampler to draw by.
            max_flops: operations for an image, all calls, a multiply-add as 2; VAE apart, and of
                the longest text.
            max_ms: milliseconds for an image on this device, instead; VAE apart.
            guidance: `CFG(2.0)`, of whose guide the budgets are planned too, or None.
            num_inference_steps: of the scheduler; None is the pipeline's `default_steps`.
            by: "errors", what was measured of the model, or "spectrum", of the data alone.
            what: labels or texts of a batch, or their number: the time for each depends on it.
            size: frames, height and width in pixels, None where the model was made for it.
        """
        ((name, cap),) = one_cap(max_flops, max_ms).items()
        model = pipeline.transformer
        if model.max_latents != self.max_latents:
            raise ValueError(
                f"this schedule is of {self.max_latents} latents per group, but the model has "
                f"{model.max_latents}; run `elit schedule` of its folder"
            )
        levels = pipeline.start(num_inference_steps, "cpu", size=pipeline.input_size(*size))
        weights = call_weights(pipeline.scheduler)
        steps = num_inference_steps or pipeline.default_steps
        if max_ms is not None:
            times = times_of(pipeline, what, size)
            numbers = [*self.latents, self.max_latents]
            # All kinds of calls in one go, so that a disturbance hits them alike. Of two forwards
            # one kind tells what they share, and no other pair has to be measured.
            pair = call_of(numbers[0], numbers[-1])
            kinds = [call_of(n, 0) for n in numbers]
            if guidance is not None:
                kinds += [*(call_of(n, n) for n in numbers), pair]
            times.ms_of_runs([[kind] for kind in kinds])
            (start,) = times.ms_of_runs([[]])

            def took(*forwards: tuple[int | None, int]) -> float:
                return times.ms_of_runs([[forwards]])[0] - start

            def cost_of(call: Forwards) -> float:
                if len(call) == 1:
                    return took(*call)
                alone, shared = [took(one) for one in call], sum(map(took, pair)) - took(*pair)
                return max(*alone, sum(alone) - shared)

        else:
            cost, start = pipeline.forward_cost(*size), 0.0

            def cost_of(call: Forwards) -> float:
                return float(sum(cost.flops(n) * times for n, times in call))

        return self.plan_calls(
            levels, weights, cost_of, cap, guidance, steps, by, fixed=start,
            told=lambda cost: in_words({name: cost}),
        )  # fmt: skip

    def plan_calls(
        self,
        levels: Sequence[float],
        weights: Sequence[float],
        cost_of: Callable[[Forwards], float],
        cap: float,
        guidance: Guidance | None = None,
        num_inference_steps: int = 0,
        by: By | None = None,
        drops_guide: bool = True,
        fixed: float = 0.0,
        told: Callable[[float], str] = "{:.4g}".format,
    ) -> Plan:
        """The same for any sampler and cost, such as of a stock pipeline.

        Args:
            levels: noise level of each call of the model.
            weights: of each call, by `call_weights`.
            cost_of: cost of the forwards of a call.
            cap: on the sum of the costs.
            guidance: CFG of a scale, or None.
            num_inference_steps: that these calls are of; by default their number.
            by: as above.
            drops_guide: whether there may be calls without a guide.
            fixed: cost of a run beside its calls.
            told: says a cost in words.
        """
        by = self.by if by is None else by
        check_choice(by, ("errors", "spectrum"), "by")
        _check_positive(cap)
        if guidance is not None and (guidance.budget is not None or not guidance.drop_label):
            raise ValueError(
                f"guidance {guidance} has its own guide; a plan chooses the guide's budgets: give "
                f"CFG({guidance.scale:g})"
            )
        if not (self.gram if by == "errors" else self.spectrum):
            raise ValueError(f"this schedule has no {by}; run `elit schedule` again")
        costs, within = _once(cost_of), _Cap(cap, fixed, told)
        if by == "errors":
            kept = self._by_errors(levels, weights, costs, within, guidance, drops_guide)
        else:
            kept = self._by_spectrum(levels, costs, within, guidance)
        spent = fixed + sum(costs(call_of(n, m)) for n, m in kept)
        latents, guides = zip(*kept, strict=True)
        error = self.error(levels, weights, kept, guidance) if by == "errors" else None
        return Plan(tuple(levels), latents, guides, self.max_latents, guidance,
                    num_inference_steps or len(levels), spent, error)  # fmt: skip

    def _by_errors(
        self, levels: Sequence[float], weights: Sequence[float],
        cost_of: Callable[[Forwards], float], cap: "_Cap", guidance: Guidance | None,
        drops_guide: bool,
    ) -> list[tuple[int, int]]:  # fmt: skip
        """Exact for the sum of the calls' errors, which bounds the error of their sum; from there
        by exchanges for that.
        """
        gram = self.products()
        numbers = [*self.latents, self.max_latents]
        steps, costs, effects, errors = [], [], [], []
        for sigma, w in zip(levels, weights, strict=True):
            scale = _scale(guidance, sigma)
            guides = [0] if scale == 1 else [*([0] if drops_guide else []), *numbers]
            pairs = [(n, m) for n in numbers for m in guides]
            effect = np.stack([w * self.effect(sigma, n, m, scale) for n, m in pairs])
            error = np.sqrt(np.einsum("oi,oi->o", effect @ gram, effect).clip(0))
            cost = np.array([cost_of(call_of(n, m)) for n, m in pairs])
            order = np.lexsort((error, cost))
            lowest = np.minimum.accumulate(error[order])
            front = order[np.r_[True, lowest[1:] < lowest[:-1]]]
            steps.append([pairs[o] for o in front])
            costs.append(cost[front])
            effects.append(effect[front])
            errors.append(error[front])
        cap.check(sum(float(c.min()) for c in costs))
        chosen = exchange(allot(costs, errors, cap.left), costs, effects, gram, cap.left)
        return [pairs[o] for pairs, o in zip(steps, chosen, strict=True)]

    def _by_spectrum(
        self, levels: Sequence[float], cost_of: Callable[[Forwards], float], cap: "_Cap",
        guidance: Guidance | None,
    ) -> list[tuple[int, int]]:  # fmt: skip
        """Latents in proportion to the tokens that frequencies above the noise need.

        A frequency counts where its power exceeds the noise's by a factor: the least that the cap
        allows. The guide has the same number.
        """
        power = np.asarray(self.spectrum)
        reach = np.arange(1, len(power) + 1) / len(power)  # of each ring's outer edge

        def kept(factor: float) -> list[tuple[int, int]]:
            pairs = []
            for sigma in levels:
                seen = (1 - sigma) ** 2 * power > factor * sigma**2
                tokens = float(reach[seen].max(initial=0.0)) ** self.space
                n = max(self.min_latents, 1, round(tokens * self.max_latents))
                pairs.append((n, 0 if _scale(guidance, sigma) == 1 else n))
            return pairs

        def cost(pairs: list[tuple[int, int]]) -> float:
            return sum(cost_of(call_of(n, m)) for n, m in pairs)

        low, high = -30.0, 60.0  # powers of e
        cap.check(cost(kept(np.exp(high))))
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if cost(kept(np.exp(middle))) <= cap.left else (middle, high)
        return kept(np.exp(high))


@dataclass(frozen=True)
class _Cap:
    """On a run's cost, of which a part is fixed."""

    whole: float
    fixed: float
    told: Callable[[float], str]

    @property
    def left(self) -> float:
        return self.whole - self.fixed

    def check(self, least: float) -> None:
        """Raise a ValueError if the calls cost more at least."""
        if least > self.left * (1 + 1e-12):
            raise ValueError(
                f"the cheapest plan costs {self.told(least + self.fixed)}, more than the cap of "
                f"{self.told(self.whole)}; raise the cap or take fewer steps"
            )


def ladder(min_latents: int, max_latents: int) -> list[int]:
    """Numbers of latents to measure: halves of full budget, and halves of three quarters of it."""
    halves = default_budgets(1, max_latents)
    numbers = {round(b * part * max_latents) for b in halves for part in (1, 0.75)}
    return sorted(n for n in numbers | {min_latents} if max(1, min_latents) <= n < max_latents)


def _once(cost_of: Callable[[Forwards], float]) -> Callable[[Forwards], float]:
    """The same costs, each asked for once."""
    known: dict[Forwards, float] = {}

    def cost(call: Forwards) -> float:
        if call not in known:
            known[call] = cost_of(call)
        return known[call]

    return cost


def one_cap(max_flops: float | None, max_ms: float | None) -> dict[str, float]:
    """The cap that is given, by its name."""
    given = {k: x for k, x in (("max_flops", max_flops), ("max_ms", max_ms)) if x is not None}
    if len(given) != 1:
        raise ValueError("a plan needs one cap; give max_flops= or max_ms=")
    for cap in given.values():
        _check_positive(cap)
    return {name: float(cap) for name, cap in given.items()}


def _check_positive(cap: float) -> None:
    if not (is_real(cap) and cap > 0):
        raise ValueError(f"cap {cap!r:.40} is not allowed; give a positive number")


def _scale(guidance: Guidance | None, sigma: float) -> float:
    guidance = guidance or UNGUIDED
    return guidance.scale if guidance.is_active(sigma) else 1.0


def call_weights(scheduler: Any) -> list[float]:
    """What a velocity of 1 in each call adds to the samples, in a run that was begun.

    Any sampler's samples are linear in the velocities.
    """
    count = len(levels_of(scheduler))
    calls = iter(torch.eye(count + 1).view(count + 1, count + 1, 1, 1, 1)[:count])

    def predict(_x: Tensor, *_: Any) -> Tensor:
        return next(calls)

    noise = torch.zeros(count + 1, 1, 1, 1)
    generators = [torch.Generator().manual_seed(0) for _ in range(count + 1)]  # the same noise
    end = sample(predict, noise, scheduler, generator=generators)
    return (end[:count] - end[count]).flatten().tolist()


def load_schedule(folder: str | os.PathLike) -> Schedule:
    """What `elit schedule` wrote for a pipeline's folder, or its file.

    The weights in the folder must be those that were measured.
    """
    path = Path(typed_path(folder))
    file = path if path.suffix == ".json" else default_home(str(path)) / SCHEDULE_FILE
    schedule = from_plain(Schedule, read_json(file, "`elit schedule RUN` measures and writes it"))
    size = len(schedule.levels) * (2 * len(schedule.latents) + 1)
    rows = [len(row) for row in schedule.gram]
    if rows and rows != list(range(1, size + 1)):
        raise ValueError(f"{file} is damaged: its gram is not of {size} errors; run it again")
    weights = weights_digest(path) if path.is_dir() else None
    if schedule.gram and weights and schedule.about.get("weights") not in (None, weights):
        raise ValueError(
            f"{file} is of other weights than {folder} holds now; run `elit schedule {folder}` "
            f"again"
        )
    return schedule
