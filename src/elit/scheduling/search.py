"""The best way to draw within a cap by a real score of few samples: steps, budgets, step cache.

All candidates draw from the same noise, so that their scores differ by what they do alone. A search
is a function of its scores, and those stand on disk: the same call goes on where a killed one was.
"""

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from elit.caching.step_cache import StepCache
from elit.choosing.choose import in_words
from elit.choosing.points import OperatingPoint, guided_by
from elit.evaluation.evaluation import Evaluation, ranking_score, score_points
from elit.evaluation.sweep import check_score
from elit.flow.guidance import Guidance
from elit.pipelines.load import CALIBRATION_FILE, load_teacache
from elit.scheduling.schedule import Schedule, one_cap
from elit.viz.sweeps import SCORES

logger = logging.getLogger(__name__)

FIRST_BLOCK, TEACACHE = (0.1, 0.2, 0.4), (0.2, 0.4)  # thresholds to begin with
_MORE_STEPS = (1.25, 1.5, 2.0, 3.0)  # than full budget has within the cap
MOVES = 16
MOST_STEPS = 100  # of a candidate, unless more are asked for
_TRIES, _AIM = 4, 0.985  # to spend a cap with a cache, whose skips are known when it has drawn
_FEWER = 4  # of the first round's samples
_ROUNDING = 1 + 1e-9  # costs are sums
Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True)
class Candidate:
    """A way to spend a cap, in few numbers.

    Attributes:
        steps: of the sampler; of a full budget with a cache, to begin with.
        budgets: full, one for all steps, or those of the schedule, in which errors count by
            the numbers below. All 0 is the derived plan.
        tilt: by e to this, an error of the guided prediction counts more at sigma 1 than at 0.
        guide_tilt: likewise of the guide.
        guide: by 2 to this, all of the guide's errors count more.
        cache: that leaves steps out.
    """

    steps: int
    budgets: Literal["full", "constant", "planned"] = "planned"
    tilt: float = 0.0
    guide_tilt: float = 0.0
    guide: float = 0.0
    cache: StepCache | None = None

    @property
    def way(self) -> str:
        """Its kind in words."""
        words = {"full": "steps", "constant": "constant budget", "planned": "budgets"}
        if self.cache is None:
            return words[self.budgets] + (" alone" if self.budgets != "constant" else "")
        return "cache alone" if self.budgets == "full" else "budgets and cache"


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        point: the best within the cap; `pipeline(labels, **point.arguments())` draws by it.
        score: its.
        rows: as a sweep has them, of all samples: the best of each way, and what was searched.
            `searches` says which, within which cap, and whether it is the best of all.
    """

    point: OperatingPoint
    score: float
    rows: list[dict[str, Any]]


def search(
    evaluation: Evaluation,
    schedule: Schedule,
    max_flops: float | None = None,
    max_ms: float | None = None,
    guidance: Guidance | None = None,
    steps: Sequence[int] = (),
    caches: Sequence[StepCache] | None = None,
    moves: int = MOVES,
    ranked_by: str | None = None,
) -> Found:
    """The best way to draw within a cap, by a score of the evaluation's samples.

    A quarter of the samples decides which third of the candidates goes on, with the best of each
    way; from the best plan by all samples, one number at a time is changed while it helps.

    Args:
        evaluation: pipeline, samples and their reference; its parts are kept as a sweep's.
        schedule: `load_schedule(run)`, from whose plans it starts.
        max_flops: operations for an image, all calls, a multiply-add as 2; of a cached run those
            that were done, on average over the samples.
        max_ms: milliseconds for an image on this device, instead.
        guidance: `CFG(2.0)`, or None.
        steps: numbers of steps to start from; by default 1.25 to 3 times what full budget has,
            up to 100. No candidate has more than 100, or than the largest of these.
        caches: to start from, empty for none; by default a FirstBlockCache at some thresholds,
            and TeaCache where `elit calibrate` was run.
        moves: candidates of all samples after those that it starts from, at most.
        ranked_by: score to go by; by default the first network's Frechet distance.
    """
    within = one_cap(max_flops, max_ms)
    if evaluation.process.world > 1:
        raise ValueError("each step of a search needs the scores before it; run it in one process")
    check_score(evaluation, ranked_by)
    task = _Task(evaluation, schedule, within, guidance, ranked_by, steps)
    caches = task.default_caches() if caches is None else caches
    candidates = list(task.start(caches))
    kept = candidates
    if task.few < evaluation.drawing.count:
        values = task.values(candidates, task.few)
        kept = the_best(candidates, values, lambda candidate: candidate.way)
    values = task.values(kept)
    plans = [(v, i) for i, v in enumerate(values) if kept[i].budgets == "planned" and v < math.inf]
    tried = dict(zip(kept, values, strict=True))
    if plans:
        value, i = min(plans)
        near = partial(neighbours, guided=guidance is not None)
        tried |= descend(kept[i], value, near, task.values, moves)
    best = min(tried, key=tried.__getitem__, default=None)
    if best is None or tried[best] == math.inf:
        raise ValueError(f"nothing that could be drawn keeps within {in_words(within)}; raise it")
    return task.found(kept, best)


def the_best(
    candidates: Sequence[Item], values: Sequence[float], kind: Callable[[Item], Hashable]
) -> list[Item]:
    """The third of lowest values, and the best of each kind, in their order."""
    order = sorted(range(len(candidates)), key=lambda i: (values[i], i))
    first: dict[Hashable, int] = {}
    for i in order:
        first.setdefault(kind(candidates[i]), i)
    chosen = {*order[: -(-len(order) // 3)], *first.values()}
    return [candidates[i] for i in sorted(chosen)]


def descend(
    start: Item,
    value: float,
    near: Callable[[Item, float], Sequence[Sequence[Item]]],
    evaluate: Callable[[Sequence[Item]], Sequence[float]],
    most: int,
) -> dict[Item, float]:
    """Values of all that is tried on a way down, one coordinate at a time, in halving steps.

    Args:
        start: where it begins.
        value: of the start.
        near: neighbours of one at a size of steps, a group for each coordinate.
        evaluate: values of some.
        most: evaluations.
    """
    best, tried, size = start, {start: value}, 1.0
    while size >= 0.25 and len(tried) <= most:
        before = best
        for axis in range(len(near(best, size))):
            new = [one for one in near(best, size)[axis] if one not in tried]
            new = new[: most + 1 - len(tried)]
            tried |= dict(zip(new, evaluate(new), strict=True))
            best = min((best, *new), key=tried.__getitem__)
        if best == before:
            size /= 2
    return tried


def neighbours(one: Candidate, size: float, guided: bool) -> list[list[Candidate]]:
    """Candidates that differ in one number, both ways: a pair for each."""
    counts = {round(one.steps * 1.25 ** (way * size)) for way in (-1, 1)} - {0, one.steps}
    found = [[replace(one, steps=count) for count in sorted(counts)]]
    for name in ("tilt", *(("guide", "guide_tilt") if guided else ())):
        both = (getattr(one, name) + way * size for way in (-1, 1))
        found.append([replace(one, **{name: value}) for value in both])
    if one.cache is not None:
        both = (one.cache.threshold * 1.5 ** (way * size) for way in (-1, 1))
        found.append([replace(one, cache=replace(one.cache, threshold=t)) for t in both])
    return found


class _Task:
    """Candidates as operating points within the cap, and their scores."""

    def __init__(
        self, evaluation: Evaluation, schedule: Schedule, within: dict[str, float],
        guidance: Guidance | None, ranked_by: str | None, steps: Sequence[int],
    ):  # fmt: skip
        if not schedule.gram:
            raise ValueError("a search starts from measured errors; run `elit schedule RUN`")
        self.evaluation, self.schedule, self.guidance = evaluation, schedule, guidance
        self.within, ((_, self.cap),) = within, within.items()
        self.drawing, self.pipeline = evaluation.drawing, evaluation.drawing.pipeline
        self.ranked_by, self.times = ranked_by, evaluation.times()
        self.steps, self.most = steps, max((MOST_STEPS, *steps))
        at_once, count = self.drawing.batch_size, self.drawing.count
        self.few = min(count, at_once * max(1, count // (_FEWER * at_once)))
        self.at = cache(lambda n: replace(evaluation, drawing=replace(self.drawing, count=n)))
        self.fit = cache(self._fit)
        schedule.plan(self.pipeline, 1e30, None, guidance, 1)  # says what doesn't fit

    def default_caches(self) -> list[StepCache]:
        """Those that the model can have."""
        model, folder = self.pipeline.transformer, Path(self.evaluation.run)
        caches = [StepCache("FirstBlockCache", threshold) for threshold in FIRST_BLOCK]
        try:
            with model.cached(caches[0].config()):
                pass
        except ValueError as error:
            logger.info("no step cache is tried: %s", error)
            return []
        if (folder / CALIBRATION_FILE).exists():
            fitted = load_teacache(folder, TEACACHE[0])
            caches += [StepCache.of_teacache(fitted, threshold) for threshold in TEACACHE]
        return caches

    def start(self, caches: Sequence[StepCache]) -> Iterator[Candidate]:
        """Where the search starts: each way at some numbers of steps."""
        own, most = self.most_steps(), self.most
        if own == most:
            logger.warning(
                "%s pay for %d steps of full budget and more: nothing of more steps is tried; "
                "lower the cap, or give steps (--steps)", in_words(self.within), most
            )  # fmt: skip
        more = {min(most, max(1, round((own or 1) * factor))) for factor in _MORE_STEPS}
        numbers = sorted({*self.steps} or more)
        if own:
            yield Candidate(own, "full")
            yield from (Candidate(min(most, 2 * own), "full", cache=one) for one in caches)
        for count in numbers:
            yield Candidate(count, "constant")
            yield Candidate(count)
        for count in numbers[len(numbers) // 2 :]:  # between many steps little changes
            yield from (Candidate(count, cache=one) for one in caches)

    # ---- candidates as points ----

    def plain(self, budget: float, steps: int, of: StepCache | None = None) -> OperatingPoint:
        """A point of one budget."""
        return OperatingPoint(budget, steps, cache=of, **guided_by(self.guidance))

    def most_steps(self) -> int:
        """Steps of full budget within the cap, at most those of a candidate; 0 if it has none."""
        low, high = 0, self.most
        while low < high:
            middle = (low + high + 1) // 2
            within = self.cost(self.plain(1.0, middle)) <= self.cap * _ROUNDING
            low, high = (middle, high) if within else (low, middle - 1)
        return low

    def cost(self, point: OperatingPoint) -> float:
        """Of an image, in what the cap is in.

        With a cache, of the first round's samples; infinite of one that skipped nothing.
        """
        if point.cache is not None and not self._drawn(point)["skipped"]:
            return math.inf
        if "max_ms" in self.within:
            return self.times.ms_of_points([point])[0]
        if point.cache is None:
            return float(self.drawing.flops(point))
        return self._drawn(point)["gflops_per_image"] * 1e9

    def _drawn(self, point: OperatingPoint) -> dict[str, Any]:
        """What a point with a cache did for the first round's samples."""
        few = self.at(self.few)
        todo = few.parts(point).todo()
        with tqdm(total=todo, desc="steps skipped", unit="image",
                  disable=not (few.progress and todo)) as bar:  # fmt: skip
            few.draw(point, bar)
        return few.ran(point)

    def plan(self, share: float, one: Candidate) -> OperatingPoint | None:
        """Of the schedule, within a share of the cap; None if its cheapest costs more."""
        rising = np.asarray(self.schedule.levels) - 0.5
        guide = 2.0**one.guide * np.exp(one.guide_tilt * rising)
        schedule = self.schedule.counting(np.exp(one.tilt * rising).tolist(), guide.tolist())
        within: dict[str, Any] = {name: share * cap for name, cap in self.within.items()}
        try:
            plan = schedule.plan(
                self.pipeline, **within, guidance=self.guidance, num_inference_steps=one.steps,
                what=self.times.what, size=self.times.size,
            )  # fmt: skip
        except ValueError:
            return None
        return plan.point(one.cache)

    def _fit(self, one: Candidate) -> OperatingPoint | None:
        """The costliest within the cap of a few tries, None if there is none."""
        best, spent, share, seen = None, 0.0, 1.0, set()
        if one.steps > self.most:
            return None
        for _ in range(_TRIES):
            point = self._point(share, one)
            if point is None or point in seen:
                break
            seen.add(point)
            cost = self.cost(point)
            if spent < cost <= self.cap * _ROUNDING:
                best, spent = point, cost
            if point.cache is None or cost == math.inf or 2 * _AIM - 1 <= cost / self.cap <= 1:
                break
            share *= _AIM * self.cap / cost
        return best

    def _point(self, share: float, one: Candidate) -> OperatingPoint | None:
        if one.budgets == "planned":
            return self.plan(share, one)
        if one.budgets == "full":
            return self.plain(1.0, max(1, min(self.most, int(one.steps * share))), one.cache)
        model = self.pipeline.transformer
        numbers = range(model.max_latents, model.min_latents - 1, -1)
        points = (self.plain(model.budget_of(n), one.steps) for n in numbers)
        return next((point for point in points if self.cost(point) <= self.cap * _ROUNDING), None)

    # ---- scores ----

    def scored(self, candidates: Iterable[Candidate], count: int) -> list[dict[str, Any] | None]:
        """Row of each, None of what has none within the cap."""
        points = [self.fit(one) for one in candidates]
        drawn = [point for point in dict.fromkeys(points) if point is not None]
        rows = score_points(self.at(count), drawn, f"search, {count} samples each") if drawn else []
        by_point = dict(zip(drawn, rows or [], strict=True))
        return [None if point is None else by_point[point] for point in points]

    def values(self, candidates: Sequence[Candidate], count: int | None = None) -> list[float]:
        """Scores of candidates, lower is better; infinite of what isn't within the cap."""
        count = self.drawing.count if count is None else count
        return [math.inf if row is None else self.value(row)
                for row in self.scored(candidates, count)]  # fmt: skip

    def value(self, row: dict[str, Any]) -> float:
        if not row["scores"]:
            return math.inf
        self.ranked_by = self.ranked_by or ranking_score(row["scores"])
        score = row["scores"].get(self.ranked_by)
        over = row["gflops_per_image"] * 1e9 > self.within.get("max_flops", math.inf) * _ROUNDING
        if score is None or not math.isfinite(score) or over:
            return math.inf
        return float(score if SCORES[self.ranked_by].lower_is_better else -score)

    def found(self, kept: Sequence[Candidate], best: Candidate) -> Found:
        """The best one, the best of each way among others, and their rows."""
        ways: dict[str, tuple[float, dict[str, Any]]] = {}
        for one, row in zip(kept, self.scored(kept, self.drawing.count), strict=True):
            value = math.inf if row is None else self.value(row)
            if row is not None and value < ways.get(one.way, (math.inf, row))[0]:
                ways[one.way] = value, row | {"searches": [{"way": one.way, **self.within}]}
        (winner,) = self.scored([best], self.drawing.count)
        assert winner is not None
        assert self.ranked_by is not None
        rows = {OperatingPoint.from_dict(row): row for _, row in ways.values()}
        point = OperatingPoint.from_dict(winner)
        (told,) = rows.get(point, {}).get("searches", [{"way": "searched", **self.within}])
        rows[point] = winner | {"searches": [told | {"best": True}]}
        return Found(point, winner["scores"][self.ranked_by], list(rows.values()))
