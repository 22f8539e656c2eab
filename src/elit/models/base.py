"""What a model of ours has beside its forward: sizes, checks, loading, step caches."""

from collections.abc import Sequence
from functools import wraps
from typing import Any, Literal, cast, get_args

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from elit._choices import check_choice
from elit._config import leave_out_defaults
from elit.caching.mixin import StepCaching
from elit.caching.ports import Block, BlockPort
from elit.interface.budget import Budgeted, check_num_latents
from elit.interface.grid import TokenGrid
from elit.models.checks import check_indices, check_samples, labels_of, noise_levels
from elit.models.geometry import Geometry

PredictionType = Literal["velocity", "sample"]
FEW_STEPS = "_few_steps"  # in a config: Euler steps that the model was trained to draw in
LEARNED_GUIDANCE = "_learned_guidance"  # likewise: scale of the guidance that is in its velocity
LEAST_SIGMA = 0.05  # that a predicted sample's error is divided by


class StrictLoading:
    """Loads as any diffusers model, but refuses weights that are not the model's.

    diffusers only warns of them and leaves what is missing random.
    """

    strict_prefix = ""  # of the weights that it looks at

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load, or raise a ValueError."""
        source = args[0] if args else "the checkpoint"
        wants_info, parent = kwargs.pop("output_loading_info", False), cast(Any, super())
        try:
            model, info = parent.from_pretrained(*args, output_loading_info=True, **kwargs)
        except TypeError as error:  # arguments of __init__ that another class's config lacks
            raise ValueError(f"{source} does not hold a {cls.__name__}: {error}") from error
        wrong = []
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            keys = [key if isinstance(key, str) else key[0] for key in info[kind]]
            if keys := sorted(key for key in keys if key.startswith(cls.strict_prefix)):
                names = f"{', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
                wrong.append(f"{len(keys)} {kind.replace('_', ' ')} ({names})")
        if wrong:
            raise ValueError(
                f"{source} does not hold the weights of this {cls.__name__}: {', '.join(wrong)}; "
                f"load it with the class and the config it was saved with, and save the bare model"
            )
        return (model, info) if wants_info else model

    @wraps(ModelMixin.save_pretrained)  # a pipeline looks at its arguments
    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as diffusers does, unless the names of what wraps it would be its own."""
        if getattr(self, "peft_config", None):
            raise ValueError(
                f"this {type(self).__name__} has LoRA around its layers, which no "
                f"from_pretrained could load; save it beside the model by save_lora_adapter, then "
                f"unload_lora; after fuse_lora the weights keep it"
            )
        return cast(Any, super()).save_pretrained(*args, **kwargs)


LORA = {
    "active_adapters", "add_adapter", "delete_adapters", "disable_adapters", "disable_lora",
    "enable_adapters", "enable_lora", "enable_lora_hotswap", "fuse_lora", "load_lora_adapter",
    "save_lora_adapter", "set_adapter", "set_adapters", "unfuse_lora", "unload_lora",
    "_fuse_lora_apply", "_hf_peft_config_loaded", "_optionally_disable_offloading",
    "_prepare_lora_hotswap_kwargs", "_unfuse_lora_apply",
}  # fmt: skip
"""Names of diffusers' `PeftAdapterMixin`."""


