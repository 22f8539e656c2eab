"""What a run says of itself as it goes: speed, cost, memory, and warnings of what looks wrong."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from elit.cost.devices import peak_flops
from elit.cost.flops import cost_of, step_flops
from elit.data import ImageDataset
from elit.interface.budget import format_budget
from elit.training.config import TrainConfig
from elit.training.distributed import World
from elit.training.health import (
    InterfaceWatch,
    SpeedWatch,
    SpikeWatch,
    Warnings,
    describe_rows,
    gradient_message,
    loss_message,
)

MOST_PENDING = 100  # steps whose losses wait on the device

Kept = Sequence[int | None]  # latents per group of each part of a step's batches


class Monitor:
    """Counts what steps do, and gives the values of a log line when one is due.

    Losses stay on the device until then: nothing here makes a step wait.

    Args:
        config: of the run.
        world: of its processes: all of them call `after_step`.
        model: before it is wrapped.
        num_samples: size of the training data.
        step: that the run goes on from.
        rows_of: indices in the training data of a step of this process, for messages.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        model: Any,
        num_samples: int,
        step: int,
        rows_of: Callable[[int], Sequence[int]],
    ):
        self.config, self.world, self.num_samples, self.rows_of = (
            config,
            world,
            num_samples,
            rows_of,
        )
        self.model, self.since = model, step
        # By size of the input.
        self.cost = cache(partial(cost_of, model)) if config.retrofit.base is None else None
        self.peak = None if config.train.peak_tflops is None else config.train.peak_tflops * 1e12
        if self.peak is None and world.device.type == "cuda":
            self.peak = peak_flops(torch.cuda.get_device_name(world.device))
        self.warnings = Warnings()
        self.losses, self.gradients = SpikeWatch(least=1.5), SpikeWatch(least=3)
        self.speed, self.interface = SpeedWatch(), InterfaceWatch()
        self._shapes: list[torch.Size] = []
        self._pending: list[tuple[Kept, Tensor, Tensor]] = []
        self._by_budget: dict[float, list[float]] = {}
        self._started, self._waited, self._flops = time.perf_counter(), 0.0, 0

    def watched(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches, with the time that each was waited for and its size noted."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            self._shapes.append(batch["images"].shape)
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done meanwhile: speed is of steps alone."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - started

    def after_step(
        self, step: int, kept: Kept, loss: Tensor, grad_norm: Tensor
    ) -> dict[str, float] | None:
        """Take note of a step; the values of a log line, where one is due.

        Args:
            step: that was done.
            kept: latents per group of each part of its batches.
            loss: of this process, on its device, as is the norm.
            grad_norm: before clipping.
        """
        if self.cost is not None:
            for samples, _, *size in self._shapes:
                self._flops += step_flops(self.cost(tuple(size)), samples, kept)
        self._shapes.clear()
        self._pending.append((kept, loss, grad_norm))
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
        kept = [of_step[0] for of_step in self._pending]
        pairs = torch.stack([torch.stack((a.float(), b.float())) for _, a, b in self._pending])
        losses, norms = self.world.mean(pairs).T.tolist()
        self._pending.clear()
        first, clip = step - len(kept) + 1, self.config.optimizer.clip
        for spike in self.losses.update(kept, losses):
            i = spike.index
            message = loss_message(spike, kept[i], self._rows(first + i))
            self._warn("loss", first + i, message)
        for spike in self.gradients.update(kept, norms):
            i = spike.index
            message = gradient_message(spike, kept[i], clip, self._rows(first + i))
            self._warn("gradient", first + i, message)
        if self.model.is_elastic:
            for of_step, loss in zip(kept, losses, strict=True):
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
            "epoch": step * batch_size / self.num_samples,
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
            self._warn(kind, step, message)
        return values

    def after_validation(
        self,
        step: int,
        seen: dict[int, dict[str, float]],
        losses: Sequence[float],
        worth: dict[str, float],
    ) -> dict[str, float]:
        """The values of what `watch_interface` saw and of what the core is worth, and warnings of
        what looks wrong there.
        """
        for kind, message in self.interface.update(seen, losses, worth).items():
            if step > self.config.optimizer.warmup_steps:  # before, nothing has been learned yet
                self._warn(kind, step, message)
        return {f"validation/worth_of_{part}": value for part, value in worth.items()} | {
            f"validation/{name}_{format_budget(self.model.budget_of(num_latents))}": value
            for num_latents, values in seen.items()
            for name, value in values.items()
        }

    def blamed_rows(self, step: int, dataset: ImageDataset) -> str:
        """For an error: the rows of a step of this process that are not finite, or its first."""

        def is_broken(row: int) -> bool:
            return not dataset.batch([row])["images"].isfinite().all()

        return describe_rows(self.rows_of(step - 1), is_broken)

    def _warn(self, kind: str, step: int, message: str) -> None:
        if self.world.is_main:
            self.warnings.warn(kind, step, message)

    def _rows(self, step: int) -> str:
        """The rows of a step, for a message."""
        return describe_rows(self.rows_of(step - 1)) if self.world.is_main else ""


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
