"""What our pipelines share: loading, budgets, a run from noise to images."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from safetensors import SafetensorError
from torch import Tensor

from elit._choices import check_choice
from elit._files import typed_path
from elit._numbers import is_whole, latent_frames
from elit.cost.flops import cost_of
from elit.cost.formulas import ModelCost
from elit.flow.guidance import UNGUIDED, Condition, Forwards, Guidance
from elit.flow.sampling import Generators, sample
from elit.flow.schedulers import start_sampling
from elit.flow.words import DEFAULT_STEPS
from elit.interface.budget import check_num_latents
from elit.interface.fit import format_size
from elit.models.elastic import ElasticMixin
from elit.pipelines.autoencoder import (
    SamplesDivergedError,
    check_usable,
    decode,
    has_time,
    spatial_scale,
    temporal_scale,
)
from elit.pipelines.folder import (
    OURS,
    check_parts,
    check_pipeline_folder,
    draws_images,
    loading_error,
)

logger = logging.getLogger(__name__)

MOST_TIMES = 256  # the size that a model was made for: beyond, a run would not end
TENSORS = ["samples"]  # that a step callback is given
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
        self, pipeline: Any, count: int, steps: int, callback: StepCallback | None,
        names: Iterable[str],
    ):  # fmt: skip
        self.pipeline, self.count, self.steps = pipeline, count, steps
        self.callback, self.names = callback, names
        self.bar = pipeline.progress_bar(total=steps)
        self.begin(0)

    def begin(self, step: int) -> None:
        """Begin a step."""
        self.place = {"step_index": step, "num_inference_steps": self.steps}
        self.calls = iter(("cond", "uncond"))

    def predict(
        self, x: Tensor, sigma: float, condition: Condition, num_latents: int | None
    ) -> Tensor:
        """Velocities by the transformer, at one noise level and one budget for all samples."""
        model = self.pipeline.transformer
        name = "cond_uncond" if len(x) > self.count else next(self.calls)
        level = torch.full((len(x),), sigma, device=x.device)
        kept = {} if num_latents is None else {"num_latents": num_latents}
        with model.cache_context(name, **self.place):
            return model(x.to(model.dtype), level, **condition, **kept, return_dict=False)[0]

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
        new = (changed or {}).get("samples", samples)
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
    if not isinstance(names, Iterable) or isinstance(names, str):
        raise ValueError(f"{names!r} are no names for the step callback; give a list of them")
    for name in names:
        check_choice(name, TENSORS, "tensor", " of the step callback")


class ElasticPipeline(DiffusionPipeline):
    """A pipeline whose transformer is one of ours.

    A subclass says what it draws, turns what a user wants drawn into conditions of the model, and
    calls `draw`.
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
        except (OSError, TypeError, ValueError, SafetensorError) as error:
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

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save as diffusers does, also a transformer that became elastic in the pipeline."""
        self.register_modules(transformer=self.transformer)
        super().save_pretrained(typed_path(save_directory), **kwargs)

    @torch.no_grad()
    def draw(
        self,
        condition: Condition,
        null_condition: Condition,
        budget: float | Sequence[float] = 1.0,
        num_inference_steps: int | None = None,
        guidance: Guidance | None = None,
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
    ) -> ImagePipelineOutput | tuple:
        """Draw an image for each row of the condition.

        Args:
            condition: the model's arguments that say what to draw, (B, ...) each.
            null_condition: the same of nothing in particular, for guidance.
            budget: fraction of the latents to keep, in (0, 1], or one for each call of the model.
            num_inference_steps: steps of the scheduler; None is 40.
            guidance: `CFG(3.0)`, `AutoGuidance(2.0)`, `CheapCFG(3.0)`; None is no guidance.
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
            num_latents: latents per group, or one for each call of the model, instead of a budget.
        """
        generator = list(generator) if isinstance(generator, Sequence) else generator
        count = len(next(iter(condition.values())))
        self._check_options(guidance, generator, count, output_type)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_sample_dtype(dtype, self._execution_device.type, self.scheduler)
        size = self.input_size(num_frames, height, width)
        levels = self.start(num_inference_steps, self._execution_device, sigmas, size)
        x = self._noise(noise, generator, (count, self.transformer.in_channels, *size), dtype)
        kept = self.latents_of_steps(budget, len(levels), guidance, num_latents)
        self.transformer._reset_stateful_cache()  # a run that broke off may have left something
        run = _Run(
            self, count, len(levels), callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        with run.bar:
            x = sample(
                run.predict, x, self.scheduler, guidance, kept, condition, null_condition,
                generator, run.after_step,
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

    def calls(
        self,
        budget: float | Sequence[float] = 1.0,
        num_inference_steps: int | None = None,
        guidance: Guidance | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> list[Forwards]:
        """Forwards of the model in each call of a run: latents per group, and batches in one."""
        levels = self.start(num_inference_steps, "cpu", sigmas)
        kept = self.latents_of_steps(budget, len(levels), guidance)
        guidance = guidance or UNGUIDED
        return [guidance.forwards(level, *n) for level, n in zip(levels, kept, strict=True)]

    def start(
        self,
        num_inference_steps: int | None,
        device: torch.device | str,
        sigmas: Sequence[float] | None = None,
        size: Sequence[int] | None = None,
    ) -> list[float]:
        """Begin a run: the noise level of each call of the model.

        Args:
            num_inference_steps: of the scheduler; None is 40.
            device: of the samples.
            sigmas: levels to use instead of the scheduler's own.
            size: of the model's input; by default what it was made for.
        """
        steps = DEFAULT_STEPS if num_inference_steps is None else num_inference_steps
        size, patch = size or self.transformer.sample_size, self.transformer.patch_size
        tokens = math.prod(n // p for n, p in zip(size, patch, strict=True))
        return start_sampling(self.scheduler, steps, device, sigmas, tokens)

    def latents_of_steps(
        self,
        budget: float | Sequence[float],
        num_calls: int,
        guidance: Guidance | None = None,
        num_latents: int | Sequence[int] | None = None,
    ) -> list[tuple[int | None, int | None]]:
        """Latents per group of the prediction and of its guide, for each call of the model."""
        model = self.transformer
        if num_latents is not None and budget != 1:
            raise ValueError(f"num_latents={num_latents} and budget={budget!s:.60}; give one")
        given: Any = budget if num_latents is None else num_latents
        is_list = isinstance(given, Sequence) and not isinstance(given, str)
        each = list(given) if is_list else [given] * num_calls
        if len(each) != num_calls:
            raise ValueError(
                f"{len(each)} budgets for {num_calls} calls of the model in this run; "
                f"give one number, or one for each call"
            )
        if num_latents is not None and not model.is_elastic:
            raise ValueError(
                f"num_latents {num_latents} asked of a model that is not elastic; leave it out"
            )
        if num_latents is None:
            kept = [model.resolve_budget(one) for one in each]
        else:
            kept = [check_num_latents(one, model.max_latents) for one in each]
        lowest = min(kept) if model.is_elastic else None
        guides, fewest = kept, {"budget": lowest}
        if guidance is not None and guidance.budget is not None:
            if guidance.budget == "lowest":
                guide = model.min_latents or None
            else:
                guide = model.resolve_budget(guidance.budget)
            guides, fewest["guide budget"] = [guide] * num_calls, guide
            if guide is not None and guide > lowest:
                logger.warning(
                    "the guide keeps %d latents per group, more than the %d that it guides",
                    guide, lowest,
                )  # fmt: skip
            if not guidance.drop_label and guide in kept:
                logger.warning("autoguidance has no effect where its guide has the same budget")
        for what, number in fewest.items():
            if number is not None and number < model.min_latents:
                logger.warning(
                    "%s %g keeps %d latents per group, but this model was trained with %d or more",
                    what, model.budget_of(number), number, model.min_latents,
                )  # fmt: skip
        return list(zip(kept, guides, strict=True))

    @property
    def draws_clips(self) -> bool:
        """Whether the transformer makes clips, not images."""
        return len(self.transformer.sample_size) == 3

    def _check_options(
        self, guidance: Guidance | None, generator: Generators, count: int, output_type: str
    ) -> None:
        if not isinstance(guidance, Guidance | None):
            raise ValueError(
                f"guidance {guidance!r} is not a Guidance; "
                f"give CFG(3.0), AutoGuidance(2.0), CheapCFG(3.0), or None"
            )
        generators: list[Any] = generator if isinstance(generator, list) else [generator] * count
        if len(generators) != count:
            raise ValueError(
                f"{len(generators)} generators for {count} samples; give one for each, or one"
            )
        for one in generators if generator is not None else ():
            if not isinstance(one, torch.Generator):
                raise ValueError(
                    f"generator {one!r} is not a torch.Generator; "
                    f"give torch.Generator().manual_seed({one if isinstance(one, int) else 0})"
                )
        check_choice(output_type, OUTPUT_TYPES, "output_type")
        channels = self.transformer.in_channels
        if output_type != "latent" and self.vae is None and not draws_images(channels):
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
