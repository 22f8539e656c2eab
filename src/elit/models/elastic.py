"""Base of all our models: sizes, budgets, condition, and running blocks."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from elit.caching.mixin import StepCaching
from elit.caching.ports import Block, BlockPort
from elit.interface.budget import Budgeted, check_num_latents
from elit.interface.grid import TokenGrid
from elit.layers.neighborhood import Neighborhood
from elit.layers.transformer import LabelEmbedding, Rotary, TimestepEmbedding, rotary_embedding
from elit.models.checks import check_indices, check_samples, labels_of, noise_levels
from elit.models.geometry import Geometry

_T = TypeVar("_T")


class ElasticMixin(Budgeted, StepCaching, ModelMixin):
    """A transformer that may have a latent interface.

    Attributes:
        geometry: sizes; those that others ask for stand here too.
        read, write: the interface, None in a plain model.
        takes_text: whether a text tells it what to draw, not a class label.
    """

    takes_text = False

    gradient_checkpointing: bool
    read: Any  # a module, or None
    write: Any

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as any diffusers model, but refuse weights that are not this model's.

        diffusers only warns of them and leaves what is missing random.
        """
        source = args[0] if args else "the checkpoint"
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except TypeError as error:  # arguments of __init__ that another class's config lacks
            raise ValueError(f"{source} does not hold a {cls.__name__}: {error}") from error
        wrong = [
            f"{len(info[kind])} {kind.replace('_', ' ')} "
            f"({', '.join(sorted(map(str, info[kind]))[:3])}, ...)"
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[kind]
        ]
        if wrong:
            raise ValueError(
                f"{source} does not hold the weights of this {cls.__name__}: {', '.join(wrong)}; "
                f"load it with the class and the config it was saved with, and save the bare model"
            )
        return (model, info) if wants_info else model

    def set_geometry(self, geometry: Geometry) -> None:
        """Take the sizes."""
        self.geometry = geometry
        self.sample_size, self.patch_size = geometry.sample_size, geometry.patch_size
        self.in_channels, self.patch_dim = geometry.in_channels, geometry.patch_dim
        self.group, self.split = geometry.group, geometry.split
        self.max_latents, self.min_latents = geometry.max_latents, geometry.min_latents

    def check_inputs(
        self, samples: Tensor, timestep: Tensor | float, num_latents: int | None,
        latent_indices: Tensor | None,
    ) -> tuple[TokenGrid, Tensor, int]:  # fmt: skip
        """Grid, noise levels (B,) and number of latents (0 in a plain model), or a ValueError."""
        check_samples(samples, self)
        grid = self.token_grid(samples)
        levels = noise_levels(timestep, samples)
        if not self.is_elastic:
            if num_latents is not None or latent_indices is not None:
                raise ValueError(
                    f"num_latents {num_latents} asked of a model that is not elastic; "
                    f"leave it out, or use a model with groups (elit-...)"
                )
            return grid, levels, 0
        num_latents = self.max_latents if num_latents is None else num_latents
        if latent_indices is not None:
            if self.read is None:
                raise ValueError(
                    f"an elasticized {type(self).__name__.removeprefix('Elastic')} keeps the first "
                    f"latents; leave latent_indices out"
                )
            check_indices(latent_indices, num_latents, self.max_latents)
        return grid, levels, check_num_latents(num_latents, self.max_latents)

    def token_grid(self, samples: Tensor) -> TokenGrid:
        """Token grid of samples (B, C, *space), checked against channels, patch and groups."""
        return self.geometry.grid(samples.shape)

    def rotary(self, places: Tensor) -> Rotary:
        """Rotations of tokens or latents at these places."""
        assert self.geometry.rotary is not None
        return rotary_embedding(places, *self.geometry.rotary)

    def split_blocks(self, blocks: Iterable[_T]) -> tuple[list[_T], ...]:
        """Head, core and tail of the blocks."""
        head, core, _ = self.split
        blocks = list(blocks)
        return blocks[:head], blocks[head : head + core], blocks[head + core :]

    def run(
        self, blocks: Iterable[nn.Module], x: Tensor, condition: Tensor,
        rotary: Rotary | Neighborhood | None, *more: Tensor,
    ) -> Tensor:  # fmt: skip
        """Run blocks one after the other, checkpointed where that is switched on."""
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, condition, rotary, *more)
            else:
                x = block(x, condition, rotary, *more)
        return x

    def cache_blocks(self) -> list[Block]:
        """Blocks, Read and Write: a skipped Read hands on the tokens, a skipped Write the same."""
        head, core, tail = self.split_blocks(self.blocks)
        if self.read is not None:
            if not head:
                raise ValueError(
                    f"a step cache watches the first block on tokens, but this "
                    f"{type(self).__name__} has no head; use a model with head >= 1"
                )
            core = [self.read, *core, self.write]
        return [(block, BlockPort.of(block)) for block in (*head, *core, *tail)]

    def example_condition(self, batch_size: int) -> dict[str, Tensor]:
        """Arguments that tell the model what to draw, for counting and measuring."""
        raise NotImplementedError


class ClassConditional(ElasticMixin):
    """A model with a condition of noise level and class label."""

    time_embed: TimestepEmbedding
    label_embed: LabelEmbedding

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

    def embed_condition(self, levels: Tensor, labels: Tensor | None) -> Tensor:
        """Condition (B, D) of all modulations, its nonlinearity applied once for all layers."""
        return F.silu(self.time_embed(levels) + self.label_embed(labels))

    def example_condition(self, batch_size: int) -> dict[str, Tensor]:
        return {"class_labels": torch.arange(batch_size) % self.config.num_classes}
