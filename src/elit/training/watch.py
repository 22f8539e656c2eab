"""Whether a run is well: what it says of its steps and of its latent interface, and warnings.

Nothing here acts on the run, and losses stay on the device until a log line is due. A resumed run
starts to learn anew what is usual.
"""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from elit.cost.devices import peak_flops
from elit.cost.flops import cost_of, step_flops
from elit.data import ImageDataset
from elit.inspection.left_out import (
    find_interface,
    has_original_core,
    latent_moments,
    latent_spread,
    watch_latents,
)
from elit.interface import Read
from elit.interface.attention_maps import attention_coverage, attention_entropy, watch_attention
from elit.interface.budget import format_budget
from elit.training.config import TrainConfig
from elit.training.distributed import World
from elit.training.validation import budgets_out_of_order

logger = logging.getLogger(__name__)

REPEAT_AFTER = 1000  # steps until the same warning may come again
MOST_PENDING = 100  # steps whose losses wait on the device
SHOWN_ROWS = 8

PartLatents = Sequence[int | None]  # latents per group of each part of a step's batches


# ---- single steps ----


class Spike(NamedTuple):
    """A value far above what is usual; `at` is its place among those that were looked at."""

    at: int
    value: float
    usual: float


class SpikeWatch:
    """Finds values far above what is usual at the number of latents of their step.

    What is usual is a line through the logarithms of the last values over those of the latents;
    what is far is measured in the median deviation from it, so that spikes don't hide others.

    Args:
        least: times above the usual that are no spike, however quiet the run is.
        warm_up: values that are needed to tell anything.
    """

    deviations = 8  # standard, as the median one tells them, that are no spike

    def __init__(self, least: float, warm_up: int = 64):
        self.least, self.warm_up = math.log(least), warm_up
        self._past: deque[tuple[float, float]] = deque(maxlen=256)

    def update(self, latents: Sequence[PartLatents], values: Sequence[float]) -> list[Spike]:
        """Spikes among the values of some steps, each with the latents of its parts."""
        places = [fmean(math.log(n or 1) for n in of_step) for of_step in latents]
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


def spike_message(what: str, spike: Spike, latents: PartLatents, advice: str) -> str:
    """What has spiked at which number of latents, how far, and what to do."""
    numbers = _listed([n for n in latents if n is not None])
    return (
        f"{what} {spike.value:.4g} is {spike.value / spike.usual:.1f} times what is usual"
        f"{f' at num_latents {numbers}' if numbers else ''} ({spike.usual:.4g}); {advice}"
    )


def describe_rows(rows: Sequence[int], broken: Sequence[int] = ()) -> str:
    """Name the rows of a step in a message: those that are broken, or the first of all."""
    named = broken or rows
    rest = len(named) - SHOWN_ROWS
    listed = _listed(named[:SHOWN_ROWS]) + (f" and {rest} more" if rest > 0 else "")
    if broken:
        return f"; these rows of the data are not finite: {listed}; mend or remove them"
    return f"; its rows of the data: {listed}" if listed else ""


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


class SpeedWatch:
    """Finds a run that has become slow, or that waits for its data.

    It judges spans of some seconds, and speaks where two in a row are bad: a machine has hiccups.
    """

    span = 10.0  # seconds
    slow = 0.5  # of what is usual, below which it is slow
    waiting = 0.2  # share of the time, above which it waits

    def __init__(self) -> None:
        self._since = np.zeros(4)  # seconds, those of waiting, images, FLOPs
        self._past: deque[tuple[float, float]] = deque(maxlen=32)
        self._slow_spans = self._waiting_spans = 0

    def update(self, seconds: float, waited: float, images: float, flops: float) -> dict[str, str]:
        """Messages by kind, of the seconds, those of waiting, images and FLOPs since the last call.

        FLOPs are 0 where they are not known.
        """
        self._since += seconds, waited, images, flops
        if self._since[0] < self.span:
            return {}
        share, *speed = (self._since[1:] / self._since[0]).tolist()
        self._since[:] = 0
        usual = [median(values) for values in zip(*self._past, strict=True)]
        # Smaller budgets make more images a second, larger ones more FLOPs: slow is less of both.
        is_slow = len(self._past) >= 5 and all(
            now < self.slow * before or not before for now, before in zip(speed, usual, strict=True)
        )
        self._past.append((speed[0], speed[1]))
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


