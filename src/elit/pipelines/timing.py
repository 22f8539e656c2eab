"""What the calls of a pipeline's model take on this device, measured once and kept."""

import logging
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from elit._devices import synchronize
from elit._files import cache_folder, digest_of, write_json
from elit._plain import from_plain, read_json
from elit.flow.guidance import CFG, CheapCFG, Forwards, Guidance

if TYPE_CHECKING:
    from elit.pipelines.base import ElasticPipeline

logger = logging.getLogger(__name__)

_SHORT, _LONG = 1, 4  # steps of the two runs whose difference is timed
_ROUNDS = 3  # their median counts: other programs disturb single ones


def device_name(device: torch.device) -> str:
    """What tells this device from another one."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    here = platform.processor() or platform.machine()
    if device.type == "cpu":
        return f"{here}, {torch.get_num_threads()} threads"
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
        wanted: labels or texts of a batch: the longest text counts.
        size: frames, height and width in pixels, None where the model was made for it.
        keep: whether to read and write the file.
        progress: whether to show a bar while measuring.
    """

    def __init__(
        self,
        pipeline: "ElasticPipeline",
        wanted: Sequence[Any],
        size: tuple[int | None, int | None, int | None] = (None, None, None),
        keep: bool = True,
        progress: bool = False,
    ):
        self.pipeline, self.wanted, self.size = pipeline, list(wanted), size
        self.batch_size = len(wanted)
        self.progress = progress
        model = pipeline.transformer
        if model.is_cache_enabled:
            raise ValueError("times are of a pipeline without a step cache; disable it first")
        key = {
            "model": describe(model),
            "vae": pipeline.vae and describe(pipeline.vae),
            "scheduler": describe(pipeline.scheduler),
            "compiled": any(
                hasattr(m, "_compiled_call_impl") and m._compiled_call_impl is not None
                for m in model.modules()
            ),
            "text_tokens": pipeline.check_prompt(self.wanted) if model.takes_text else None,
            "device": device_name(model.device),
            "dtype": str(model.dtype),
            "size": list(size),
            "batch_size": self.batch_size,
            "torch": torch.__version__,
        }
        self.file = cache_folder() / "times" / f"{digest_of(key)}.json" if keep else None
        self.key = key
        self._seconds: dict[str, float] = {}
        if self.file is not None and self.file.exists():
            try:
                kept = read_json(self.file, "remove it")
                self._seconds = from_plain(dict[str, float], kept.get("seconds"))
            except (ValueError, OSError):
                logger.warning("%s is damaged; it is made anew", self.file)

    def ms_per_image(self, calls: Sequence[Forwards]) -> float:
        """Milliseconds for one image of a batch that is drawn by these calls."""
        self.measure(calls)
        seconds = self._seconds["start"] + sum(self._seconds[_name(call)] for call in calls)
        return 1000 * seconds / self.batch_size

    def decode_ms_per_image(self) -> float:
        """Milliseconds in which one image of a batch is decoded: the autoencoder's, if any."""
        if "decode" not in self._seconds:
            model = self.pipeline.transformer
            shape = (self.batch_size, model.in_channels, *self.pipeline.input_size(*self.size))
            samples = torch.zeros(shape, device=model.device)
            times = [self._timed(lambda: self.pipeline.decode(samples, "pt")) for _ in range(4)]
            self._keep({"decode": statistics.median(times[1:])})  # the first call is slow
        return 1000 * self._seconds["decode"] / self.batch_size

    def measure(self, calls: Iterable[Forwards]) -> None:
        """Measure those of the calls that are not known yet."""
        missing = {_name(call): call for call in calls if _name(call) not in self._seconds}
        if not missing:
            return
        logger.info(
            "timing %d kinds of calls, %d images at a time, on %s",
            len(missing), self.batch_size, self.key["device"],
        )  # fmt: skip
        config = getattr(self.pipeline, "_progress_bar_config", {})
        self.pipeline.set_progress_bar_config(disable=True)
        starts, slopes = [], {name: list[float]() for name in missing}
        try:
            for call in missing.values():
                self._run(call, _SHORT)  # the first call of a kind is slow
            rounds = [*missing.items()] * _ROUNDS  # a disturbance then hits all kinds alike
            for name, call in tqdm(rounds, desc="timing", disable=not self.progress):
                (short, few), (long, many) = self._run(call, _SHORT), self._run(call, _LONG)
                slopes[name].append((long - short) / (many - few))
                starts.append(short - slopes[name][-1] * few)
        finally:
            self.pipeline.set_progress_bar_config(**config)
        found = {name: max(0.0, statistics.median(times)) for name, times in slopes.items()}
        if "start" not in self._seconds:
            found["start"] = max(0.0, statistics.median(starts))
        self._keep(found)

    def _keep(self, found: dict[str, float]) -> None:
        self._seconds |= found
        if self.file is not None:
            write_json(self.file, {"of": self.key, "seconds": self._seconds})

    def _run(self, call: Forwards, steps: int) -> tuple[float, int]:
        """Seconds and calls of a run whose calls are all of one kind."""
        pipeline, model = self.pipeline, self.pipeline.transformer
        (latents, doubled), *guide = call
        guidance: Guidance | None = None
        if guide:
            guidance = CheapCFG(2.0, model.budget_of(guide[0][0]))
        elif doubled == 2:
            guidance = CFG(2.0)
        frames, height, width = self.size
        options: dict[str, Any] = {} if frames is None else {"num_frames": frames}
        generator = [torch.Generator().manual_seed(i) for i in range(self.batch_size)]

        def run() -> None:
            pipeline(
                self.wanted, budget=model.budget_of(latents),
                num_inference_steps=steps, guidance=guidance, generator=generator, height=height,
                width=width, output_type="latent", **options,
            )  # fmt: skip

        return self._timed(run), len(pipeline.scheduler.timesteps)

    def _timed(self, run: Callable[[], Any]) -> float:
        """Seconds that something takes on the pipeline's device."""
        device = self.pipeline.transformer.device
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - started


def _name(call: Forwards) -> str:
    """((16, 1), (4, 1)) -> '16x1+4x1'."""
    return "+".join(f"{latents}x{doubled}" for latents, doubled in call)
