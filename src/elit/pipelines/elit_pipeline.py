"""Class labels to images or clips, at any compute budget."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.models.autoencoders import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from elit._choices import label_of
from elit.flow.guidance import Guidance
from elit.flow.sampling import Generators
from elit.pipelines.base import ElasticPipeline


class ElitPipeline(ElasticPipeline):
    """Draws images, or clips, of given classes with an elastic (or plain) diffusion transformer.

    Args:
        transformer: a class-conditional model of ours, such as `DiT`.
        scheduler: a flow-matching scheduler; `elit.make_scheduler` has them by name.
        vae: the autoencoder in whose VAE latents the model works; None for pixels.
        id2label: names of the classes by their numbers, several of one parted by commas, as
            diffusers' DiT has them. Text of digits is a number, never a name.

    Attributes:
        labels: numbers of the classes by their names, but for a name of several classes.
    """

    draws = "classes"

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: Mapping[int, str] | Mapping[str, str] | None = None,
    ):
        super().__init__(transformer, scheduler, vae)
        self.labels: dict[str, int] = {}
        if id2label is None:
            return
        if not isinstance(id2label, Mapping):
            raise ValueError(f"id2label {id2label!r:.60} is no dict; give names by class numbers")
        for label, names in id2label.items():
            is_class = str(label).isdecimal() and int(label) < self.null_label
            if not (is_class and isinstance(names, str) and names.strip(" ,")):
                raise ValueError(
                    f"id2label has {label!r:.60}: {names!r:.60}; give a name to numbers from 0 to "
                    f"{self.null_label - 1}, the model's classes"
                )
        self.labels = _numbers_of({int(label): name for label, name in id2label.items()})
        self.register_to_config(id2label={int(label): name for label, name in id2label.items()})

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        budget: float | str | Sequence[float | str] = 1.0,
        num_inference_steps: int | None = None,
        guidance: Guidance | str | None = None,
        generator: Generators = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image for each label, a number or a name; all other arguments are `draw`'s."""
        if class_labels is None:
            names = " or names" if self.labels else ""
            raise ValueError(
                f"this {type(self).__name__} draws classes, not prompts; give class_labels, "
                f"one or more integers in 0..{self.null_label - 1}{names}"
            )
        labels = self._check_labels(class_labels).to(self._execution_device)
        null = {"class_labels": torch.full_like(labels, self.null_label)}
        run = budget, num_inference_steps, guidance, generator
        return self.draw({"class_labels": labels}, null, *run, **options)

    @property
    def null_label(self) -> int:
        """The label that means "no class"."""
        return self.transformer.config.num_classes

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Numbers of classes by their names."""
        names = [label] if isinstance(label, str) else label
        return [label_of(name, self.labels, self.null_label) for name in names]

    def _check_labels(self, class_labels: int | str | Sequence[int | str] | Tensor) -> Tensor:
        """Labels (B,) int64 on the CPU."""
        allowed = f"0..{self.null_label - 1}"
        if isinstance(class_labels, str | list | tuple):
            class_labels = self.get_label_ids(class_labels)
        try:
            labels = torch.as_tensor(class_labels).cpu().reshape(-1)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            labels = torch.empty(0)
        is_whole = not (labels.is_floating_point() or labels.is_complex())
        if not len(labels) or not is_whole or labels.dtype == torch.bool:
            raise ValueError(
                f"class_labels {class_labels!r:.60} are not labels; "
                f"give one or more integers in {allowed}"
            )
        for label in labels.tolist():
            if not 0 <= label < self.null_label:
                raise ValueError(
                    f"class label {label} is out of range; this model knows the labels {allowed}"
                )
        return labels.long()


def _numbers_of(id2label: Mapping[int, str]) -> dict[str, int]:
    """Classes by their names; of a name that several have, "crane (134)" and "crane (517)".

    The whole name of a class stands before another's that is one of several.
    """
    whole: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for label, names in id2label.items():
        whole.setdefault(names.strip(), []).append(label)
        for name in {name.strip() for name in names.split(",")} - {""}:
            parts.setdefault(name, []).append(label)
    return {
        name if len(labels) == 1 else f"{name} ({label})": label
        for name, labels in (parts | whole).items()
        for label in labels
    }