class InterfaceProbe:
    """Means over the calls of a model, for each number of latents; a plain model shows nothing."""

    def __init__(self) -> None:
        self.num_latents: int | None = None  # of the running call
        self.tells_spread = True
        self._calls: dict[tuple[int, str], list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Take note of a number of the running call; it stays on its device."""
        if self.num_latents is not None:
            self._calls.setdefault((self.num_latents, name), []).append(value)

    def add_weights(self, weights: Tensor) -> None:
        """Take note of Read's attention weights, (B * G, H, n, P)."""
        entropy, tokens = attention_entropy(weights).mean(), weights.shape[-1]
        self.add("read_entropy", entropy)
        if tokens > 1:
            self.add("read_entropy_share", entropy / torch.log(entropy.new_tensor(tokens)))
            self.add("read_coverage", attention_coverage(weights).mean())

    def add_latents(self, where: str, latents: Tensor, num_groups: int) -> None:
        """Take note of latents (B, G * n, D) as they enter the core, or as they leave it."""
        end = "_read" if where == "read" else ""
        self.add(f"latent_norm{end}", latents.detach().float().square().mean().sqrt())
        if self.tells_spread and latents.shape[1] > num_groups:
            self.add(f"latent_spread{end}", latent_moments(latents, num_groups))

    def values(self, world: World) -> dict[int, dict[str, float]]:
        """Means over the calls of all processes, which must ask together.

        `read_entropy` is in nats, `read_entropy_share` that of the largest entropy,
        `read_coverage` the share of a group's tokens that Read looks at; `latent_norm_read` and
        `latent_norm` are root mean squares of the latents after Read and after the core,
        `latent_spread_read` and `latent_spread` what of their variance is between the latents of
        a group: see `latent_spread`. What is undefined is left out.
        """
        values: dict[int, dict[str, float]] = {}
        for (num_latents, name), calls in self._calls.items():
            mean = world.mean(torch.stack(calls).mean(0))
            value = latent_spread(mean) if name.startswith("latent_spread") else mean.item()
            if value is not None:
                values.setdefault(num_latents, {})[name] = value
        return values


@contextmanager
def watch_interface(model: nn.Module) -> Iterator[InterfaceProbe]:
    """See what Read and the core do in the calls of a model that name their `num_latents`.

    A retrofit that starts lossless shows its latents alone: they begin as means of tokens, and
    what its Read attends to only adds to them.
    """
    probe, interface = InterfaceProbe(), find_interface(model)

    def call_begins(_: nn.Module, __: Any, named: dict[str, Any]) -> None:
        probe.num_latents = named.get("num_latents")

    with ExitStack() as stack:
        if interface is not None:
            handle = model.register_forward_pre_hook(call_begins, with_kwargs=True)
            stack.callback(handle.remove)
            # Cells of one group are as alike as the image is.
            probe.tells_spread = not has_original_core(model)
            stack.enter_context(watch_latents(model, probe.add_latents))
            if isinstance(interface[0], Read):
                stack.enter_context(watch_attention(interface[0].attention, probe.add_weights))
        yield probe


_BEGIN_AGAIN = (
    "begin again with a lower optimizer.lr, a longer optimizer.warmup_steps or a larger "
    "data.batch_size; a Read of your own must start its latents and places apart, as N(0, 1)"
)
_Seen = Mapping[int, Mapping[str, float]]  # what `InterfaceProbe.values` gives


class InterfaceWatch:
    """Finds a core that is hardly used, a Read that no longer tells tokens apart, and latents that
    grow without end.

    A model whose latents are copies of one another may need its core all the same: as one vote for
    each group, at any budget. So copies are told from what the latents say, a core that does
    nothing from the loss without it.
    """

    narrow = 0.15  # share of a group's tokens that Read must look at, of however many latents
    uniform = 0.995  # share of the largest entropy that says Read takes the mean of all tokens
    growth = 4.0  # times that latents may grow from one validation to the next
    largest = 1000.0  # root mean square of the latents that half precision still serves
    alike = 1e-4  # share of the loss within which all budgets are the same
    nearly_alike = 5e-3  # the same, where the latents are copies of one another too
    copies = 0.2  # spread of the latents as they leave the core that says they are copies
    unused = 5e-3  # rise of the loss, as a share of it, without an interface that is used
    settled = 0.05  # share of its loss that a run falls by where it is too early to miss the core

    def __init__(self) -> None:
        self._norms: dict[int, float] = {}
        self._loss_before = math.inf
        self._before: set[str] = set()

    def update(
        self, seen: _Seen, losses: Sequence[float] = (), worth: Mapping[str, float] | None = None
    ) -> dict[str, str]:
        """Messages by kind. All but narrow and latents must be found in two validations in a row.

        `losses` are those of the validation, the highest budget first.
        """
        suspicions = self._suspicions(seen, losses, worth or {})
        messages = {kind: text for kind, text in suspicions.items() if kind in self._before}
        self._before = set(suspicions)
        if "copies" in messages:
            messages.pop("alike", None)
        return messages | self._certainties(seen)

    def _suspicions(
        self, seen: _Seen, losses: Sequence[float], worth: Mapping[str, float]
    ) -> dict[str, str]:
        """Whether the core does any work, each latent its own, and Read tells tokens apart."""
        found = {}
        differs = (max(losses) - min(losses)) / min(losses) if len(losses) > 1 else None
        spread = max(_values(seen, "latent_spread").values(), default=math.inf)
        if spread < self.copies and (differs is None or differs < self.nearly_alike):
            alike = "" if differs is None else (
                f", and the validation loss differs by {differs:.2%} between the budgets"
            )  # fmt: skip
            found["copies"] = (
                f"the latents of a group are copies of one another (spread {spread:.1%}"
                f"){alike}: a single one would do, and more budget buys nothing; {_BEGIN_AGAIN}"
            )
        if differs is not None and differs < self.alike:
            found["alike"] = (
                f"the validation loss is the same at all budgets ({losses[0]:.5g}): more latents "
                f"tell the tokens no more than few; {_BEGIN_AGAIN}"
            )
        rise, loss = worth.get("interface", math.inf), losses[0] if losses else math.inf
        has_settled = loss > (1 - self.settled) * self._loss_before
        self._loss_before = loss
        if rise < self.unused and has_settled:
            found["unused"] = (
                f"the core is hardly used: without Read, core and Write the validation loss is "
                f"only {rise:.1%} higher, head and tail do all the work; {_BEGIN_AGAIN}"
            )
        share = min(_values(seen, "read_entropy_share").values(), default=0)
        if share > self.uniform:
            found["uniform"] = (
                f"Read takes the mean of its group's tokens (entropy {share:.1%} of the largest) "
                f"at all budgets: its latents have learned nothing to look for; a higher "
                f"optimizer.lr or more steps may help, latents that are all alike will not"
            )
        return found

    def _certainties(self, seen: _Seen) -> dict[str, str]:
        """Whether Read looks at few tokens, and whether the latents grow without end."""
        found = {}
        shares = _values(seen, "read_coverage")
        if narrow := [n for n, share in shares.items() if share < self.narrow]:
            found["narrow"] = (
                f"Read looks at {shares[narrow[0]]:.0%} of a group's tokens at num_latents "
                f"{_listed(narrow)}: its attention has collapsed, and the core doesn't "
                f"see the rest; lower optimizer.lr, or lengthen optimizer.warmup_steps"
            )
        norms = _values(seen, "latent_norm")
        for n, norm in norms.items():
            before = self._norms.get(n, math.inf)
            if norm > self.largest or norm > max(10.0, self.growth * before):
                was = f", {before:.3g} before" if before < math.inf else ""
                found["latents"] = (
                    f"the latents have grown to a root mean square of {norm:.3g} at num_latents "
                    f"{n}{was}: half precision loses what is small beside it; lower optimizer.lr "
                    f"or give optimizer.weight_decay"
                )
        self._norms = norms
        return found


def _values(seen: _Seen, name: str) -> dict[int, float]:
    """One of the values, by the number of latents."""
    return {n: values[name] for n, values in seen.items() if name in values}


# ---- the run ----


class Monitor:
    """Counts what steps do, and gives the values of a log line when one is due.

    Args:
        config: of the run.
        world: of its processes: all of them call `after_step`.
        model: before it is wrapped.
        dataset: that it trains on.
        step: that the run goes on from.
        rows_of: indices in the training data of a step of this process, for messages.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        model: Any,
        dataset: ImageDataset,
        step: int,
        rows_of: Callable[[int], Sequence[int]],
    ):
        self.config, self.world, self.model = config, world, model
        self.dataset, self.since, self.rows_of = dataset, step, rows_of
        # By size of the input.
        self.cost = cache(partial(cost_of, model)) if config.retrofit.base is None else None
        self.peak = None if config.train.peak_tflops is None else config.train.peak_tflops * 1e12
        if self.peak is None and world.device.type == "cuda":
            self.peak = peak_flops(torch.cuda.get_device_name(world.device))
        self._warned: dict[str, int] = {}  # step of the last warning of a kind
        self.losses, self.gradients = SpikeWatch(least=1.5), SpikeWatch(least=3)
        self.speed, self.interface = SpeedWatch(), InterfaceWatch()
        self._shapes: list[torch.Size] = []
        self._pending: list[tuple[PartLatents, Tensor, Tensor]] = []
        self._by_budget: dict[float, list[float]] = {}
        self._started, self._waited, self._flops = time.perf_counter(), 0.0, 0

    def watched(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches, with the time that each was waited for and its size noted."""
        iterator, started = iter(batches), time.perf_counter()
        for batch in iterator:
            self._waited += time.perf_counter() - started
            self._shapes.append(batch["images"].shape)
            yield batch
            started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done meanwhile: speed is of steps alone."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - started

    def after_step(
        self, step: int, latents: PartLatents, loss: Tensor, grad_norm: Tensor
    ) -> dict[str, float] | None:
        """Take note of a step; the values of a log line, where one is due.

        Loss and norm, the one before clipping, are this process's, on its device.
        """
        if self.cost is not None:
            for samples, _, *size in self._shapes:
                self._flops += step_flops(self.cost(tuple(size)), samples, latents)
        self._shapes.clear()
        self._pending.append((latents, loss, grad_norm))
        every = self.config.train.log_every
        is_due = every > 0 and step % every == 0
        if not is_due and len(self._pending) < MOST_PENDING:
            return None
        last_loss, last_norm = self._judge(step)
        if not is_due:
            return None
        values = {"loss": last_loss, "grad_norm": last_norm, **self._measure(step)}
        # A step that a scaler skips has no finite norm, and JSON no infinity.
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _judge(self, step: int) -> tuple[float, float]:
        """Fetch what is pending and look for spikes; the last loss and norm."""
        latents = [of_step for of_step, _, _ in self._pending]
        pairs = torch.stack([torch.stack((a.float(), b.float())) for _, a, b in self._pending])
        losses, norms = self.world.mean(pairs).T.tolist()
        self._pending.clear()
        first = step - len(latents) + 1
        clipped = f"it was clipped to {self.config.optimizer.clip:g}; if they come often, "
        for kind, what, watch, values, advice in (
            ("loss", "loss", self.losses, losses,
             "a single one passes, more of them call for a lower optimizer.lr"),
            ("gradient", "gradient norm", self.gradients, norms,
             f"{clipped}lower optimizer.lr or optimizer.clip"),
        ):  # fmt: skip
            for spike in watch.update(latents, values):
                at, message = (
                    first + spike.at,
                    spike_message(what, spike, latents[spike.at], advice),
                )
                self.warn(kind, at, f"{message}{describe_rows(self.rows_of(at - 1))}")
        if self.model.is_elastic:
            for of_step, loss in zip(latents, losses, strict=True):
                if len(of_step) == 1 and of_step[0] is not None:
                    bucket = 0.5 ** math.floor(-math.log2(self.model.budget_of(of_step[0])) + 1e-9)
                    self._by_budget.setdefault(bucket, []).append(loss)
        return losses[-1], norms[-1]

    def _measure(self, step: int) -> dict[str, float]:
        """Speed, cost and memory since the last line."""
        now = time.perf_counter()
        seconds, batch_size = max(now - self._started, 1e-9), self.config.data.batch_size
        images, flops, waited = (step - self.since) * batch_size, self._flops, self._waited
        self.since, self._started, self._waited, self._flops = step, now, 0.0, 0
        values = {
            "images_per_second": images / seconds,
            "epoch": step * batch_size / len(self.dataset),
        }
        if flops:
            values["tflops_per_second"] = flops / seconds / 1e12
            if self.peak is not None:
                values["mfu"] = flops / seconds / self.peak
        values["data_wait"] = waited / seconds
        memory = peak_memory(self.world.device)
        if memory is not None:
            values["memory_gb"] = memory / 1e9
        for budget, losses in sorted(self._by_budget.items(), reverse=True):
            values[f"loss_at/{format_budget(budget)}"] = fmean(losses)
        self._by_budget.clear()
        for kind, message in self.speed.update(seconds, waited, images, flops).items():
            self.warn(kind, step, message)
        return values

    def after_validation(
        self,
        step: int,
        losses: dict[int | None, Tensor],
        seen: dict[int, dict[str, float]],
        worth: dict[str, float],
    ) -> dict[str, float]:
        """The values of a validation's log line; warnings of what looks wrong there.

        They come from `validation_losses`, from `watch_interface` and from `worth_of_parts`.
        """

        def name(of: str, num_latents: int | None) -> str:
            return f"validation/{of}_{format_budget(self.model.budget_of(num_latents))}"

        means = {name("loss", n): of.mean().item() for n, of in losses.items()}
        for kind, message in self.interface.update(seen, list(means.values()), worth).items():
            if step > self.config.optimizer.warmup_steps:  # before, nothing has been learned yet
                self.warn(kind, step, message)
        for message in budgets_out_of_order(losses) if self.world.is_main else ():
            logger.warning("step %d: %s", step, message)
        inside = {name(key, n): value for n, of in seen.items() for key, value in of.items()}
        return means | {f"validation/worth_of_{part}": v for part, v in worth.items()} | inside

    def blamed_rows(self, step: int) -> str:
        """The rows of a step of this process that are not finite, or its first, for an error."""
        rows = self.rows_of(step - 1)
        images = ((row, self.dataset.batch([row])["images"]) for row in rows)
        return describe_rows(rows, [row for row, image in images if not image.isfinite().all()])

    def warn(self, kind: str, step: int, message: str) -> None:
        """Log a warning, unless one of its kind came in the last `REPEAT_AFTER` steps."""
        if self.world.is_main and step - self._warned.get(kind, -REPEAT_AFTER) >= REPEAT_AFTER:
            self._warned[kind] = step
            logger.warning("step %d: %s", step, message)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes so far: allocated on a CUDA device, else resident; None where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
