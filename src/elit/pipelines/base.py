"""What our pipelines share: loading, budgets, a run from noise to images."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin  # its package wants transformers
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from safetensors import SafetensorError
from torch import Tensor

from elit._choices import check_choice
from elit._files import typed_path
from elit._numbers import is_real, is_whole, latent_frames
from elit._portable import CODE_NAME, Card, PortablePipeline, plain_index
from elit.cost.flops import cost_of
from elit.cost.formulas import ModelCost
from elit.flow.guidance import UNGUIDED, Budget, Condition, Forwards, Guidance, Latents
from elit.flow.sampling import Generators, sample
from elit.flow.schedulers import start_sampling
from elit.flow.words import DEFAULT_STEPS
from elit.interface.budget import check_num_latents
from elit.interface.fit import format_size
from elit.models.base import FEW_STEPS, LEARNED_GUIDANCE
from elit.models.elastic import ElasticMixin, by_budget
from elit.pipelines.arguments import (
    known_words,
    one_at_a_time,
    read_generators,
    read_guidance,
    repeat_each,
)
from elit.pipelines.autoencoder import (
    SamplesDivergedError,
    check_picture_size,
    check_usable,
    decode,
    has_time,
    spatial_scale,
    temporal_scale,
)
from elit.pipelines.cards import card_of
from elit.pipelines.folder import (
    OURS,
    check_parts,
    check_pipeline_folder,
    draws_images,
    loading_error,
)

logger = logging.getLogger(__name__)

MOST_TIMES = 256  # the size that a model was made for: beyond, a run would not end
MOST_MIXED = 2**16  # numbers of a batch's tokens: more are slower in one batch, on a CPU
EULER = ("FlowMatchEulerDiscreteScheduler", "FlowMatchUniformEulerScheduler")
TENSORS = ["samples", "latents"]  # that a step callback is given: two words for one
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
StepCallback = Callable[[Any, int, Tensor, dict], dict]


def check_sample_dtype(dtype: torch.dtype, device_type: str, scheduler: Any) -> None:
    """Raise a ValueError unless samples can be of this type, on a device such as "cuda"."""
    reason, use = "", "use torch.float32 or torch.float64; the model computes in its own dtype"
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        reason = "are not real numbers with a fraction"
    elif dtype.itemsize < torch.float32.itemsize:
        reason = "would lose what a step adds"
    elif dtype != torch.float32 and device_type == "mps":
        reason, use = "cannot be on mps", "use torch.float32, or pipeline.to('cpu')"
    elif dtype != torch.float32 and not getattr(scheduler, "any_dtype", False):
        reason = f"are rounded to float32 by a {type(scheduler).__name__}"
        use = "use a FlowMatchUniformEulerScheduler, or make_scheduler with heun or euler-maruyama"
    if reason:
        raise ValueError(f"samples in {dtype} {reason}; {use}")


class _Run:
    """A call of a pipeline while the sampler runs: what changes in it stands here alone.

    Step caches know the calls of the model by diffusers' names: the guided one, its guide, or both
    in one batch, and by where they are in the run.
    """

    def __init__(
        self, pipeline: Any, count: int, steps: int, mixes: bool,
        callback: StepCallback | None, names: Iterable[str],
    ):  # fmt: skip
        self.pipeline, self.count, self.steps, self.mixes = pipeline, count, steps, mixes
        self.callback, self.names = callback, names
        self.bar = pipeline.progress_bar(total=steps)
        self.dtype = pipeline.transformer.dtype  # diffusers walks through all modules for it
        self.begin(0)

    def begin(self, step: int) -> None:
        """Begin a step."""
        self.place = {"step_index": step, "num_inference_steps": self.steps}
        self.calls = iter(("cond", "uncond"))

    def predict(
        self, x: Tensor, sigma: float, condition: Condition, num_latents: Latents
    ) -> Tensor:
        """Velocities by the transformer, at one noise level for all samples."""
        model, names = self.pipeline.transformer, tuple(condition)
        name = "cond_uncond" if len(x) > self.count else next(self.calls)

        def call(num_latents: Latents, x: Tensor, *values: Tensor) -> Tensor:
            level = torch.full((len(x),), sigma, device=x.device)
            given: dict[str, Any] = dict(zip(names, values, strict=True))
            if num_latents is not None:
                given["num_latents"] = num_latents
            with model.cache_context(name, **self.place):
                return model(x.to(self.dtype), level, **given, return_dict=False)[0]

        rows = x, *condition.values()
        if self.mixes or model.tells_calls_apart:  # which refuses mixed budgets
            return call(num_latents, *rows)
        return by_budget(call, num_latents, *rows)

    def after_step(self, step: int, timestep: Tensor, samples: Tensor) -> Tensor:
        """Samples to go on from: the callback may give others."""
        self.begin(step + 1)
        self.bar.update()
        if self.callback is None:
            return samples
        given = dict.fromkeys(self.names, samples)
        changed = self.callback(self.pipeline, step, timestep, given)
        if not isinstance(changed, Mapping | None):
            raise ValueError(f"the step callback gave {changed!r:.60}; give a dict of tensors")
        check_callback(None, changed or ())
        others = [value for value in (changed or {}).values() if value is not samples]
        new = next(iter(others), samples)
        if not isinstance(new, Tensor) or (new.shape, new.dtype) != (samples.shape, samples.dtype):
            raise ValueError(
                f"the step callback gave samples {new!r:.60}; give a tensor of shape "
                f"{tuple(samples.shape)} and {samples.dtype}"
            )
        return new


def check_callback(callback: StepCallback | None, names: Iterable[str]) -> None:
    """Raise a ValueError unless a callback is one, of tensors that there are."""
    if not (callback is None or callable(callback)):
        raise ValueError(f"callback_on_step_end {callback!r:.60} is no function")
    if not isinstance(names, Sequence | Mapping) or isinstance(names, str):
        raise ValueError(f"{names!r:.60} are no names for the step callback; give a list of them")
    for name in names:
        check_choice(name, TENSORS, "tensor", " of the step callback")


def check_length(name: str, of_steps: Any, num_calls: int) -> None:
    """Raise a ValueError for what is given by calls of the model, but isn't one for each."""
    if of_steps is None or (isinstance(of_steps, list | tuple) and len(of_steps) == num_calls):
        return
    raise ValueError(
        f"{name} {of_steps!s:.60} are not for the {num_calls} calls of the model in this run; give "
        f"a list of one for each"
    )


