"""Which budget runs: the highest at which all that wait are done within the target."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HEADROOM = 0.8  # share of the target that is planned with: what comes later needs the rest
_WEIGHT = 0.2  # of the newest batch in the factor that times are corrected by
_MOST = 4.0  # times that one batch may change that factor by, either way, before its weight


@dataclass(frozen=True)
class Way:
    """How a picture is drawn, apart from its budget; pictures of one way share batches."""

    steps: int
    guidance: str = "none"
    scale: float | None = None
    guide_latents: int | None = None
    interval: tuple[float, float] | None = None

    def forwards(self, latents: int) -> list[tuple[int, int]]:
        """(latents, batches in one) of the forwards of a step; in all of them, guided or not."""
        if self.guidance == "none":
            return [(latents, 1)]
        if self.guide_latents in (None, latents):
            return [(latents, 2 if self.guidance != "ag" else 1)]
        return [(latents, 1), (self.guide_latents, 1)]

    def least(self, lowest: int) -> int:
        """Fewest latents at which this guidance still does what it says."""
        if self.guide_latents is None:
            return lowest
        return max(lowest, self.guide_latents + (self.guidance == "ag"))


@dataclass(eq=False)
class Picture:
    """One picture that was asked for; `latents` is 0 of a model that is not elastic."""

    what: int | str
    seed: int
    way: Way
    latents: int
    negative: str | None = None
    arrived: float = 0.0

    def latents_under(self, cap: int, lowest: int) -> int:
        """Latents per group that it is drawn with under a cap."""
        return min(self.latents, max(cap, self.way.least(lowest)))


@dataclass
class Prices:
    """Seconds of a batch: measured at the start, corrected by what batches take.

    Attributes:
        calls: by latents per group, seconds of a forward of 1 picture and of `most` pictures.
        fixed: seconds of all else in a batch of 1 and of `most`: beginning, decoding.
        most: pictures of the largest batch.
        calls_per_step: of the model; two of Heun's method.
        factor: what batches took, as a multiple of what was measured at the start.
    """

    calls: Mapping[int, Sequence[float]]
    fixed: Sequence[float]
    most: int
    calls_per_step: float = 1.0
    factor: float = field(default=1.0)

    def of_batch(self, way: Way, latents: Iterable[int]) -> float:
        """Seconds of a batch whose pictures keep so many latents."""
        pictures = list(latents)
        count = len(pictures)
        step = sum(  # in one call, where each pays for its own budget
            self._forward(kept, count * doubled) / count
            for number in pictures
            for kept, doubled in way.forwards(number)
        )
        return self.factor * (
            self._line(self.fixed, count) + step * way.steps * self.calls_per_step
        )

    def learn(self, predicted: float, took: float) -> None:
        """Correct the times by a batch."""
        ratio = min(max(took / max(predicted, 1e-9), 1 / _MOST), _MOST)
        self.factor *= ratio**_WEIGHT

    def _line(self, ends: Sequence[float], count: int) -> float:
        """Of 1 picture, of `most`, and on a line between and beyond."""
        if self.most == 1:
            return ends[0] * count
        return ends[0] + (ends[1] - ends[0]) * (count - 1) / (self.most - 1)

    def _forward(self, latents: int, count: int) -> float:
        known = sorted(self.calls)
        above = next((n for n in known if n >= latents), known[-1])
        below = next((n for n in reversed(known) if n <= latents), known[0])
        high, low = (self._line(self.calls[n], count) for n in (above, below))
        share = 0.0 if above == below else (latents - below) / (above - below)
        return low + (high - low) * share


def batches(waiting: Iterable[Picture], most: int) -> list[list[Picture]]:
    """Pictures of one way together, at most so many; the batch of the oldest picture first."""
    open_batches: dict[Hashable, list[Picture]] = {}
    found: list[list[Picture]] = []
    for picture in waiting:
        batch = open_batches.get(picture.way)
        if batch is None or len(batch) == most:
            batch = open_batches[picture.way] = []
            found.append(batch)
        batch.append(picture)
    return found


class Control:
    """Chooses the cap on latents per group that all waiting pictures are drawn under.

    Args:
        ladder: latents per group that may be chosen.
        prices: of batches.
        target: seconds from a picture's arrival to its end; None holds none.
    """

    def __init__(self, ladder: Sequence[int], prices: Prices, target: float | None):
        self.ladder = sorted(ladder, reverse=True)
        self.prices, self.target = prices, target

    @property
    def lowest(self) -> int:
        """Fewest latents per group that are ever chosen."""
        return self.ladder[-1]

    def ends(
        self, waiting: Sequence[Picture], cap: int, free: Sequence[float]
    ) -> dict[Picture, float]:
        """When each picture would be done, under a cap, by workers that are free at these times."""
        at: list[Any] = list(free)
        heapq.heapify(at)
        done: dict[Picture, float] = {}
        for batch in batches(waiting, self.prices.most):
            kept = [picture.latents_under(cap, self.lowest) for picture in batch]
            end = heapq.heappop(at) + self.prices.of_batch(batch[0].way, kept)
            heapq.heappush(at, end)
            done |= dict.fromkeys(batch, end)
        return done

    def cap(self, waiting: Sequence[Picture], free: Sequence[float]) -> int:
        """The highest cap under which all that wait are done in time, or the lowest there is."""
        highest = max([self.ladder[0], *(picture.latents for picture in waiting)])
        if self.target is None:
            return highest
        caps = [highest, *(n for n in self.ladder if n < highest)]
        for cap in caps[:-1]:
            done = self.ends(waiting, cap, free)
            if all(end - one.arrived <= HEADROOM * self.target for one, end in done.items()):
                return cap
        return caps[-1]

    def seconds_too_late(
        self, waiting: Sequence[Picture], new: Sequence[Picture], free: Sequence[float]
    ) -> float:
        """By how much new pictures would miss the target even at the lowest budget."""
        if self.target is None:
            return 0.0
        done = self.ends([*waiting, *new], self.lowest, free)
        return max(done[picture] - picture.arrived for picture in new) - self.target
