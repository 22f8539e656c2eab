"""Class labels to images, at any compute budget."""

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from elit.flow.guidance import Guidance
from elit.flow.schedulers import start_sampling
from elit.models.elastic import ElasticMixin
from elit.pipelines.folder import check_pipeline_source, loading_error

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Generators = torch.Generator | Sequence[torch.Generator] | None


class ElitPipeline(DiffusionPipeline):
    """Draws images of given classes with an elastic (or plain) diffusion transformer.

    Args:
        transformer: a model of ours, such as `DiT`.
        scheduler: a flow-matching scheduler; `elit.make_scheduler` has them by name.
        vae: the autoencoder in whose VAE latents the model works; None for pixels.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["samples"]

    def __init__(
        self, transformer: ModelMixin, scheduler: SchedulerMixin, vae: AutoencoderKL | None = None
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self.video_processor = VideoProcessor(vae_scale_factor=1)
        if self.draws_clips and vae is not None:
            raise ValueError("clips are drawn in pixels; make the pipeline without vae")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "ElitPipeline":
        """Load a folder or a hub name as diffusers does, but refuse what doesn't fit.

        A missing, damaged or foreign checkpoint is a ValueError; no weight is ever left random.
        Weights are read from safetensors alone, unless `use_safetensors` says otherwise.
        """
        name = os.fspath(pretrained_model_name_or_path)
        check_pipeline_source(name, cls, kwargs)
        kwargs.setdefault("use_safetensors", True)
        try:
            pipeline = super().from_pretrained(name, **kwargs)
        except (OSError, TypeError, ValueError) as error:
            raise loading_error(name, error) from error
        if not isinstance(pipeline.transformer, ElasticMixin):  # one from the hub
            kind = type(pipeline.transformer).__name__
            raise ValueError(f"{name} has a {kind}, which is no transformer of elit's")
        return pipeline

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        budget: float | Sequence[float] = 1.0,
        num_inference_steps: int = 40,
        guidance: Guidance | None = None,
        generator: Generators = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        sigmas: Sequence[float] | None = None,
        noise: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("samples",),
    ) -> ImagePipelineOutput | tuple:
        """Draw one image for each label.

        Args:
            class_labels: labels in [0, num_classes).
            budget: fraction of the latents to keep, in (0, 1], or one for each call of the model.
            num_inference_steps: steps of the scheduler.
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
        """
        labels = self._check_labels(class_labels)
        generator = list(generator) if isinstance(generator, Sequence) else generator
        self._check_options(generator, len(labels), output_type, guidance)
        self._check_callback_names(callback_on_step_end_tensor_inputs)
        device = self._execution_device
        labels = labels.to(device)
        size = self._input_size(height, width, num_frames)
        samples = self._start(noise, generator, len(labels), size, device)
        levels = start_sampling(self.scheduler, num_inference_steps, device, sigmas)
        step_latents = self._latents_of_steps(budget, len(levels), guidance)
        if guidance and guidance.scale != 1 and not any(map(guidance.is_active, levels)):
            logger.warning("guidance has no effect: %s is active at none of the levels", guidance)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}

        with self.progress_bar(total=len(levels)) as progress_bar:
            for i, timestep in enumerate(self.scheduler.timesteps):
                velocity = self._velocity(samples, levels[i], labels, *step_latents[i], guidance)
                step = self.scheduler.step(velocity, timestep, samples, **extra, return_dict=False)
                samples = step[0]  # (B, C, h, w) float32
                if callback_on_step_end is not None:
                    given = dict.fromkeys(callback_on_step_end_tensor_inputs, samples)
                    changed = callback_on_step_end(self, i, timestep, given)
                    self._check_callback_names(changed or ())
                    samples = (changed or {}).get("samples", samples)
                progress_bar.update()

        if not samples.isfinite().all():
            raise ValueError(
                f"the samples are no longer finite; a smaller guidance scale than "
                f"{guidance.scale if guidance else 1:g}, more steps or dtype float32 may help"
            )
        images = self._decode(samples, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, x: Tensor, sigma: float, labels: Tensor, num_latents: int | None) -> Tensor:
        """The transformer's velocity (B, C, h, w), at one noise level for all."""
        level = torch.full((len(x),), sigma, device=x.device)
        dtype = self.transformer.dtype
        kwargs = {} if num_latents is None else {"num_latents": num_latents}
        return self.transformer(x.to(dtype), level, labels, **kwargs, return_dict=False)[0]

    def _velocity(
        self,
        x: Tensor,
        sigma: float,
        labels: Tensor,
        num_latents: int | None,
        guide_latents: int | None,
        guidance: Guidance | None,
    ) -> Tensor:
        """Velocity (B, C, h, w) in float32, guided or not."""
        if guidance is None:
            return self._predict(x, sigma, labels, num_latents).float()
        return guidance.velocity(
            self._predict, x, sigma, labels, self.null_label, num_latents, guide_latents
        )

    @property
    def draws_clips(self) -> bool:
        """Whether the transformer makes clips, not images."""
        return len(self.transformer.sample_size) == 3

    @property
    def null_label(self) -> int:
        """The label that means "no class"."""
        return self.transformer.config.num_classes

    @property
    def vae_scale(self) -> int:
        """Pixels per element of the VAE latents along each axis; 1 without a VAE."""
        if self.vae is None:
            return 1
        compression = getattr(self.vae, "spatial_compression_ratio", None)  # AutoencoderDC has it
        return compression or 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _check_labels(self, class_labels: int | Sequence[int] | Tensor) -> Tensor:
        """Labels (B,) int64 on the CPU."""
        try:
            labels = torch.as_tensor(class_labels).cpu().reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            labels = torch.empty(0)
        if not len(labels) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"class_labels {class_labels!r} are not labels; "
                f"give one or more integers in 0..{self.null_label - 1}"
            )
        wrong = [label for label in labels.tolist() if not 0 <= label < self.null_label]
        if wrong:
            raise ValueError(
                f"class label {wrong[0]} is out of range; "
                f"this model knows the labels 0..{self.null_label - 1}"
            )
        return labels.long()

    def _check_options(
        self, generator: Generators, count: int, output_type: str, guidance: Guidance | None
    ) -> None:
        if guidance is not None and not isinstance(guidance, Guidance):
            raise ValueError(
                f"guidance {guidance!r} is not a Guidance; "
                f"give CFG(3.0), AutoGuidance(2.0), CheapCFG(3.0), or None"
            )
        given = generator if isinstance(generator, Sequence) else [generator]
        for one in given:
            if one is not None and not isinstance(one, torch.Generator):
                raise ValueError(
                    f"generator {one!r} is not a torch.Generator; "
                    f"give torch.Generator().manual_seed({one if isinstance(one, int) else 0})"
                )
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(
                f"{len(generator)} generators for {count} class labels; "
                f"give one generator for each label, or a single one"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type {output_type!r} is unknown; use one of {', '.join(OUTPUT_TYPES)}"
            )

        if (
            output_type != "latent"
            and self.vae is None
            and self.transformer.in_channels not in (1, 3)
        ):
            raise ValueError(
                f"{self.transformer.in_channels} channels are no image: these are VAE latents; "
                f"make the pipeline with vae=..., or ask for output_type='latent'"
            )

    def _check_callback_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._callback_tensor_inputs:
                allowed = ", ".join(map(repr, self._callback_tensor_inputs))
                raise ValueError(f"the step callback knows no {name!r}; it is given {allowed}")

    def _latents_of_steps(
        self, budget: float | Sequence[float], num_calls: int, guidance: Guidance | None
    ) -> list[tuple[int | None, int | None]]:
        """Latents per group of the prediction and of its guide, for each call of the model."""
        model = self.transformer
        if isinstance(budget, Sequence) and not isinstance(budget, str):
            budgets = list(budget)
        else:
            budgets = [budget] * num_calls
        if len(budgets) != num_calls:
            raise ValueError(
                f"{len(budgets)} budgets for {num_calls} calls of the model in this run; "
                f"give one number, or one for each call"
            )
        kept = [model.resolve_budget(b) for b in budgets]
        self._warn_if_untrained("budget", min(budgets))
        if guidance is None or guidance.budget is None:
            return [(n, n) for n in kept]
        if guidance.budget == "lowest":
            guide = model.min_latents or None
        else:
            guide = model.resolve_budget(guidance.budget)
            self._warn_if_untrained("guide budget", guidance.budget)
        if guide is not None and guide > min(n or guide for n in kept):
            logger.warning(
                "the guide keeps %d latents per group, more than the %d that it guides",
                guide,
                min(n or guide for n in kept),
            )
        if not guidance.drop_label and guide in kept:
            logger.warning("autoguidance has no effect where its guide has the same budget")
        return [(n, guide) for n in kept]

    def _warn_if_untrained(self, what: str, budget: float) -> None:
        """Warn of a budget below all that the model was trained with."""
        kept, least = self.transformer.resolve_budget(budget), self.transformer.min_latents
        if kept is not None and kept < least:
            logger.warning(
                "%s %g keeps %d latents per group, but this model was trained with %d or more",
                what, budget, kept, least,
            )  # fmt: skip

    def _input_size(
        self, height: int | None, width: int | None, num_frames: int | None
    ) -> tuple[int, ...]:
        """Size of the transformer's input, (h, w) or (t, h, w), for pixels and frames asked for."""
        if not self.draws_clips and num_frames is not None:
            raise ValueError(f"num_frames={num_frames} asked of a model of images; leave it out")
        asked, scale = (num_frames, height, width), self.vae_scale
        sizes = []
        for pixels, default in zip(
            asked[3 - len(self.transformer.sample_size) :],
            self.transformer.sample_size,
            strict=True,
        ):
            if pixels is not None and (not isinstance(pixels, int) or pixels < 1):
                raise ValueError(f"a side of {pixels!r} is no positive integer")
            if pixels is not None and pixels % scale:
                raise ValueError(
                    f"an image side of {pixels} pixels is not a multiple of {scale}, "
                    f"the VAE's scale; use {-(-pixels // scale) * scale}"
                )
            sizes.append(default if pixels is None else pixels // scale)
        return tuple(sizes)

    def _start(
        self,
        noise: Tensor | None,
        generator: Generators,
        count: int,
        size: tuple[int, ...],
        device: torch.device,
    ) -> Tensor:
        """Noise (B, C, *size) float32 to start from."""
        shape = (count, self.transformer.in_channels, *size)
        if noise is None:
            return randn_tensor(shape, generator, device, torch.float32)
        if noise.shape != shape:
            raise ValueError(f"noise of shape {tuple(noise.shape)} does not fit; give {shape}")
        return noise.to(device, torch.float32)

    def _decode(self, samples: Tensor, output_type: str) -> Any:
        """What `output_type` asks for, of samples (B, C, h, w)."""
        if output_type == "latent":
            return samples
        if self.vae is not None:
            config = self.vae.config
            shift = getattr(config, "shift_factor", None) or 0.0
            samples = samples / config.scaling_factor + shift
            samples = self.vae.decode(samples.to(self.vae.dtype), return_dict=False)[0]
        if self.draws_clips:  # (B, C, T, H, W)
            return self.video_processor.postprocess_video(samples.float(), output_type)
        return self.image_processor.postprocess(samples.float(), output_type=output_type)
