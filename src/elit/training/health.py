"""Whether a run is well: what its numbers should look like, and what to do where they don't.

Nothing here acts on the run. All of it sees plain numbers, and a resumed run starts to learn
anew what is usual.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

logger = logging.getLogger(__name__)

REPEAT_AFTER = 1000  # steps until the same warning may come again
SHOWN_ROWS = 8


class Warnings:
    """Logs warnings, each kind at most once in so many steps."""

    def __init__(self, repeat_after: int = REPEAT_AFTER):
        self.repeat_after = repeat_after
        self._last: dict[str, int] = {}

    def warn(self, kind: str, step: int, message: str) -> bool:
        """Log a warning unless one of its kind came just before; whether it was logged."""
        if step - self._last.get(kind, -self.repeat_after) < self.repeat_after:
            return False
        self._last[kind] = step
        logger.warning("step %d: %s", step, message)
        return True


# ---- values of single steps ----


@dataclass(frozen=True)
class Spike:
    """A value far above what is usual; `index` is its place among those that were looked at."""

    index: int
    value: float
    usual: float


class SpikeWatch:
    """Finds values far above what is usual at the number of latents of their step.

    What is usual is a line through the logarithms of the last values over those of the latents;
    what is far is measured in the median deviation from it, so that spikes don't hide others.

    Args:
        least: times above the usual that are no spike, however quiet the run is.
        deviations: standard deviations, as the median deviation tells them, that are no spike.
        window: values that tell what is usual.
        warm_up: values that are needed to tell anything.
    """

    def __init__(self, least: float, deviations: float = 8, window: int = 256, warm_up: int = 64):
        self.least, self.deviations, self.warm_up = math.log(least), deviations, warm_up
        self._past: deque[tuple[float, float]] = deque(maxlen=window)

    def update(self, kept: Sequence[Sequence[int | None]], values: Sequence[float]) -> list[Spike]:
        """Spikes among the values of some steps.

        Args:
            kept: latents per group of each part of each step's batch.
            values: of these steps.
        """
        places = [fmean(math.log(n or 1) for n in of_step) for of_step in kept]
        # Zero and what is not finite have no logarithm; others look after them.
        seen = [i for i, value in enumerate(values) if 0 < value < math.inf]
        x, y = np.array([places[i] for i in seen]), np.log([values[i] for i in seen])
        spikes = []
        if len(self._past) >= self.warm_up and seen:
            line, deviation = self._usual()
            above = y - np.polyval(line, x)
            limit = max(self.least, self.deviations * deviation)
            spikes = [
                Spike(seen[i], float(np.exp(y[i])), float(np.exp(y[i] - above[i])))
                for i in np.flatnonzero(above > limit)
            ]
        self._past.extend(zip(x.tolist(), y.tolist(), strict=True))
        return spikes

    def _usual(self) -> tuple[np.ndarray, float]:
        """The line through the past values, and the deviation from it."""
        x, y = np.array(self._past).T
        near = np.ones(len(x), bool)
        for _ in range(3):  # each time without what is far from the line before
            line = np.zeros(2)
            line[1] = y[near].mean()
            if np.ptp(x[near]) > 0:
                line = np.polyfit(x[near], y[near], 1)
            off = y - np.polyval(line, x)
            off -= np.median(off)
            deviation = 1.4826 * float(np.median(np.abs(off)))  # of a normal distribution
            near = np.abs(off) <= 5 * deviation + 1e-12
        return line, deviation


def loss_message(spike: Spike, kept: Sequence[int | None], rows: str) -> str:
    """What a spike of the loss means, and what to do."""
    return (
        f"loss {spike.value:.4g} is {spike.value / spike.usual:.1f} times what is usual"
        f"{_at(kept)} ({spike.usual:.4g}); a single one passes, more of them call for a lower "
        f"optimizer.lr{rows}"
    )


def gradient_message(spike: Spike, kept: Sequence[int | None], clip: float, rows: str) -> str:
    """What a spike of the gradient's norm means, and what to do."""
    return (
        f"gradient norm {spike.value:.4g} is {spike.value / spike.usual:.1f} times what is usual"
        f"{_at(kept)} ({spike.usual:.4g}); it was clipped to {clip:g}; if they come often, lower "
        f"optimizer.lr or optimizer.clip{rows}"
    )


def _at(kept: Sequence[int | None]) -> str:
    shown = ", ".join(str(n) for n in kept if n is not None)
    return f" at num_latents {shown}" if shown else ""


