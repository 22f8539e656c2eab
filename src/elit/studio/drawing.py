"""What the studio's page asks for, drawn: by a pipeline of ours, or a stock one with an interface.

Both drawers do the same four things: say what may be asked, turn a budget into latents, draw one
picture, and say what it cost.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elit.retrofit.elastic  # noqa: F401  # where diffusers finds the classes of retrofits
from elit._devices import pick_device, synchronize
from elit.flow.guidance import Guidance, make_guidance
from elit.inspection.inspector import in_raster_order
from elit.interface.attention_maps import attention_weights
from elit.interface.grid import TokenGrid
from elit.pipelines.base import ElasticPipeline
from elit.pipelines.budgets import draw_batch
from elit.pipelines.folder import OURS, check_draws_images, loading_error
from elit.pipelines.load import index_of, open_pipeline

Frames = list[Image.Image]
Reading = tuple[tuple[Tensor, Tensor], TokenGrid]  # queries and context of Read, its tokens


@dataclass(frozen=True)
class Ask:
    """What to draw, and how."""

    what: int | str  # a class label, or a prompt
    steps: int
    guidance: str  # one of the drawer's
    scale: float
    guide_budget: float | None  # of "ag" and "ccfg"; None is the lowest
    seed: int


@dataclass(frozen=True)
class Drawn:
    """A picture, or a clip's frames, and what is known of how it came about."""

    frames: Frames
    ms: float
    gflops: float
    attention: np.ndarray | None  # ([t,] h, w): where Read looked, 1 is as much as on average


