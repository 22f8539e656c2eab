"""What the calls of a pipeline's model take on this device, measured once and kept."""

import logging
import platform
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from elit._devices import synchronize
from elit._files import cache_folder, digest_of, write_json
from elit._numbers import check_whole
from elit._plain import from_plain, read_json
from elit._tables import counted
from elit.choosing.points import OperatingPoint
from elit.flow.guidance import CFG, Forwards
from elit.networks.weights import checksum_of
from elit.pipelines.base import ElasticPipeline
from elit.pipelines.budgets import draw_batch

logger = logging.getLogger(__name__)

_SHORT, _LONG = 1, 4  # steps of the two runs whose difference is timed
_ROUNDS = 3  # their median counts: other programs disturb single ones
_BUSY = 1.5  # factor on times from which on a user is told
_told: set[Path] = set()  # files whose times are of another load, as was said


def device_name(device: torch.device) -> str:
    """What tells this device from another one."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    here = platform.processor() or platform.machine()
    if device.type == "cpu":
        return f"{here}, {counted(torch.get_num_threads(), 'thread')}"
    return f"{device.type} of {here}"


def describe(part: Any) -> dict[str, str]:
    """Class and settings of a part of a pipeline."""
    settings = {name: str(x) for name, x in part.config.items() if not name.startswith("_")}
    return {"class": type(part).__name__, **settings}


class CallTimes:
    """Times of a batch's calls of the model, by the forwards that each call makes.

    A run of N calls takes `start` and the times of its calls. Both are measured by runs of the
    pipeline itself, so that guidance and the scheduler's step are in them; what decodes is not.
    They are kept in a file for this model, device, dtype, size and batch.

    Args:
        pipeline: on its device, without a step cache.
        what: labels or texts of a batch, of which the longest counts, or their number.
        size: frames, height and width in pixels, None where the model was made for it.
        progress: whether to show a bar while measuring.
        anew: whether to measure all, and to keep nothing.
    """

    def __init__(
        self,
        pipeline: ElasticPipeline,
        what: int | str | Sequence[Any],
        size: Sequence[int | None] = (None, None, None),
        progress: bool = False,
        anew: bool = False,
    ):
        model = pipeline.transformer
        if isinstance(what, int):
            check_whole(what, "what", advice="labels, texts, or their number")
            what = ["" if model.takes_text else 0] * what
        what = [what] if isinstance(what, str) else what
        self.pipeline, self.what, self.size = pipeline, list(what), tuple(size)
        self.progress = progress
        if model.is_cache_enabled:
            raise ValueError("times are of a pipeline without a step cache; disable it first")
        self.key = {
            "model": describe(model),
            "vae": pipeline.vae and describe(pipeline.vae),
            "scheduler": describe(pipeline.scheduler),
            "compiled": any(m._compiled_call_impl is not None for m in model.modules()),
            "text_tokens": pipeline.check_prompt(self.what) if model.takes_text else None,
            "device": device_name(model.device),
            "dtype": str(model.dtype),
            "size": list(size),
            "batch_size": len(self.what),
            "torch": torch.__version__,
        }
        self.file = cache_folder() / "times" / f"{digest_of(self.key)}.json"
        self._seconds: dict[str, float] = {}
        self.keeps = not anew
        if self.keeps and self.file.exists():
            try:
                kept = read_json(self.file, "remove it")
                self._seconds = from_plain(dict[str, float], kept.get("seconds"))
            except (ValueError, OSError):
                logger.warning("%s is damaged; it is made anew", self.file)

    def ms_of_runs(self, runs: Sequence[Sequence[Forwards]]) -> list[float]:
        """Milliseconds for one image of a batch that each of these runs draws."""
        self.measure([(self, runs)])
        names = (["start", *map(_name, run)] for run in runs)
        return [1000 * sum(map(self._seconds.__getitem__, n)) / len(self.what) for n in names]

    def ms_of_points(self, points: Sequence[OperatingPoint]) -> list[float]:
        """Milliseconds for one image of a batch by each point.

        With a step cache they are the share that it leaves of a whole run. Which calls it skips
        depends on what is drawn: then it is this batch.
        """
        plain = [replace(point, cache=None) for point in points]
        runs = [self.pipeline.calls(**point.arguments(), size=self.size) for point in plain]
        ms = dict(zip(plain, self.ms_of_runs(runs), strict=True))
        names = {
            point: f"run {digest_of([point.to_dict(), *self._drawn])}"
            for point in points if point.cache is not None
        }  # fmt: skip
        shares: dict[OperatingPoint, list[float]] = {
            point: [] for point, name in names.items() if name not in self._seconds
        }
        with self._without_bar():
            for point in shares:
                self._draw(**point.arguments())  # the first of a kind is slow
            rounds = [*shares] * _ROUNDS
            for point in tqdm(rounds, desc="timing", disable=not (self.progress and rounds)):
                both = (p.arguments() for p in (point, replace(point, cache=None)))
                cached, whole = (self._timed(partial(self._draw, **given)) for given in both)
                shares[point].append(cached / whole)
        for point, found in shares.items():
            seconds = ms[replace(point, cache=None)] / 1000 * len(self.what)
            self._keep({names[point]: statistics.median(found) * seconds})
        for point, name in names.items():
            ms[point] = 1000 * self._seconds[name] / len(self.what)
        return [ms[point] for point in points]

    @cached_property
    def _drawn(self) -> list[Any]:
        """What a cache's skips depend on beside the point."""
        return [checksum_of(self.pipeline.transformer), list(map(str, self.what))]

    def decode_ms_per_image(self) -> float:
        """Milliseconds in which one image of a batch is decoded: the autoencoder's, if any."""
        if "decode" not in self._seconds:
            model = self.pipeline.transformer
            shape = len(self.what), model.in_channels, *self.pipeline.input_size(*self.size)
            samples = torch.zeros(shape, device=model.device)
            times = [self._timed(lambda: self.pipeline.decode(samples, "pt")) for _ in range(4)]
            self._keep({"decode": statistics.median(times[1:])})  # the first call is slow
        return 1000 * self._seconds["decode"] / len(self.what)

    @staticmethod
    def measure(several: Sequence[tuple["CallTimes", Sequence[Sequence[Forwards]]]]) -> None:
        """Measure those calls of the runs that are not known yet, of all models in turns.

        Beside them a call that is known: a busy device slows both alike, and what is new is kept
        as it would have been measured then.
        """
        missing = [
            (times, name, call)
            for times, runs in several
            for name, call in {_name(call): call for run in runs for call in run}.items()
            if name not in times._seconds
        ]
        if not missing:
            return
        first = several[0][0]
        anchors = {times: times._costliest() for times in dict.fromkeys(t for t, *_ in missing)}
        missing += [(times, name, _call(name)) for times, name in anchors.items() if name]
        logger.info(
            "timing %d kinds of calls, %d images at a time, on %s",
            len(missing), len(first.what), first.key["device"],
        )  # fmt: skip
        starts: dict[CallTimes, list[float]] = {times: [] for times, _, _ in missing}
        slopes: dict[tuple[CallTimes, str], list[float]] = {(t, name): [] for t, name, _ in missing}
        with ExitStack() as quiet:
            for times in starts:
                quiet.enter_context(times._without_bar())
            for times, _, call in missing:
                times._run(call, _SHORT)  # the first call of a kind is slow
            rounds = missing * _ROUNDS  # a disturbance then hits all kinds alike
            for times, name, call in tqdm(rounds, desc="timing", disable=not first.progress):
                (short, few), (long, many) = times._run(call, _SHORT), times._run(call, _LONG)
                slopes[times, name].append((long - short) / (many - few))
                starts[times].append(short - slopes[times, name][-1] * few)
        for times, start in starts.items():
            seconds = {
                name: max(0.0, statistics.median(slope))
                for (of, name), slope in slopes.items() if of is times
            }  # fmt: skip
            if "start" not in times._seconds:
                seconds["start"] = max(0.0, statistics.median(start))
            now, before = (of.get(anchors[times] or "", 0.0) for of in (seconds, times._seconds))
            faster = before / now if before and now else 1.0
            if not 1 / _BUSY < faster < _BUSY and times.file not in _told:
                _told.add(times.file)
                logger.warning(
                    "a call takes %.2g times as long as when %s was written, as whose times new "
                    "ones are kept; remove it to measure all anew", 1 / faster, times.file,
                )  # fmt: skip
            times._keep({name: faster * took for name, took in seconds.items()})

    def _costliest(self) -> str | None:
        """The call that takes most of those that are known."""
        calls = [name for name in self._seconds if re.fullmatch(r"((\d+|None)x\d+\+?)+", name)]
        return max(calls, key=self._seconds.__getitem__, default=None)

    @contextmanager
    def _without_bar(self) -> Iterator[None]:
        """Keep the pipeline from showing its own bar."""
        config = getattr(self.pipeline, "_progress_bar_config", {})
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            yield
        finally:
            self.pipeline.set_progress_bar_config(**config)

    def _keep(self, seconds: dict[str, float]) -> None:
        if not seconds:
            return
        self._seconds |= seconds
        if self.keeps:
            write_json(self.file, {"of": self.key, "seconds": self._seconds})

    def _run(self, call: Forwards, steps: int) -> tuple[float, int]:
        """Seconds and calls of a run whose calls are all of one kind."""
        pipeline = self.pipeline
        (latents, doubled), *guide = call
        options: dict[str, Any] = {"num_latents": latents}
        if guide:  # of more latents too, as a plan may have it
            several = len(pipeline.calls(num_inference_steps=steps, size=self.size))
            both = (pipeline.transformer.budget_of(n) for n in (latents, guide[0][0]))
            names = "budgets_of_steps", "guide_budgets_of_steps"
            options = {name: [b] * several for name, b in zip(names, both, strict=True)}
        guidance = CFG(2.0) if guide or doubled == 2 else None
        run = partial(self._draw, num_inference_steps=steps, guidance=guidance, **options)
        return self._timed(run), len(pipeline.scheduler.timesteps)

    def _draw(self, **options: Any) -> Any:
        frames, height, width = self.size
        return draw_batch(
            self.pipeline, self.what, range(len(self.what)), height=height, width=width,
            num_frames=frames, output_type="latent", **options,
        )  # fmt: skip

    def _timed(self, run: Callable[[], Any]) -> float:
        """Seconds that something takes on the pipeline's device."""
        device = self.pipeline.transformer.device
        synchronize(device)
        started = perf_counter()
        run()
        synchronize(device)
        return perf_counter() - started


def times_of(
    pipeline: ElasticPipeline, what: int | str | Sequence[Any], size: Sequence[int | None]
) -> CallTimes:
    """Times of calls, measured behind a bar where the pipeline shows one."""
    hidden = getattr(pipeline, "_progress_bar_config", {}).get("disable", False)
    return CallTimes(pipeline, what, size, progress=not hidden)


def ms_together(
    several: Sequence[tuple[CallTimes, Sequence[Sequence[Forwards]]]],
) -> list[list[float]]:
    """`ms_of_runs` of several models, measured in turns: what slows the device slows all alike."""
    CallTimes.measure(several)
    return [times.ms_of_runs(runs) for times, runs in several]


def _name(call: Forwards) -> str:
    """((16, 1), (4, 1)) -> '16x1+4x1'."""
    return "+".join(f"{latents}x{doubled}" for latents, doubled in call)


def _call(name: str) -> Forwards:
    """'16x1+4x1' -> ((16, 1), (4, 1))."""
    pairs = (one.split("x") for one in name.split("+"))
    return tuple((None if n == "None" else int(n), int(doubled)) for n, doubled in pairs)