def describe_rows(rows: Sequence[int], is_broken: Callable[[int], bool] | None = None) -> str:
    """The rows of a step as a part of a message: those that are broken, or the first of all.

    Args:
        rows: indices in the training data.
        is_broken: whether a row itself is the trouble, where that can be told.
    """
    if not rows:
        return ""
    broken = [row for row in rows if is_broken(row)] if is_broken is not None else []
    if broken:
        return f"; these rows of the data are not finite: {_first(broken)}; mend or remove them"
    return f"; its rows of the data: {_first(rows)}"


def _first(rows: Sequence[int]) -> str:
    rest = len(rows) - SHOWN_ROWS
    return ", ".join(map(str, rows[:SHOWN_ROWS])) + (f" and {rest} more" if rest > 0 else "")


# ---- speed ----


class SpeedWatch:
    """Finds a run that has become slow, or that waits for its data.

    It judges spans of some seconds, and speaks where two in a row are bad: a machine has hiccups.
    """

    def __init__(self, span: float = 10.0, slow: float = 0.5, waiting: float = 0.2):
        self.span, self.slow, self.waiting = span, slow, waiting
        self._seconds = self._waited = self._images = self._flops = 0.0
        self._past: deque[tuple[float, float]] = deque(maxlen=32)
        self._slow_spans = self._waiting_spans = 0

    def update(self, seconds: float, waited: float, images: float, flops: float) -> dict[str, str]:
        """Messages by kind: none, or one or two.

        Args:
            seconds: of training since the last call.
            waited: of these, for data.
            images: trained on since then.
            flops: spent on them; 0 where that is not known.
        """
        self._seconds, self._waited = self._seconds + seconds, self._waited + waited
        self._images, self._flops = self._images + images, self._flops + flops
        if self._seconds < self.span:
            return {}
        speed = self._images / self._seconds, self._flops / self._seconds
        share = self._waited / self._seconds
        self._seconds = self._waited = self._images = self._flops = 0.0
        usual = [median(values) for values in zip(*self._past, strict=True)]
        # Smaller budgets make more images a second, larger ones more FLOPs: slow is less of both.
        is_slow = len(self._past) >= 5 and all(
            now < self.slow * before or not before for now, before in zip(speed, usual, strict=True)
        )
        self._past.append(speed)
        self._slow_spans = self._slow_spans + 1 if is_slow else 0
        self._waiting_spans = self._waiting_spans + 1 if share > self.waiting else 0
        messages = {}
        if self._waiting_spans == 2:
            messages["waiting"] = (
                f"training waits for data {share:.0%} of the time; raise data.num_workers, or "
                f"move the data to a faster disk"
            )
        if self._slow_spans == 2:
            messages["slow"] = (
                f"training has become slow: {speed[0]:.3g} images/s, {usual[0]:.3g} were usual; "
                f"look for other work on this machine, a hot device, or a slow disk"
            )
        return messages


# ---- the latent interface, at validation ----

_BEGIN_AGAIN = (
    "begin again with a lower optimizer.lr, a longer optimizer.warmup_steps or a larger "
    "data.batch_size; a Read of your own must start its latents and places apart, as N(0, 1)"
)


