"""What our pipelines share: loading, budgets, guidance, the loop over noise levels, decoding."""

import inspect
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from safetensors import SafetensorError
from torch import Tensor

from elit._files import typed_path
from elit._numbers import is_whole, latent_frames
from elit.cost.flops import cost_of
from elit.cost.formulas import ModelCost
from elit.flow.guidance import Condition, Guidance, at_least_float32
from elit.interface.grid import format_size
from elit.models.elastic import ElasticMixin
from elit.pipelines.autoencoder import (
    SamplesDivergedError,
    check_usable,
    decode,
    has_time,
    spatial_scale,
    temporal_scale,
)
from elit.pipelines.budgets import RunBudgets
from elit.pipelines.folder import check_pipeline_source, draws_images, loading_error

logger = logging.getLogger(__name__)

MOST_TIMES = 256  # the size that a model was made for: beyond, a run would not end
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Generators = torch.Generator | Sequence[torch.Generator] | None
StepCallback = Callable[[Any, int, Tensor, dict], dict]


def check_sample_dtype(dtype: torch.dtype, device_type: str) -> None:
    """Raise a ValueError unless samples can be of this type, on a device such as "cuda"."""
    is_real = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if not is_real or dtype.itemsize < torch.float32.itemsize:
        reason = (
            "would lose what a step adds" if is_real else "are not real numbers with a fraction"
        )
        raise ValueError(
            f"samples in {dtype} {reason}; use torch.float32 or torch.float64. The model computes "
            f"in its own dtype anyway"
        )
    if dtype != torch.float32 and device_type == "mps":
        raise ValueError(
            f"samples in {dtype} cannot be on mps, which has no such type; use torch.float32, "
            "or pipeline.to('cpu')"
        )