class _Lora:
    """A name of that mixin as a class's attribute: it brings peft along when it is asked for."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        from diffusers.loaders.peft import PeftAdapterMixin

        value = vars(PeftAdapterMixin)[self.name]
        return value.__get__(instance, owner) if hasattr(value, "__get__") else value


class ModelBase(StrictLoading, Budgeted, StepCaching, ModelMixin):
    """A transformer that may have a latent interface.

    Attributes:
        geometry: sizes; those that others ask for stand here too.
        read, write: the interface, None in a plain model.
        takes_text: whether a text tells it what to draw, not a class label.
    """

    takes_text = False
    always_split = False  # whether a plain model has a head and a tail too

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["embed", "norm", "modulation", "project", "place"]
    gradient_checkpointing = False

    read: Any  # a module, or None
    write: Any

    def set_attention_backend(self, backend: str) -> None:
        """Raise a ValueError: the backends of diffusers are those of its own attention."""
        raise ValueError(
            f"set_attention_backend({backend!r}) has no effect on a {type(self).__name__}, whose "
            f"attention is PyTorch's; choose a kernel of that by `with "
            f"torch.nn.attention.sdpa_kernel(...)` around the call"
        )

    def set_budget(self, budget: float | str = 1.0, guide: float | str | None = None) -> None:
        """Raise a ValueError: that is of elasticized models, in pipelines that know no budgets."""
        more = "" if guide is None else f", guidance='ccfg', guide_budget={guide!r}"
        raise ValueError(
            f"set_budget has no effect on a {type(self).__name__}: an ElitPipeline takes "
            f"budget={budget!r}{more} in its call, the model itself num_latents="
            f"model.resolve_budget({budget!r})"
        )

    def set_geometry(self) -> None:
        """Take the sizes from the config, or raise a ValueError of those that do not fit."""
        self.geometry = geometry = Geometry.of(self.config, self.always_split)
        self.sample_size, self.patch_size = geometry.sample_size, geometry.patch_size
        self.in_channels, self.patch_dim = geometry.in_channels, geometry.patch_dim
        self.group, self.split = geometry.group, geometry.split
        self.max_latents, self.min_latents = geometry.max_latents, geometry.min_latents
        self.prediction_type = self.config.get("prediction_type", "velocity")
        check_choice(self.prediction_type, get_args(PredictionType), "prediction_type")
        leave_out_defaults(self, prediction_type="velocity")

    def velocity_of(self, output: Tensor, samples: Tensor, levels: Tensor) -> Tensor:
        """Velocity (B, ...) of what the last layer gave for samples (B, ...) at noise levels (B,).

        x = data + sigma v, so that v = (x - data) / sigma of a predicted sample (JiT, Li & He,
        2025). Paper: the data's velocity is divided by the same floor; here: it is left as it is,
        so that the model learns the velocity below the floor too.
        """
        if self.prediction_type == "velocity":
            return output
        sigma = levels.to(torch.promote_types(samples.dtype, torch.float32)).clamp(LEAST_SIGMA)
        velocity = (samples - output) / sigma.view(-1, *(1,) * (samples.ndim - 1))
        return velocity.to(samples.dtype)

    def token_grid(self, samples: Tensor) -> TokenGrid:
        """Token grid of samples (B, C, *space), checked against channels, patch and groups."""
        shape, frames = tuple(samples.shape), "frames, " * (len(self.patch_size) == 3)
        if len(shape) != len(self.patch_size) + 2 or shape[1] != self.in_channels:
            raise ValueError(
                f"input of shape {shape} does not fit; this model takes "
                f"(batch, channels, {frames}height, width) with {self.in_channels} channels"
            )
        if shape[0] < 1:
            raise ValueError("a batch of no samples; give at least one")
        return self.geometry.grid(shape[2:])

    def check_inputs(
        self, samples: Tensor, timestep: Tensor | float,
        num_latents: int | Sequence[int] | None, latent_indices: Tensor | None,
    ) -> tuple[TokenGrid, Tensor, int | tuple[int, ...]]:  # fmt: skip
        """Grid, noise levels (B,) and number of latents (0 in a plain model), or a ValueError."""
        check_samples(samples, self)
        grid, levels = self.token_grid(samples), noise_levels(timestep, samples)
        if not self.is_elastic:
            if num_latents is not None or latent_indices is not None:
                raise ValueError(
                    f"num_latents {num_latents} asked of a model that is not elastic; "
                    f"leave it out, or use a model with groups (elit-...)"
                )
            return grid, levels, 0
        num_latents = self.max_latents if num_latents is None else num_latents
        if isinstance(num_latents, Sequence):
            num_latents = self._check_mixed(num_latents, samples.shape[0], latent_indices)
            if isinstance(num_latents, tuple):
                return grid, levels, num_latents
        if latent_indices is not None:
            if self.read is None:
                raise ValueError(
                    f"an elasticized {type(self).__name__.removeprefix('Elastic')} keeps the first "
                    f"latents; leave latent_indices out"
                )
            check_indices(latent_indices, num_latents, self.max_latents)
        return grid, levels, check_num_latents(num_latents, self.max_latents)

    def _check_mixed(
        self, num_latents: Sequence[int], count: int, latent_indices: Tensor | None
    ) -> int | tuple[int, ...]:
        """Latents per group of each sample, or one number where they are the same."""
        each = tuple(check_num_latents(n, self.max_latents) for n in num_latents)
        if len(each) != count:
            raise ValueError(
                f"{len(each)} num_latents for {count} samples; give one number, or one for each"
            )
        if len(set(each)) == 1:
            return each[0]
        obstacles = {
            "latent_indices are": latent_indices is not None,
            "a step cache is": self.tells_calls_apart,
            "the hooks of an elasticized model are": self.read is None,
        }
        for what, is_there in obstacles.items():
            if is_there:
                raise ValueError(
                    f"num_latents differ between the samples, but {what} for samples of one "
                    f"budget; call the model once for each number"
                )
        return each

    def check_labels(
        self, labels: Tensor | None, text: Tensor | None, samples: Tensor
    ) -> Tensor | None:
        """Labels (B,), or a ValueError if they are none, or if there is a text."""
        if text is not None:
            raise ValueError(
                f"a {type(self).__name__} takes class_labels, not encoder_hidden_states; "
                f"leave it None"
            )
        return None if labels is None else labels_of(labels, self.config.num_classes, samples)

    def example_condition(self, batch_size: int) -> dict[str, Tensor]:
        """Arguments that tell the model what to draw, for counting and measuring."""
        return {"class_labels": torch.arange(batch_size) % self.config.num_classes}

    def cache_blocks(self) -> list[Block]:
        """Blocks, Read and Write: a skipped Read hands on the tokens, a skipped Write the same."""
        blocks = list(self.blocks)
        if self.read is not None:
            head, core, _ = self.split
            if not head:
                raise ValueError(
                    f"a step cache watches the first block on tokens, but this "
                    f"{type(self).__name__} has no head; use a model with head >= 1"
                )
            blocks.insert(head + core, self.write)
            blocks.insert(head, self.read)
        return [(block, BlockPort.of(block)) for block in blocks]


for _name in LORA:
    setattr(ModelBase, _name, _Lora(_name))