class Drawer:
    """Draws with one pipeline on its device; `draw` is for one thread at a time."""

    guidances: tuple[str, ...]
    num_classes: int | None  # None of a model that draws texts

    def __init__(self, pipeline: Any, name: str):
        self.pipeline, self.name, self.model = pipeline, name, pipeline.transformer
        if not getattr(self.model, "is_elastic", False):
            raise ValueError(
                f"{name} holds a plain {type(self.model).__name__} without a latent interface: "
                f"there is no budget to choose; give an elastic model (elit-...), or `elasticize` "
                f"this one"
            )
        self.few_steps: int | None = getattr(pipeline, "few_steps", None)
        pipeline.set_progress_bar_config(disable=True)

    def draw(self, ask: Ask, num_latents: int) -> Drawn:
        """Draw at so many latents per group."""
        device, seen = self.model.device, list[Reading]()
        with self._watching(seen):
            synchronize(device)
            started = perf_counter()
            frames = self.run(ask, num_latents)
            synchronize(device)
            ms = 1000 * (perf_counter() - started)
        middle = self._attention(*seen[len(seen) // 2]) if seen else None
        return Drawn(frames, ms, self.gflops(ask, num_latents), middle)

    def run(self, ask: Ask, num_latents: int) -> Frames:
        """The picture's frames alone."""
        raise NotImplementedError

    def gflops(self, ask: Ask, num_latents: int) -> float:
        """GFLOPs of the picture's calls of the transformer, its autoencoder apart."""
        raise NotImplementedError

    def grid(self) -> TokenGrid:
        """The tokens of the call that runs."""
        raise NotImplementedError

    @contextmanager
    def _watching(self, seen: list[Reading]) -> Iterator[None]:
        """Keep what Read attends with in each call, if it attends at all: it costs no time."""
        if self._read is None:
            yield
            return
        handle = self._read.register_forward_pre_hook(
            lambda _, given: seen.append((given, self.grid()))
        )
        try:
            yield
        finally:
            handle.remove()

    @property
    def _read(self) -> Any:
        return getattr(getattr(self.model, "elit", self.model).read, "attention", None)

    def _attention(self, given: tuple[Tensor, Tensor], grid: TokenGrid) -> np.ndarray:
        return attention_map(attention_weights(self._read, *given), grid)


def attention_map(weights: Tensor, grid: TokenGrid) -> np.ndarray:
    """Where Read looked, ([t,] h, w): summed over its latents, 1 is as much as on average.

    Of weights (B * G, H, n, P), the mean over heads and over the batch: a picture and its guide.
    """
    looked = weights.mean(1).sum(1) * (weights.shape[3] / weights.shape[2])  # (B * G, P)
    looked = looked.unflatten(0, (-1, grid.num_groups)).mean(0)  # (G, P)
    return in_raster_order(looked.float().cpu(), grid).numpy()


class ElitDrawer(Drawer):
    """Of our own pipelines."""

    def __init__(self, pipeline: ElasticPipeline, name: str):
        super().__init__(pipeline, name)
        has_null = self.model.takes_text or self.model.config.num_classes
        self.guidances = ("none", "cfg", "ag", "ccfg") if has_null else ("none", "ag")
        self.num_classes = None if self.model.takes_text else self.model.config.num_classes

    def run(self, ask: Ask, num_latents: int) -> Frames:
        (image,) = draw_batch(
            self.pipeline, [ask.what], [ask.seed], num_latents=num_latents,
            num_inference_steps=ask.steps, guidance=self._guidance(ask),
        )  # fmt: skip
        return image if isinstance(image, list) else [image]

    def gflops(self, ask: Ask, num_latents: int) -> float:
        tokens = self.pipeline.check_prompt([ask.what, ""]) if self.num_classes is None else None
        cost = self.pipeline.forward_cost(text_tokens=tokens)
        budget = self.model.budget_of(num_latents)
        calls = self.pipeline.calls(budget, ask.steps, self._guidance(ask))
        return sum(cost.flops(n) * batches for call in calls for n, batches in call) / 1e9

    def grid(self) -> TokenGrid:
        return self.model.geometry.grid(self.model.sample_size)

    def _guidance(self, ask: Ask) -> Guidance | None:
        return make_guidance(ask.guidance, ask.scale, ask.guide_budget or "lowest")


class StockDrawer(Drawer):
    """Of diffusers' pipelines whose transformer was elasticized."""

    guidances = ("none", "cfg", "ccfg")

    def __init__(self, pipeline: Any, name: str):
        super().__init__(pipeline, name)
        self.takes = inspect.signature(type(pipeline).__call__).parameters
        if not {"class_labels", "prompt"} & self.takes.keys():
            kind = type(pipeline).__name__
            raise ValueError(f"a {kind} takes neither classes nor a prompt; the studio needs one")
        is_of_classes = "class_labels" in self.takes
        self.num_classes = self.model.config.num_embeds_ada_norm if is_of_classes else None
        self._per_step = cache(self._count)

    def run(self, ask: Ask, num_latents: int) -> Frames:
        scale = "true_cfg_scale" if "true_cfg_scale" in self.takes else "guidance_scale"
        given: dict[str, Any] = {scale: 1.0 if ask.guidance == "none" else ask.scale}
        if scale == "true_cfg_scale" and ask.guidance != "none":
            given["negative_prompt"] = ""
        what = {"class_labels": [ask.what]} if self.num_classes else {"prompt": ask.what}
        guide = None
        if ask.guidance == "ccfg":
            guide = ask.guide_budget or self.model.budget_of(self.model.min_latents)
        with self.model.at_budget(self.model.budget_of(num_latents), guide):
            drawn = self.pipeline(
                **what, **given, num_inference_steps=ask.steps, return_dict=False,
                generator=torch.Generator().manual_seed(ask.seed),
            )[0][0]  # fmt: skip
        return list(drawn) if isinstance(drawn, list) else [drawn]

    def gflops(self, ask: Ask, num_latents: int) -> float:
        return ask.steps * self._per_step(replace(ask, seed=0, steps=1), num_latents)

    def grid(self) -> TokenGrid:
        return self.model._elit_session.call.grid

    def _count(self, ask: Ask, num_latents: int) -> float:
        """GFLOPs of a step, counted by PyTorch: what two steps take beyond one."""
        counts = []
        for steps in (1, 2):
            # As matrix products: the counter misses what attention has of its own on a CPU.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                self.run(replace(ask, steps=steps), num_latents)
            counts.append(counter.get_total_flops() / 1e9)
        return counts[1] - counts[0]


def open_drawer(name: str, device: str = "auto", dtype: str = "fp32") -> Drawer:
    """The drawer of a folder, or of a name on the hub.

    Args:
        name: of a pipeline of ours, or of diffusers' with an elasticized transformer.
        device: "auto", or a name of torch.
        dtype: "fp32" or "bf16".
    """
    index = index_of(name)
    if index.get("_class_name") in OURS:
        ours = open_pipeline(name, device, dtype)
        check_draws_images(ours, name)
        return ElitDrawer(ours, name)
    from diffusers import DiffusionPipeline

    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, dtype=types[dtype])
    except (OSError, ValueError, AttributeError) as error:
        parts = [part for part, kind in index.items() if kind == [None, None]]
        absent = [part for part in parts if f"'{part}'" in str(error)]  # others are optional
        if absent:
            raise ValueError(
                f"{name} was saved without its {', '.join(absent)}; save the whole pipeline, which "
                f"draws pictures of texts"
            ) from error
        raise loading_error(name, error) from error
    if not hasattr(pipeline, "transformer"):
        raise ValueError(f"{name} holds a {type(pipeline).__name__}, which has no transformer")
    return StockDrawer(pipeline.to(pick_device(device, share=True)), name)