class InterfaceWatch:
    """Finds a core that is hardly used, a Read that no longer tells tokens apart, and latents that
    grow without end.

    A model whose latents are copies of one another may need its core all the same: as one vote for
    each group, at any budget. So copies are told from what the latents say, a core that does
    nothing from the loss without it.

    Args:
        narrow: share of a group's tokens that Read must look at, of however many latents.
        uniform: share of the largest entropy that says Read takes the mean of all tokens.
        growth: times that latents may grow from one validation to the next.
        largest: root mean square of the latents that half precision still serves.
        alike: share of the loss within which all budgets are the same.
        nearly_alike: the same, where the latents are copies of one another too.
        copies: spread of the latents as they leave the core that says they are copies.
        unused: rise of the loss, as a share of it, that leaving out a used interface exceeds.
        settled: share of its loss by which a run still falls from one validation to the next where
            it is too early to miss the core.
    """

    def __init__(
        self,
        narrow: float = 0.15,
        uniform: float = 0.995,
        growth: float = 4.0,
        largest: float = 1000.0,
        alike: float = 1e-4,
        nearly_alike: float = 5e-3,
        copies: float = 0.2,
        unused: float = 5e-3,
        settled: float = 0.05,
    ):
        self.narrow, self.uniform, self.growth, self.largest = narrow, uniform, growth, largest
        self.alike, self.nearly_alike, self.copies = alike, nearly_alike, copies
        self.unused, self.settled = unused, settled
        self._norms: dict[int, float] = {}
        self._uniform_before = self._alike_before = self._copies_before = False
        self._unused_before, self._loss_before = False, math.inf

    def update(
        self,
        seen: Mapping[int, Mapping[str, float]],
        losses: Sequence[float] = (),
        worth: Mapping[str, float] | None = None,
    ) -> dict[str, str]:
        """Messages by kind.

        Args:
            seen: what `InterfaceProbe.values` gives, for each number of latents.
            losses: of the validation, at several budgets, the highest first.
            worth: what `worth_of_parts` gives.
        """
        return self._of_use(seen, losses, worth or {}) | self._of_read(seen) | self._of_norms(seen)

    def _of_use(
        self,
        seen: Mapping[int, Mapping[str, float]],
        losses: Sequence[float],
        worth: Mapping[str, float],
    ) -> dict[str, str]:
        """Whether the core does any work, and each latent its own: two validations in a row."""
        messages = {}
        range_of = (max(losses) - min(losses)) / min(losses) if len(losses) > 1 else None
        spreads = [of["latent_spread"] for of in seen.values() if "latent_spread" in of]
        are_copies = bool(spreads) and max(spreads) < self.copies
        are_copies &= range_of is None or range_of < self.nearly_alike
        if are_copies and self._copies_before:
            alike = "" if range_of is None else (
                f", and the validation loss differs by {range_of:.2%} between the budgets"
            )  # fmt: skip
            messages["copies"] = (
                f"the latents of a group are copies of one another (spread {max(spreads):.1%}"
                f"){alike}: a single one would do, and more budget buys nothing; {_BEGIN_AGAIN}"
            )
        are_alike = range_of is not None and range_of < self.alike
        if are_alike and self._alike_before and "copies" not in messages:
            messages["alike"] = (
                f"the validation loss is the same at all budgets ({losses[0]:.5g}): more latents "
                f"tell the tokens no more than few; {_BEGIN_AGAIN}"
            )
        rise, loss = worth.get("interface", math.inf), losses[0] if losses else math.inf
        has_settled = loss > (1 - self.settled) * self._loss_before
        is_unused = rise < self.unused and has_settled
        if is_unused and self._unused_before:
            messages["unused"] = (
                f"the core is hardly used: without Read, core and Write the validation loss is "
                f"only {rise:.1%} higher, head and tail do all the work; {_BEGIN_AGAIN}"
            )
        self._copies_before, self._alike_before = are_copies, are_alike
        self._unused_before, self._loss_before = is_unused, loss
        return messages

    def _of_read(self, seen: Mapping[int, Mapping[str, float]]) -> dict[str, str]:
        """Whether Read tells tokens apart."""
        messages = {}
        narrow = [n for n, of in seen.items() if of.get("read_coverage", 1) < self.narrow]
        if narrow:
            messages["narrow"] = (
                f"Read looks at {seen[narrow[0]]['read_coverage']:.0%} of a group's tokens at "
                f"num_latents {_list(narrow)}: its attention has collapsed, and the core doesn't "
                f"see the rest; lower optimizer.lr, or lengthen optimizer.warmup_steps"
            )
        shares = [of["read_entropy_share"] for of in seen.values() if "read_entropy_share" in of]
        is_uniform = bool(shares) and min(shares) > self.uniform
        if is_uniform and self._uniform_before:  # as it may be at the start
            messages["uniform"] = (
                f"Read takes the mean of its group's tokens (entropy {min(shares):.1%} of the "
                f"largest) at all budgets: its latents have learned nothing to look for; a higher "
                f"optimizer.lr or more steps may help, latents that are all alike will not"
            )
        self._uniform_before = is_uniform
        return messages

    def _of_norms(self, seen: Mapping[int, Mapping[str, float]]) -> dict[str, str]:
        """Whether the latents grow without end."""
        messages = {}
        grown = {n: of["latent_norm"] for n, of in seen.items() if "latent_norm" in of}
        for n, norm in grown.items():
            before = self._norms.get(n, math.inf)
            if norm > self.largest or norm > max(10.0, self.growth * before):
                was = f", {before:.3g} before" if before < math.inf else ""
                messages["latents"] = (
                    f"the latents have grown to a root mean square of {norm:.3g} at num_latents "
                    f"{n}{was}: half precision loses what is small beside it; lower optimizer.lr "
                    f"or give optimizer.weight_decay"
                )
        self._norms = grown
        return messages


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
