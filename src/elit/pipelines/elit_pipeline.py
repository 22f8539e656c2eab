"""Class labels to images or clips, at any compute budget."""

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers import ImagePipelineOutput
from diffusers.models.autoencoders import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from elit.flow.guidance import Guidance
from elit.pipelines.base import ElasticPipeline, Generators, StepCallback


class ElitPipeline(ElasticPipeline):
    """Draws images, or clips, of given classes with an elastic (or plain) diffusion transformer.

    Args:
        transformer: a class-conditional model of ours, such as `DiT`.
        scheduler: a flow-matching scheduler; `elit.make_scheduler` has them by name.
        vae: the autoencoder in whose VAE latents the model works; None for pixels.
    """

    def __init__(
        self, transformer: ModelMixin, scheduler: SchedulerMixin, vae: AutoencoderKL | None = None
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        if getattr(transformer, "takes_text", False):
            raise ValueError(
                f"a {type(transformer).__name__} draws texts, not classes; "
                f"make an ElitTextPipeline of it"
            )
        self.set_processors()

    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        budget: float | Sequence[float] | Literal["auto"] = 1.0,
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
        max_flops: float | None = None,
        max_ms: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image for each label.

        Args:
            class_labels: labels in [0, num_classes).
            budget: fraction of the latents to keep, in (0, 1], or one for each call of the model,
                or "auto": budget, steps and guidance are the best that `elit sweep` measured
                within `max_flops` or `max_ms`.
            num_inference_steps: steps of the scheduler; None is 40 or, of "auto", free.
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
            max_flops: cap for "auto" on the operations for an image, a multiply-add as 2.
            max_ms: cap for "auto" on the milliseconds for an image; both are without the VAE.
            dtype: of the samples between the steps, torch.float32 or torch.double.
        """
        labels = self._check_labels(class_labels).to(self._execution_device)
        size = num_frames, height, width
        budget, steps, guidance = self.resolve_run(
            labels.tolist(), budget, num_inference_steps, guidance, max_flops, max_ms, size
        )
        return self.sample(
            {"class_labels": labels},
            {"class_labels": torch.full_like(labels, self.null_label)},
            len(labels),
            budget,
            steps,
            guidance,
            generator,
            size,
            sigmas,
            noise,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            dtype,
        )

    def example_of(self, count: int) -> list[int]:
        return [0] * count

    @property
    def null_label(self) -> int:
        """The label that means "no class"."""
        return self.transformer.config.num_classes

    def _check_labels(self, class_labels: int | Sequence[int] | Tensor) -> Tensor:
        """Labels (B,) int64 on the CPU."""
        try:
            labels = torch.as_tensor(class_labels).cpu().reshape(-1)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            labels = torch.empty(0)
        is_whole = not (labels.is_floating_point() or labels.is_complex())
        if not len(labels) or not is_whole or labels.dtype == torch.bool:
            raise ValueError(
                f"class_labels {class_labels!r:.60} are not labels; "
                f"give one or more integers in 0..{self.null_label - 1}"
            )
        wrong = [label for label in labels.tolist() if not 0 <= label < self.null_label]
        if wrong:
            raise ValueError(
                f"class label {wrong[0]} is out of range; "
                f"this model knows the labels 0..{self.null_label - 1}"
            )
        return labels.long()