class ElasticPipeline(RunBudgets, DiffusionPipeline):
    """A pipeline whose transformer is one of ours.

    A subclass registers the modules, turns what a user wants drawn into conditions of the model,
    and calls `sample`.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["samples"]

    def set_processors(self) -> None:
        """Make what turns tensors into pictures; the last thing that a subclass makes."""
        if self.vae is not None:
            check_usable(type(self.vae).__name__, self.vae.config)
            if self.draws_clips and not has_time(self.vae):
                raise ValueError(
                    f"a {type(self.vae).__name__} is of images, the transformer draws clips; use "
                    f"the autoencoder that it was trained with"
                )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self.video_processor = VideoProcessor(vae_scale_factor=1)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Any:
        """Load a folder or a hub name as diffusers does, but refuse what doesn't fit.

        A missing, damaged or foreign checkpoint is a ValueError; no weight is ever left random.
        Weights are read from safetensors alone, unless `use_safetensors` says otherwise.
        """
        name = typed_path(pretrained_model_name_or_path)
        check_pipeline_source(name, cls, kwargs)
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
    def sample(
        self,
        condition: Condition,
        null_condition: Condition,
        count: int,
        budget: float | Sequence[float],
        num_inference_steps: int,
        guidance: Guidance | None,
        generator: Generators,
        size: tuple[int | None, int | None, int | None],
        sigmas: Sequence[float] | None,
        noise: Tensor | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: StepCallback | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        dtype: torch.dtype = torch.float32,
    ) -> ImagePipelineOutput | tuple:
        """Go from noise to images; arguments beyond these are those of `ElitPipeline`.

        Args:
            condition: the model's arguments that say what to draw, (count, ...) each.
            null_condition: the same of nothing in particular, for guidance.
            count: images.
            size: frames, height and width asked for.
        """
        generator = list(generator) if isinstance(generator, Sequence) else generator
        self._check_options(generator, count, output_type, guidance)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"callback_on_step_end {callback_on_step_end!r:.60} is no function")
        self._check_callback_names(callback_on_step_end_tensor_inputs)
        device = self._execution_device
        check_sample_dtype(dtype, device.type)
        self._check_dtype(dtype)
        input_size = self.input_size(*size)
        levels = self.start(num_inference_steps, device, sigmas, input_size)
        samples = self._start(noise, generator, count, input_size, device, dtype)
        step_latents = self.latents_of_steps(budget, len(levels), guidance)
        if guidance and guidance.scale != 1 and not any(map(guidance.is_active, levels)):
            logger.warning("guidance has no effect: %s is active at none of the levels", guidance)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}

        self.transformer._reset_stateful_cache()  # a run that broke off may have left something
        with self.progress_bar(total=len(levels)) as progress_bar:
            for i, timestep in enumerate(self.scheduler.timesteps):
                place = {"step_index": i, "num_inference_steps": len(levels)}
                velocity = self._velocity(
                    samples, levels[i], condition, null_condition, *step_latents[i], guidance, place
                )
                velocity = velocity.to(samples.dtype)  # a float64 model doesn't widen the samples
                step = self.scheduler.step(velocity, timestep, samples, **extra, return_dict=False)
                samples = step[0]  # (B, C, h, w)
                if callback_on_step_end is not None:
                    given = dict.fromkeys(callback_on_step_end_tensor_inputs, samples)
                    changed = callback_on_step_end(self, i, timestep, given)
                    samples = self._changed(changed, samples)
                progress_bar.update()

        if not samples.isfinite().all():
            guided = f"a smaller guidance scale than {guidance.scale:g}, " if guidance else ""
            raise SamplesDivergedError(
                f"the samples are no longer finite; {guided}more steps or dtype float32 may help, "
                f"if the weights themselves are sound"
            )
        images = self.decode(samples, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(
        self, x: Tensor, sigma: float, condition: Condition, num_latents: int | None
    ) -> Tensor:
        """The transformer's velocity (B, C, h, w), at one noise level for all."""
        level = torch.full((len(x),), sigma, device=x.device)
        kwargs = {} if num_latents is None else {"num_latents": num_latents}
        x = x.to(self.transformer.dtype)
        return self.transformer(x, level, **condition, **kwargs, return_dict=False)[0]

    def _velocity(
        self,
        x: Tensor,
        sigma: float,
        condition: Condition,
        null_condition: Condition,
        num_latents: int | None,
        guide_latents: int | None,
        guidance: Guidance | None,
        place: dict[str, int],
    ) -> Tensor:
        """Velocity (B, C, h, w), guided or not, in float32 or in what is wider.

        Step caches know the calls by diffusers' names: the guided one, its guide, or both in one
        batch. `place` is where they are in the run.
        """
        names = iter(("cond", "uncond"))

        def predict(batch: Tensor, *arguments: Any) -> Tensor:
            name = "cond_uncond" if len(batch) > len(x) else next(names)
            with self.transformer.cache_context(name, **place):
                return self._predict(batch, *arguments)

        if guidance is None:
            return at_least_float32(predict(x, sigma, condition, num_latents))
        return guidance.velocity(
            predict, x, sigma, condition, null_condition, num_latents, guide_latents
        )

    @property
    def draws_clips(self) -> bool:
        """Whether the transformer makes clips, not images."""
        return len(self.transformer.sample_size) == 3

    @property
    def vae_scale(self) -> int:
        """Pixels per element of the VAE latents along each axis; 1 without a VAE."""
        return spatial_scale(self.vae)

    def _check_options(
        self, generator: Generators, count: int, output_type: str, guidance: Guidance | None
    ) -> None:
        if guidance is not None and not isinstance(guidance, Guidance):
            raise ValueError(
                f"guidance {guidance!r} is not a Guidance; "
                f"give CFG(3.0), AutoGuidance(2.0), CheapCFG(3.0), or None"
            )
        for one in generator if isinstance(generator, Sequence) else [generator]:
            if not isinstance(one, torch.Generator) and generator is not None:
                raise ValueError(
                    f"generator {one!r} is not a torch.Generator; "
                    f"give torch.Generator().manual_seed({one if isinstance(one, int) else 0})"
                )
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(
                f"{len(generator)} generators for {count} samples; "
                f"give one generator for each, or a single one"
            )
        if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type {output_type!r} is unknown; use one of {', '.join(OUTPUT_TYPES)}"
            )

        if (
            output_type != "latent"
            and self.vae is None
            and not draws_images(self.transformer.in_channels)
        ):
            raise ValueError(
                f"{self.transformer.in_channels} channels are no image: these are VAE latents; "
                f"make the pipeline with vae=..., or ask for output_type='latent'"
            )

    def _check_dtype(self, dtype: torch.dtype) -> None:
        """Raise a ValueError unless the scheduler keeps samples in it from step to step."""
        if dtype != torch.float32 and not getattr(self.scheduler, "any_dtype", False):
            raise ValueError(
                f"a {type(self.scheduler).__name__} rounds samples to float32; for {dtype} use a "
                f"FlowMatchUniformEulerScheduler, or make_scheduler with heun or euler-maruyama"
            )

    def _changed(self, changed: Any, samples: Tensor) -> Tensor:
        """The samples after a step's callback, which may have given others."""
        if changed is None:
            return samples
        if not isinstance(changed, Mapping):
            raise ValueError(f"the step callback gave {changed!r:.60}; give a dict of tensors")
        self._check_callback_names(changed)
        new = changed.get("samples", samples)
        if not isinstance(new, Tensor) or new.shape != samples.shape or new.dtype != samples.dtype:
            raise ValueError(
                f"the step callback gave samples {new!r:.60}; give a tensor of shape "
                f"{tuple(samples.shape)} and {samples.dtype}"
            )
        return new

    def _check_callback_names(self, names: Iterable[str]) -> None:
        if not isinstance(names, Iterable) or isinstance(names, str):
            raise ValueError(f"{names!r} are no names for the step callback; give a list of them")
        for name in names:
            if name not in self._callback_tensor_inputs:
                allowed = ", ".join(map(repr, self._callback_tensor_inputs))
                raise ValueError(f"the step callback knows no {name!r}; it is given {allowed}")

    def input_size(
        self, num_frames: int | None, height: int | None, width: int | None
    ) -> tuple[int, ...]:
        """Size of the transformer's input, (h, w) or (t, h, w), for pixels and frames asked for."""
        if not self.draws_clips and num_frames is not None:
            raise ValueError(f"num_frames={num_frames} asked of a model of images; leave it out")
        asked, scale = (num_frames, height, width), self.vae_scale
        sizes: list[int] = []
        for pixels, default in zip(
            asked[3 - len(self.transformer.sample_size) :],
            self.transformer.sample_size,
            strict=True,
        ):
            if pixels is not None and not is_whole(pixels):
                raise ValueError(f"a side of {pixels!r} is no positive integer")
            if len(sizes) == len(self.transformer.sample_size) - 3 and pixels is not None:
                sizes.append(self.latent_frames(pixels))  # time comes first
                continue
            if pixels is not None and pixels % scale:
                raise ValueError(
                    f"an image side of {pixels} pixels is not a multiple of {scale}, "
                    f"the VAE's scale; use {-(-pixels // scale) * scale}"
                )
            sizes.append(default if pixels is None else pixels // scale)
        made_for = self.transformer.sample_size
        if math.prod(sizes) > MOST_TIMES * math.prod(made_for):
            raise ValueError(
                f"an input of {format_size(sizes)} is more than {MOST_TIMES} times "
                f"what this model was made for, {format_size(made_for)}; ask for a smaller size"
            )
        return tuple(sizes)

    def forward_cost(
        self,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        text_tokens: int | None = None,
    ) -> ModelCost:
        """Cost of a forward at a size in frames and pixels; `.flops(num_latents)` is of a sample.

        Args:
            num_frames: of clips; by default what the model was made for, as are the others.
            height: of the images.
            width: of the images.
            text_tokens: length of the text.
        """
        size = self.input_size(num_frames, height, width)
        return cost_of(self.transformer, size, text_tokens)

    def pixel_size(self) -> tuple[int, ...]:
        """Height and width, or frames, height and width, that the model was made for."""
        *frames, height, width = self.transformer.sample_size
        frames = [(length - 1) * temporal_scale(self.vae) + 1 for length in frames]
        return (*frames, height * self.vae_scale, width * self.vae_scale)

    def latent_frames(self, frames: int) -> int:
        """Length of the transformer's input for a number of frames."""
        return latent_frames(frames, temporal_scale(self.vae))

    def _start(
        self,
        noise: Tensor | None,
        generator: Generators,
        count: int,
        size: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """Noise (B, C, *size) to start from; what is drawn is drawn in float32."""
        shape = (count, self.transformer.in_channels, *size)
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
