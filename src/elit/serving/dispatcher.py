"""The queue: who waits, what is drawn together, under which budget, and what came of it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from elit._tables import counted
from elit.serving.control import Control, Picture, Prices, batches
from elit.serving.facts import Facts, RefusedError
from elit.serving.metrics import Metrics

logger = logging.getLogger(__name__)

GATHER = 0.05  # share of the target in which a free worker waits for more to come
MOST_TRIES = 3  # of a batch whose worker dies
Drawn = dict[str, Any]  # what a worker gives for a picture, or {"error": message, "status": 500}


@dataclass
class _Batch:
    pictures: list[Picture]
    latents: list[int]
    sent: float
    predicted: float
    tries: int = 1
    worker: int | None = None


@dataclass
class Dispatcher:
    """Hands batches to workers as they are free; lives in one event loop.

    Attributes:
        send: gives a batch, (its number, its pictures, their latents), to any worker.
        target: seconds from a request to its answer that are held by budget; None holds none.
        most_waiting: pictures.
        metrics: that it counts in.
        clock: seconds.
        workers: that are there, by number.
        facts: of the model, when a worker has told them.
    """

    send: Callable[[int, list[Picture], list[int]], None]
    target: float | None
    most_waiting: int
    metrics: Metrics
    clock: Callable[[], float] = time.monotonic
    facts: Facts | None = None
    workers: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._waiting: dict[Picture, asyncio.Future[Drawn]] = {}
        self._drawing: dict[Picture, asyncio.Future[Drawn]] = {}
        self._running: dict[int, _Batch] = {}
        self._numbers = itertools.count()

    # ---- requests ----

    def known(self) -> Facts:
        """The facts, or a RefusedError while no worker has told them."""
        if self.facts is None:
            raise RefusedError("the model is still being loaded", None, 503, "starting", 5)
        return self.facts

    async def draw(self, pictures: Sequence[Picture]) -> list[Drawn]:
        """Wait for pictures, or raise a RefusedError at once where they can't be served in time.

        Cancelled, it takes those back that have not begun.
        """
        now = self.clock()
        for picture in pictures:
            picture.arrived = now
        self._check_room(pictures)
        futures = {picture: asyncio.get_running_loop().create_future() for picture in pictures}
        self._waiting |= futures
        # Those that come together are seen together: a burst's first would get a budget too high.
        asyncio.get_running_loop().call_later(GATHER * (self.target or 0), self._dispatch)
        try:
            return list(await asyncio.gather(*futures.values()))
        finally:
            for picture in pictures:
                self._waiting.pop(picture, None)
            self._count()

    def _check_room(self, new: Sequence[Picture]) -> None:
        if not (self._waiting or self._running):  # never refused: coming again would not help, and
            return  # times that were learned too long are corrected by drawing alone
        room, free = self.most_waiting - len(self._waiting), self._free()
        late = self._control.seconds_too_late([*self._waiting], new, free)
        if late <= 0 and len(new) <= room:
            return
        self.metrics.shed.inc(len(new))
        if late <= 0:
            first = self._control.ends([*self._waiting], self._control.lowest, free)
            late = min(first.values(), default=0.0) - self.clock()
            message = f"{counted(len(self._waiting), 'picture')} in the queue already"
        else:
            message = (
                f"even at the lowest budget this would be done {late:.3g} s after the target of "
                f"{1000 * (self.target or 0):g} ms"
            )
        wait = max(1, math.ceil(late))
        raise RefusedError(f"{message}; ask again in {wait} s", None, 429, "overloaded", wait)

    # ---- workers ----

    def hello(self, worker: int, facts: Facts) -> None:
        """A worker is ready: a new one, or again one that died with its batch."""
        if self.facts is None:
            self.facts = facts
            prices = Prices(facts.calls, facts.fixed, facts.batch_size, facts.calls_per_step)
            self._control = Control(facts.ladder, prices, self.target)
        if worker in self.workers:
            logger.warning("worker %d died and is back", worker)
            self.metrics.restarts.inc()
            for number, batch in list(self._running.items()):
                if batch.worker in (None, worker):
                    self._again(number, batch)
        self.workers.add(worker)
        self._dispatch()

    def _again(self, number: int, batch: _Batch) -> None:
        """Hand out a batch that may be lost; of two answers the first one counts."""
        if batch.tries == MOST_TRIES:
            message = f"its worker died {MOST_TRIES} times"
            self.answer(number, [{"error": message, "status": 500}] * len(batch.pictures))
            return
        batch.tries, batch.worker, batch.sent = batch.tries + 1, None, self.clock()
        self.send(number, batch.pictures, batch.latents)

    def began(self, number: int, worker: int) -> None:
        """A worker has taken a batch."""
        if number in self._running:
            self._running[number].worker = worker

    def answer(self, number: int, drawn: Sequence[Drawn]) -> None:
        """A batch is done."""
        batch = self._running.pop(number, None)
        if batch is None:
            return
        now = self.clock()
        if batch.tries == 1 and not any("error" in one for one in drawn):
            self._control.prices.learn(batch.predicted, now - batch.sent)
        self.metrics.batches.observe(len(batch.pictures))
        for picture, one in zip(batch.pictures, drawn, strict=True):
            future = self._drawing.pop(picture)
            if not future.done():
                future.set_result(one | {"ms": 1000 * (now - picture.arrived)})
            if "error" not in one:
                self.metrics.pictures.labels(f"{one['budget']:g}").inc()
                self.metrics.gflops.inc(one["gflops"])
        self._dispatch()

    def _dispatch(self) -> None:
        while self._waiting and len(self._running) < len(self.workers):
            waiting = [*self._waiting]
            cap = self._control.cap(waiting, self._free())
            pictures = batches(waiting, self._control.prices.most)[0]
            latents = [one.latents_under(cap, self._control.lowest) for one in pictures]
            for picture in pictures:
                self._drawing[picture] = self._waiting.pop(picture)
            predicted = self._control.prices.of_batch(pictures[0].way, latents)
            number = next(self._numbers)
            self._running[number] = _Batch(pictures, latents, self.clock(), predicted)
            self.send(number, pictures, latents)
        self._count()

    def _count(self) -> None:
        self.metrics.waiting.set(len(self._waiting))
        self.metrics.running.set(len(self._drawing))

    def _free(self) -> list[float]:
        """When each worker is free, as far as is known."""
        now = self.clock()
        busy = [max(now, batch.sent + batch.predicted) for batch in self._running.values()]
        return busy + [now] * (max(1, len(self.workers)) - len(busy))
