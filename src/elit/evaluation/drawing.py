"""Draw the samples of an evaluation: sample i is the same on any number of devices."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from elit._devices import synchronize
from elit.caching.step_cache import StepCache
from elit.choosing.points import OperatingPoint
from elit.cost.flops import skipped_flops
from elit.cost.formulas import ModelCost
from elit.evaluation.images import to_bytes
from elit.evaluation.parts import batches
from elit.evaluation.reference import image_features
from elit.flow.guidance import Forwards
from elit.networks.feature_network import FeatureNetwork
from elit.pipelines.base import ElasticPipeline
from elit.pipelines.budgets import draw_batch

SHOWN = 16  # samples that are kept as images, for sheets


@dataclass(frozen=True)
class Drawing:
    """What is drawn, and by whose eyes it is seen, whatever the operating point.

    Sample i has a generator of its own, seeded by seed + i, and the label i modulo the number of
    classes (of fewer samples than classes, evenly chosen classes), or a text in the same way.
    """

    pipeline: ElasticPipeline  # on its device
    networks: Sequence[FeatureNetwork]  # that see each sample
    count: int  # samples
    seed: int = 0  # of the first
    batch_size: int = 32  # samples drawn at once
    texts: Sequence[str] = ()  # of a model that draws texts
    # height and width in pixels; None is what the model was made for
    size: tuple[int, int] | None = None
    frames: int | None = None  # of clips; likewise
    keep_images: bool = False  # whether to keep all samples as images; else the first SHOWN

    def __post_init__(self) -> None:
        takes_text = self.pipeline.transformer.takes_text
        if takes_text and not self.texts:
            raise ValueError("this model draws texts; give prompts, or a reference with captions")
        if self.texts and not takes_text:
            raise ValueError("this model draws classes; leave prompts out")
        if not takes_text and (names := [n.name for n in self.networks if n.takes == "texts"]):
            raise ValueError(f"{names[0]} compares images with texts; this model draws classes")

    def wanted(self, number: int) -> Any:
        """Label or text of a sample."""
        if self.texts:
            return self.texts[number % len(self.texts)]
        classes = self.pipeline.transformer.config.num_classes
        return number % classes if self.count >= classes else number * classes // self.count

    def image_shape(self) -> tuple[int, ...]:
        """Shape (3, H, W) of the pictures, of clips (3, T, H, W)."""
        *frames, height, width = self.pipeline.pixel_size()
        height, width = self.size or (height, width)
        return (3, *([self.frames or frames[0]] if frames else []), height, width)

    @property
    def place(self) -> tuple[int | None, int | None, int | None]:
        """Frames, height and width, None where the model was made for it."""
        return self.frames, *(self.size or (None, None))

    @cached_property
    def text_tokens(self) -> int | None:
        """Length of the longest text, of a model that draws texts."""
        pipeline: Any = self.pipeline
        return pipeline.check_prompt(list(self.texts)) if self.texts else None

    @cached_property
    def cost(self) -> ModelCost:
        """Of a forward at the size and the text length drawn."""
        return self.pipeline.forward_cost(*self.place, self.text_tokens)

    def calls(self, point: OperatingPoint) -> list[Forwards]:
        """Forwards of each call of a run, as without a cache."""
        return self.pipeline.calls(**replace(point, cache=None).arguments(), size=self.place)

    def flops(self, point: OperatingPoint) -> int:
        """Of one image, guides included, the VAE's apart; a multiply-add counts as 2.

        As without a cache: what one left out is known when samples are drawn.
        """
        return sum(self.cost.flops(n) * times for call in self.calls(point) for n, times in call)

    @cached_property
    def skipped_flops(self) -> Callable[[StepCache, int | None], int]:
        """Of a forward that a step cache skips, by the latents per group."""
        model, size = self.pipeline.transformer, self.pipeline.input_size(*self.place)
        return cache(lambda of, n: skipped_flops(model, of, n, size, self.text_tokens))

    def draw(self, point: OperatingPoint, samples: Sequence[int]) -> dict[str, Tensor]:
        """Features of some samples, their labels, pictures and the seconds that each took.

        Returns:
            "network.output": (n, d), "labels": (n,), "seconds" and "decode_seconds": (n,),
            "images": (n or fewer, C, H, W) uint8; with a step cache "flops", that were really
            done, and "skipped", the share of forwards that it skipped: (n,).
        """
        found: dict[str, list[Tensor]] = {}
        for batch in batches(samples, self.batch_size):
            drawn = self._batch(point, batch)
            pictures = drawn["images"]
            for network in self.networks:
                drawn |= image_features(network, pictures)
                if network.takes == "texts":
                    texts = network.text_features([self.wanted(i) for i in batch]).float().cpu()
                    frames = len(drawn[f"{network.name}.pool"]) // len(batch)
                    drawn[f"{network.name}.text"] = texts.repeat_interleave(frames, dim=0)
            kept = len(batch) if self.keep_images else max(0, min(SHOWN - batch[0], len(batch)))
            drawn["images"] = pictures[:kept]
            for name, tensor in drawn.items():
                found.setdefault(name, []).append(tensor)
        return {name: torch.cat(tensors) for name, tensors in found.items()}

    def warm_up(self, point: OperatingPoint) -> None:
        """Draw a batch in few steps, guide and all: the first call of a process is slow."""
        budget = max(point.budgets_of_steps or (point.budget,))
        alike: dict[str, Any] = {"budgets_of_steps": None, "guide_budgets_of_steps": None}
        steps = self.pipeline.few_steps or 1
        first = replace(point, steps=steps, interval=None, budget=budget, **alike)
        self._batch(first, range(min(self.count, self.batch_size)))

    def _batch(self, point: OperatingPoint, numbers: Sequence[int]) -> dict[str, Tensor]:
        pipeline = self.pipeline
        frames, height, width = self.place
        wanted = [self.wanted(number) for number in numbers]
        seeds = [self.seed + number for number in numbers]
        started = time.perf_counter()
        with ExitStack() as stack:
            made: list[Forward] = []
            if point.cache is not None:
                made = stack.enter_context(forwards_of(pipeline.transformer))
            latents = draw_batch(
                pipeline, wanted, seeds, **point.arguments(), height=height, width=width,
                num_frames=frames, output_type="latent",
            )  # fmt: skip
        synchronize(latents.device)
        drawn = time.perf_counter()
        pictures = pipeline.decode(latents, "pt")
        synchronize(pictures.device)
        decoded = time.perf_counter()
        if pictures.ndim == 5:  # (n, T, C, H, W)
            pictures = pictures.transpose(1, 2)
        share = torch.ones(len(numbers), dtype=torch.float64) / len(numbers)
        ran = {}
        if point.cache is not None:
            flops = sum(
                one.rows * (self.skipped_flops(point.cache, one.latents) if one.skipped
                            else self.cost.flops(one.latents))
                for one in made
            )  # fmt: skip
            skipped = sum(one.skipped for one in made) / len(made)
            ran = {"flops": share * flops, "skipped": torch.full_like(share, skipped)}
        labels = torch.tensor(wanted) if not self.texts else torch.full((len(numbers),), -1)
        return {
            "images": to_bytes(pictures).cpu(),
            "labels": labels,
            "seconds": share * (drawn - started),
            "decode_seconds": share * (decoded - drawn),
            **ran,
        }


@dataclass(frozen=True)
class Forward:
    """A forward of the model: latents per group, samples, whether a step cache skipped it."""

    latents: int | None
    rows: int
    skipped: bool


@contextmanager
def forwards_of(model: Any) -> Iterator[list[Forward]]:
    """The forwards that a model makes meanwhile, whose step cache, if any, is put on meanwhile."""
    made: list[Forward] = []

    def note(module: Any, args: tuple, kwargs: dict[str, Any], _output: Any) -> None:
        before = sum(one.skipped for one in made)
        skipped = module.cache_counts()[1] > before
        made.append(Forward(kwargs.get("num_latents"), len(args[0]), skipped))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield made
    finally:
        handle.remove()