class ElasticPipeline(PortablePipeline, DiffusionPipeline, SanaLoraLoaderMixin):
    """A pipeline whose transformer is one of ours.

    A subclass says what it draws, turns what a user wants drawn into conditions of the model, and
    calls `draw`. LoRA comes from diffusers' mixin for pipelines that have it in the transformer
    alone.
    """

    draws: str
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = TENSORS

    def __init__(self, transformer: Any, scheduler: Any, vae: Any, **others: Any):
        super().__init__()
        takes_text = getattr(transformer, "takes_text", False)
        draws = "texts" if takes_text else "classes"
        if draws != self.draws:
            raise ValueError(
                f"a {type(transformer).__name__} draws {draws}, not {self.draws}; "
                f"make an {OURS[takes_text]} of it"
            )
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, **others)
        if vae is not None:
            check_usable(type(vae).__name__, vae.config)
            if self.draws_clips and not has_time(vae):
                raise ValueError(
                    f"a {type(vae).__name__} is of images, the transformer draws clips; use the "
                    f"autoencoder that it was trained with"
                )
        self.image_processor = self.video_processor = VideoProcessor(vae_scale_factor=1)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Any:
        """Load a folder or a hub name as diffusers does, but refuse what doesn't fit.

        A missing, damaged or foreign checkpoint is a ValueError; no weight is ever left random.
        Weights are read from safetensors alone, unless `use_safetensors` says otherwise.
        """
        name = typed_path(pretrained_model_name_or_path)
        folder = check_pipeline_folder(name)
        if folder is not None:
            check_parts(folder, cls, kwargs)
        kwargs.setdefault("use_safetensors", True)
        try:
            pipeline = super().from_pretrained(name, **kwargs)
        except (AttributeError, OSError, TypeError, ValueError, SafetensorError) as error:
            raise loading_error(name, error) from error
        if not isinstance(pipeline.transformer, ElasticMixin):  # one from the hub
            kind = type(pipeline.transformer).__name__
            raise ValueError(f"{name} has a {kind}, which is no transformer of elit's")
        model = pipeline.transformer
        try:
            model.token_grid(torch.empty(1, model.in_channels, *model.sample_size, device="meta"))
        except ValueError as error:
            raise ValueError(f"{name}: sample_size of its transformer: {error}") from error
        return pipeline

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """An index as one without code: what diffusers would run of a folder is in this package."""
        return plain_index(super()._dict_from_json_file(json_file))

    def to_json_string(self) -> str:
        """The index, which names the folder's `pipeline.py` beside the class."""
        index = json.loads(super().to_json_string())
        if self.portable_name is not None:
            index["_class_name"] = [CODE_NAME, index["_class_name"]]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @property
    def portable_name(self) -> tuple[str, str] | None:  # type: ignore[override]
        """Module and name of its class, None of one that was derived elsewhere."""
        kind = type(self)
        is_elits = kind.__module__.startswith("elit.")
        return (kind.__module__, kind.__name__) if is_elits else None

    def model_card(self) -> Card:
        """What the model card tells."""
        return card_of(self)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Save as diffusers does, also a transformer that became elastic in the pipeline."""
        self.register_modules(transformer=self.transformer)
        return super().save_pretrained(typed_path(save_directory), *args, **kwargs)

    def load_lora_weights(
        self, source: Any, adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        """Load LoRA as diffusers does, or raise a ValueError where there is none for the model.

        Args:
            source: folder, file, name on the hub or state dict that `save_lora_weights` wrote.
            adapter_name: for `set_adapters`.
            **kwargs: as diffusers' pipelines take them.
        """
        model = self.transformer
        before = len(getattr(model, "peft_config", {}))
        super().load_lora_weights(source, adapter_name=adapter_name, **kwargs)
        if len(getattr(model, "peft_config", {})) == before and not kwargs.get("hotswap"):
            raise ValueError(
                "there is no LoRA of a transformer: its tensors are named transformer.*; one that "
                "model.save_lora_adapter wrote goes to model.load_lora_adapter(folder, prefix=None)"
            )

    @known_words
    @one_at_a_time
    @torch.no_grad()
    def draw(
        self,
        condition: Condition,
        null_condition: Condition,
        budget: float | str | Sequence[float | str] = 1.0,
        num_inference_steps: int | None = None,
        guidance: Guidance | str | None = None,
        generator: Generators = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        sigmas: Sequence[float] | None = None,
        noise: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("samples",),
        dtype: torch.dtype = torch.float32,
        num_latents: int | Sequence[int] | None = None,
        budgets_of_steps: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guide_budget: Budget | None = None,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int | None = None,
        latents: Tensor | None = None,
        guide_budgets_of_steps: Sequence[float | None] | None = None,
        step_cache: Any | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw an image for each row of the condition; threads wait for each other.

        Args:
            condition: the model's arguments that say what to draw, (B, ...) each.
            null_condition: the same of nothing in particular, for guidance.
            budget: fraction of the latents to keep, in (0, 1], such as 0.25, "1/4" or "25%", or
                one for each image.
            num_inference_steps: steps of the scheduler; None is `default_steps`.
            guidance: `CFG(3.0)`, `AutoGuidance(2.0)`, `CheapCFG(3.0)`, or "cfg", "ag", "ccfg" with
                `guidance_scale`; None is no guidance.
            generator: one for each image: an image then depends on its own generator alone,
                not on the batch that it is drawn in. A single one draws for the whole batch.
            height: of the images, in pixels; by default what the model was made for.
            width: likewise.
            num_frames: of clips, likewise.
            sigmas: noise levels to use instead of the scheduler's own.
            noise: (B, C, h, w) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or
                "latent": what the transformer gave, before any VAE. A clip is a list of
                frames, (B, T, H, W, C) or (B, T, C, H, W).
            return_dict: whether to wrap the images in an ImagePipelineOutput.
            callback_on_step_end: called after each of the scheduler's steps (Heun has two for
                each of `num_inference_steps`) with (pipeline, step, timestep, {name: tensor});
                may return {"samples": tensor} to go on from.
            callback_on_step_end_tensor_inputs: names that the callback is given.
            dtype: of the samples between the steps, torch.float32 or torch.double.
            num_latents: latents per group, or one for each image, instead of a budget.
            budgets_of_steps: one budget for each call of the model, instead of a budget.
            guidance_scale: of a guidance that is given by name; alone it is CFG's.
            guide_budget: of "ag" and "ccfg", likewise; by default the lowest trained.
            seed: instead of a generator: image i draws from seed + i, or from its own of a list.
            num_images_per_prompt: images of each row of the condition, one after the other.
            latents: diffusers' word for `noise`.
            guide_budgets_of_steps: the guide's budget in each call of the model, None where there
                is to be no guide; for CFG, whose guide has no budget of its own.
            step_cache: a FirstBlockCacheConfig, MagCacheConfig or TeaCacheConfig that is on in this
                run alone.
        """
        condition = repeat_each(condition, num_images_per_prompt)
        null_condition = repeat_each(null_condition, num_images_per_prompt)
        count = len(next(iter(condition.values())))
        guidance = read_guidance(guidance, guidance_scale, guide_budget)
        generator = read_generators(generator, seed, count)
        output_type = "np" if output_type == "numpy" else output_type
        if latents is not None:
            if noise is not None:
                raise ValueError(
                    "latents are diffusers' word for the noise to start from; give one"
                )
            noise = latents
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_sample_dtype(dtype, self._execution_device.type, self.scheduler)
        size = self.input_size(num_frames, height, width)
        self._check_output(output_type, size)
        levels = self.start(num_inference_steps, self._execution_device, sigmas, size)
        self._tell_few_steps(len(levels), sigmas, guidance)
        x = self._noise(noise, generator, (count, self.transformer.in_channels, *size), dtype)
        kept = self.latents_of_steps(
            budget, len(levels), guidance, num_latents, budgets_of_steps, count,
            guide_budgets_of_steps,
        )  # fmt: skip
        with self.transformer.cached(step_cache):
            self.transformer._reset_stateful_cache()  # a run that broke off may have left something
            mixes = self.mixes_budgets(2 * count if guidance else count, size)
            after_steps = callback_on_step_end, callback_on_step_end_tensor_inputs
            run = _Run(self, count, len(levels), mixes, *after_steps)
            with run.bar:
                x = sample(
                    run.predict, x, self.scheduler, guidance, kept, condition, null_condition,
                    generator, run.after_step, mixes,
                )  # fmt: skip
        if not x.isfinite().all():
            guided = f"a smaller guidance scale than {guidance.scale:g}, " if guidance else ""
            raise SamplesDivergedError(
                f"the samples are no longer finite; {guided}more steps or dtype float32 may help, "
                f"if the weights themselves are sound"
            )
        images = self.decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @one_at_a_time
    def calls(
        self,
        budget: float | str = 1.0,
        num_inference_steps: int | None = None,
        guidance: Guidance | None = None,
        sigmas: Sequence[float] | None = None,
        budgets_of_steps: Sequence[float] | None = None,
        guide_budgets_of_steps: Sequence[float | None] | None = None,
        size: Sequence[int | None] = (None, None, None),
    ) -> list[Forwards]:
        """Forwards of the model in each call of a run: latents per group, and batches in one.

        The size, frames, height and width in pixels, counts where the scheduler shifts by it.
        """
        levels = self.start(num_inference_steps, "cpu", sigmas, self.input_size(*size))
        kept = self.latents_of_steps(
            budget, len(levels), guidance, None, budgets_of_steps,
            guide_budgets_of_steps=guide_budgets_of_steps,
        )  # fmt: skip
        guidance = guidance or UNGUIDED
        calls = [guidance.forwards(level, *n) for level, n in zip(levels, kept, strict=True)]
        return cast(list[Forwards], calls)  # of one image

    def start(
        self,
        num_inference_steps: int | None,
        device: torch.device | str,
        sigmas: Sequence[float] | None = None,
        size: Sequence[int] | None = None,
    ) -> list[float]:
        """Begin a run: the noise level of each call of the model.

        Args:
            num_inference_steps: of the scheduler; None is `default_steps`.
            device: of the samples.
            sigmas: levels to use instead of the scheduler's own.
            size: of the model's input; by default what it was made for.
        """
        steps = self.default_steps if num_inference_steps is None else num_inference_steps
        size, patch = size or self.transformer.sample_size, self.transformer.patch_size
        tokens = math.prod(n // p for n, p in zip(size, patch, strict=True))
        numbers = self.transformer.in_channels * math.prod(size)
        return start_sampling(self.scheduler, steps, device, sigmas, tokens, numbers)

    def latents_of_steps(
        self,
        budget: float | str | Sequence[float | str],
        num_calls: int,
        guidance: Guidance | None = None,
        num_latents: int | Sequence[int] | None = None,
        budgets_of_steps: Sequence[float] | None = None,
        count: int = 1,
        guide_budgets_of_steps: Sequence[float | None] | None = None,
    ) -> list[tuple[Latents, Latents]]:
        """Latents per group of the prediction and of its guide, for each call of the model.

        They are one number, or one for each of `count` images.
        """
        model = self.transformer
        if isinstance(budget, str) and budget in ("auto", "schedule"):
            raise ValueError(
                f"a pipeline chooses no budget, so budget={budget!r} is none; elit.choose and "
                f"elit.load_schedule do, whose arguments() go into the call"
            )
        choices = {
            "budget": None if is_real(budget) and budget == 1 else budget,
            "num_latents": num_latents,
            "budgets_of_steps": budgets_of_steps,
        }
        given = {name: value for name, value in choices.items() if value is not None}
        if len(given) > 1:
            raise ValueError(
                " and ".join(f"{n}={v!s:.60}" for n, v in given.items()) + "; give one"
            )
        if num_latents is not None and not model.is_elastic:
            raise ValueError(
                f"num_latents {num_latents} asked of a model that is not elastic; leave it out"
            )
        check_length("budgets_of_steps", budgets_of_steps, num_calls)
        kept: list[Latents]
        if budgets_of_steps is not None:
            kept = [model.resolve_budget(one) for one in budgets_of_steps]
        elif num_latents is not None:
            kept = [
                self._of_images(
                    num_latents, lambda n: check_num_latents(n, model.max_latents), count
                )
            ] * num_calls
        else:
            kept = [self._of_images(budget, model.resolve_budget, count)] * num_calls
        numbers = [n for one in kept for n in (one if isinstance(one, tuple) else (one,))]
        lowest = min(n or 0 for n in numbers) if model.is_elastic else None
        guides = self._guides_of_steps(kept, guidance, guide_budgets_of_steps)
        fewest = {"budget": lowest}
        if guides is not kept:
            fewest["guide budget"] = guide = min((n for n in guides if n), default=None)
            if guide is not None and guide > lowest and guide_budgets_of_steps is None:
                logger.warning(
                    "the guide keeps %d latents per group, more than the %d that it guides",
                    guide, lowest,
                )  # fmt: skip
            if guidance and not guidance.drop_label and guide in numbers:
                logger.warning("autoguidance has no effect where its guide has the same budget")
        for what, number in fewest.items():
            if number is not None and number < model.min_latents:
                logger.warning(
                    "%s %g keeps %d latents per group, but this model was trained with %d or more",
                    what, model.budget_of(number), number, model.min_latents,
                )  # fmt: skip
        return list(zip(kept, guides, strict=True))

    def _guides_of_steps(
        self,
        kept: list[Latents],
        guidance: Guidance | None,
        budgets: Sequence[float | None] | None,
    ) -> list[Any]:
        """Latents per group of the guide, for each call of the model; 0 is no guide."""
        model = self.transformer
        if budgets is not None:
            check_length("guide_budgets_of_steps", budgets, len(kept))
            if guidance is None or guidance.budget is not None:
                raise ValueError(
                    f"guide_budgets_of_steps with guidance {guidance}; give CFG, whose guide has "
                    f"no budget of its own"
                )
            return [0 if one is None else model.resolve_budget(one) for one in budgets]
        if guidance is None or guidance.budget is None:
            return kept
        if guidance.budget == "lowest":
            return [model.min_latents or None] * len(kept)
        return [model.resolve_budget(guidance.budget)] * len(kept)

    @staticmethod
    def _of_images(given: Any, resolve: Callable[[Any], int | None], count: int) -> Latents:
        """Latents per group of all images, or of each where they differ."""
        given = given.tolist() if isinstance(given, np.ndarray | Tensor) else given
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            return resolve(given)
        each = [resolve(one) for one in given]
        if len(each) != count:
            raise ValueError(
                f"{len(each)} budgets for {count} images; give one number, or one for each image; "
                f"one for each call of the model is budgets_of_steps="
            )
        return each[0] if len(set(each)) == 1 else tuple(each)  # type: ignore[arg-type]

    def mixes_budgets(self, rows: int, size: Sequence[int]) -> bool:
        """Whether so many samples of different budgets go in one batch, or one for each budget.

        Not where step caches know guide and guided by their calls, where each set of budgets would
        be compiled anew, nor in a batch that a CPU takes longer for: docs/sampling.md has its size.
        """
        model = self.transformer
        compiled = any(m._compiled_call_impl is not None for m in model.modules())
        if compiled or model.tells_calls_apart or getattr(model, "read", None) is None:
            return False
        tokens = math.prod(n // p for n, p in zip(size, model.patch_size, strict=True))
        numbers = rows * tokens * model.config.hidden_size
        return model.device.type != "cpu" or numbers <= MOST_MIXED

    @property
    def few_steps(self) -> int | None:
        """Euler steps that the transformer was trained to draw in; None are any."""
        return self.transformer.config.get(FEW_STEPS)

    @property
    def default_steps(self) -> int:
        """Steps of a run that doesn't say: 40, or those that the transformer was trained for."""
        return self.few_steps or DEFAULT_STEPS

    @property
    def learned_guidance(self) -> float | None:
        """Scale of the guidance that is in the transformer's velocity, if any."""
        return self.transformer.config.get(LEARNED_GUIDANCE)

    def _tell_few_steps(self, calls: int, sigmas: Any, guidance: Guidance | None) -> None:
        """Warn of what a model of few steps was not trained for."""
        few, learned = self.few_steps, self.learned_guidance
        is_euler = type(self.scheduler).__name__ in EULER and sigmas is None
        if few and not (is_euler and calls == few):
            logger.warning("this model was trained to draw in %d steps of the sampler euler", few)
        if learned and guidance is not None:
            logger.warning("this model has learned guidance of scale %g; draw without", learned)

    @property
    def draws_clips(self) -> bool:
        """Whether the transformer makes clips, not images."""
        return len(self.transformer.sample_size) == 3

    def _check_output(self, output_type: str, size: Sequence[int]) -> None:
        check_choice(output_type, OUTPUT_TYPES, "output_type")
        channels, scale = self.transformer.in_channels, spatial_scale(self.vae)
        if output_type == "latent":
            return
        if self.vae is not None:
            check_picture_size(self.vae, size[-2] * scale, size[-1] * scale)
        elif not draws_images(channels):
            raise ValueError(
                f"{channels} channels are no image: these are VAE latents; "
                f"make the pipeline with vae=..., or ask for output_type='latent'"
            )

    def input_size(
        self, num_frames: int | None, height: int | None, width: int | None
    ) -> tuple[int, ...]:
        """Size of the transformer's input, (h, w) or (t, h, w), for pixels and frames asked for."""
        made_for, scale = self.transformer.sample_size, spatial_scale(self.vae)
        if not self.draws_clips and num_frames is not None:
            raise ValueError(f"num_frames={num_frames} asked of a model of images; leave it out")
        for side in (num_frames, height, width):
            if not (side is None or is_whole(side)):
                raise ValueError(f"a side of {side!r} is no positive integer")
        for side in (height, width):
            if side is not None and side % scale:
                raise ValueError(
                    f"an image side of {side} pixels is not a multiple of {scale}, "
                    f"the VAE's scale; use {-(-side // scale) * scale}"
                )
        asked = [side and side // scale for side in (height, width)]
        if self.draws_clips:
            length = num_frames and latent_frames(num_frames, temporal_scale(self.vae))
            asked = [length, *asked]
        size = tuple(side or default for side, default in zip(asked, made_for, strict=True))
        if math.prod(size) > MOST_TIMES * math.prod(made_for):
            raise ValueError(
                f"an input of {format_size(size)} is more than {MOST_TIMES} times "
                f"what this model was made for, {format_size(made_for)}; ask for a smaller size"
            )
        return size

    def forward_cost(
        self,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        text_tokens: int | None = None,
    ) -> ModelCost:
        """Cost of a forward at a size in frames and pixels; `.flops(num_latents)` is of a sample.

        By default the size is what the model was made for, and texts are as long as it takes.
        """
        return cost_of(self.transformer, self.input_size(num_frames, height, width), text_tokens)

    def pixel_size(self) -> tuple[int, ...]:
        """Height and width, or frames, height and width, that the model was made for."""
        *frames, height, width = self.transformer.sample_size
        frames = [(length - 1) * temporal_scale(self.vae) + 1 for length in frames]
        scale = spatial_scale(self.vae)
        return (*frames, height * scale, width * scale)

    def _noise(
        self,
        noise: Tensor | None,
        generator: Generators,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        """Noise of a shape to start from; what is drawn is drawn in float32."""
        device = self._execution_device
        if noise is None:
            return randn_tensor(shape, generator, device, torch.float32).to(dtype)
        if not isinstance(noise, Tensor) or noise.shape != shape:
            found = tuple(noise.shape) if isinstance(noise, Tensor) else f"{noise!r:.60}"
            raise ValueError(f"noise {found} does not fit; give a tensor of shape {shape}")
        if not noise.is_floating_point():
            raise ValueError(f"noise of {noise.dtype} is none; give floats, as torch.randn does")
        return noise.to(device, dtype)

    @torch.no_grad()
    def decode(self, samples: Tensor, output_type: str) -> Any:
        """What `output_type` asks for, of samples (B, C, h, w) as "latent" gives them."""
        if output_type == "latent":
            return samples
        if self.vae is not None:
            samples = decode(self.vae, samples)
        if self.draws_clips:  # (B, C, T, H, W)
            return self.video_processor.postprocess_video(samples.float(), output_type)
        return self.image_processor.postprocess(samples.float(), output_type=output_type)
