"""What every elastic model is asked: its grid, its split, its budgets, its checkpointing."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from elit._numbers import is_real, is_whole
from elit._wide import wide
from elit.caching.mixin import StepCaching
from elit.caching.ports import Block, BlockPort
from elit.interface.budget import check_num_latents, resolve_budget
from elit.interface.grid import TokenGrid
from elit.layers.attention import head_dim
from elit.layers.neighborhood import Neighborhood
from elit.layers.positions import Rotary, pairs_per_axis, rotary_embedding

_T = TypeVar("_T")
_MOST_BLOCKS = 1000  # the largest models have tens; making one takes milliseconds


def per_axis(value: int | Sequence[int], num_axes: int, name: str) -> tuple[int, ...]:
    """One number for all axes, or one for each, as a tuple of `num_axes` positive integers."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * num_axes
    if len(values) != num_axes or not all(is_whole(v) for v in values):
        raise ValueError(
            f"{name}={value!r} does not fit inputs of {num_axes} axes; "
            f"give one positive integer, or {num_axes} of them"
        )
    return values


def _can_look(value: Tensor) -> bool:
    """Whether to look at values neither makes a device wait nor cuts a compiled graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    is_plain = type(value) is Tensor and not torch._C._functorch.is_batchedtensor(value)
    return is_plain and value.device.type == "cpu"


def check_range(value: Tensor, low: float, high: float, name: str, advice: str) -> None:
    """Raise a ValueError if there is a number outside, or none, where it can be looked at."""
    if not _can_look(value) or not value.numel():
        return
    numbers = value.detach().to(**wide(value.device)).numpy()
    least, most = numbers.min(), numbers.max()
    if not (low <= least and most <= high):  # nor NaN
        wrong = least if not low <= least else most
        raise ValueError(f"{name} {wrong:g} is outside {low:g} ... {high:g}; {advice}")


def _check_indices(indices: Any, num_latents: int, max_latents: int) -> None:
    """Raise a ValueError unless it is a tensor that names so many latents, each once."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"latent_indices {indices!r:.60} are no tensor of whole numbers, int32 or int64"
        )
    if indices.shape != (num_latents,):
        raise ValueError(
            f"latent_indices of shape {tuple(indices.shape)} do not name num_latents = "
            f"{num_latents} latents; pass num_latents=len(latent_indices)"
        )
    if not _can_look(indices):
        return
    named = indices.tolist()
    if any(not -max_latents <= i < max_latents for i in named):
        raise ValueError(
            f"latent_indices {named!s:.60} are outside 0 ... {max_latents - 1}, the latents of a "
            f"group"
        )
    if len({i % max_latents for i in named}) < len(named):  # -1 is the last
        raise ValueError(f"latent_indices {named!s:.60} name a latent twice; give each once")


class ElasticMixin(StepCaching, ModelMixin):
    """Geometry, split and budgets of a transformer that may have a latent interface.

    Attributes:
        sample_size: (t,) h, w of the input the model was made for.
        patch_size: input elements per token along each axis.
        group: tokens of one group along each axis, None in a plain model.
        max_latents: J, latents per group at full budget, 0 in a plain model.
        min_latents: fewest latents per group that training keeps, 0 in a plain model.
        split: blocks of head, core and tail.
        takes_text: whether a text tells it what to draw, not a class label.
    """

    takes_text = False

    gradient_checkpointing: bool
    rotary_options: tuple[int, float]  # width of a head, base of the wavelengths

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as any diffusers model, but refuse weights that are not this model's.

        diffusers only warns of them and leaves what is missing random.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except TypeError as error:  # arguments of __init__ that another class's config lacks
            source = args[0] if args else "the checkpoint"
            raise ValueError(f"{source} does not hold a {cls.__name__}: {error}") from error
        wrong = [
            f"{len(info[kind])} {kind.replace('_', ' ')} "
            f"({', '.join(sorted(map(str, info[kind]))[:3])}, ...)"
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[kind]
        ]
        if wrong:
            raise ValueError(
                f"{args[0] if args else 'the checkpoint'} does not hold the weights of this "
                f"{cls.__name__}: {', '.join(wrong)}; load it with the class and the config it was "
                f"saved with, and save the bare model"
            )
        return (model, info) if wants_info else model

    def set_geometry(
        self,
        sample_size: int | Sequence[int],
        in_channels: int,
        patch_size: int | Sequence[int],
        group: int | Sequence[int] | None,
        min_latents: int,
    ) -> None:
        """Take the sizes from a config, where a single number stands for all axes."""
        num_axes = len(sample_size) if isinstance(sample_size, Sequence) else 2
        if num_axes not in (2, 3):
            raise ValueError(
                f"sample_size={sample_size!r} has {num_axes} axes; give (h, w) or (t, h, w)"
            )
        if not is_whole(in_channels):
            raise ValueError(f"in_channels={in_channels!r} is not allowed; give a positive integer")
        self.sample_size = per_axis(sample_size, num_axes, "sample_size")
        self.in_channels = in_channels
        self.patch_size = per_axis(patch_size, num_axes, "patch_size")
        self.patch_dim = in_channels * math.prod(self.patch_size)
        self.group = None if group is None else per_axis(group, num_axes, "group")
        self.max_latents = self.min_latents = 0
        if self.group is None and min_latents != 1:
            raise ValueError(
                f"min_latents={min_latents} means nothing without groups; "
                f"give group=(4, 4) for an elastic model, or leave min_latents at 1"
            )
        if self.group is not None:
            self.max_latents = math.prod(self.group)
            self.min_latents = check_num_latents(min_latents, self.max_latents, "min_latents")

    def set_split(self, depth: int, head: int, tail: int, always: bool = False) -> None:
        """Take the numbers of blocks from a config.

        Args:
            depth: blocks in all.
            head: blocks of the head.
            tail: blocks of the tail.
            always: whether a plain model has head and tail too.
        """
        if not is_whole(depth, most=_MOST_BLOCKS):
            raise ValueError(
                f"depth={depth!r} is not allowed; give a positive integer, at most {_MOST_BLOCKS}"
            )
        if not (is_whole(head, 0) and is_whole(tail, 0)):
            raise ValueError(
                f"a head of {head!r} and a tail of {tail!r} blocks are not allowed; give whole "
                f"numbers of at least 0"
            )
        if (always or self.group is not None) and head + tail >= depth:
            raise ValueError(
                f"a head of {head} and a tail of {tail} blocks leave no core of {depth}; "
                f"choose head + tail < depth"
            )
        if not (always or self.group) and (head or tail):
            raise ValueError(
                f"head={head} and tail={tail} mean nothing without groups; "
                f"give group=(4, 4) for an elastic model, or leave head and tail at 0"
            )
        has_core = always or self.group is not None
        self.split = (head, depth - head - tail, tail) if has_core else (depth, 0, 0)

    def set_rotary(self, hidden_size: int, num_heads: int, theta: float) -> None:
        """Take what rotations need from a config."""
        if not is_real(theta) or theta <= 0:
            raise ValueError(
                f"rope_theta={theta!r} is not allowed; give a number above 0, as 10000"
            )
        self.rotary_options = (head_dim(hidden_size, num_heads), theta)
        pairs_per_axis(self.rotary_options[0], len(self.sample_size))  # or an error, now

    def rotary(self, places: Tensor) -> Rotary:
        """Rotations of tokens or latents at these places."""
        return rotary_embedding(places, *self.rotary_options)

    def one_per_sample(self, value: Tensor | float, name: str, like: Tensor) -> Tensor:
        """Numbers (B,) of (B,) or of one number for all samples of a batch like (B, ...)."""
        if value is None:
            raise ValueError(f"{name} is None; give one number for each sample, or one for all")
        try:
            value = torch.as_tensor(value, device=like.device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"{name} {value!r:.60} is no number; give one for each sample, or one for all"
            ) from None
        if tuple(value.shape) not in ((), (1,), (len(like),)):
            raise ValueError(
                f"{name} of shape {tuple(value.shape)} does not fit a batch of {len(like)}; "
                f"give one number for each sample"
            )
        return value.expand(len(like))

    def noise_levels(self, timestep: Tensor | float, like: Tensor) -> Tensor:
        """Noise levels (B,) of a batch like (B, ...)."""
        levels = self.one_per_sample(timestep, "timestep", like)
        if levels.dtype == torch.bool or levels.is_complex():
            raise ValueError(f"timestep of {levels.dtype}; give noise levels from 0 to 1, floats")
        advice = "it is the noise level sigma, of which diffusers' timestep is 1000 times"
        check_range(levels, 0, 1 + 1e-3, "timestep", advice)
        return levels

    def check_input(self, x: Tensor) -> None:
        """Raise a ValueError unless the samples are a tensor of the model's dtype and device."""
        if not isinstance(x, Tensor) or not x.ndim:
            raise ValueError(f"hidden_states {x!r:.60} are no tensor (batch, channels, ...)")
        embed: Any = self.patch_embed
        weight = embed.weight
        if type(weight) not in (nn.Parameter, Tensor) or weight.element_size() == 1:
            return  # sharded or quantised: what it becomes is not known here
        moves = any(hasattr(m, h) for m in (self, embed) for h in ("_hf_hook", "_diffusers_hook"))
        if x.device != weight.device and not (moves or weight.is_meta):
            raise ValueError(
                f"hidden_states on {x.device}, but this {type(self).__name__} is on "
                f"{weight.device}; move one: hidden_states.to({str(weight.device)!r})"
            )
        casts = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        can_be_cast = x.is_floating_point() and x.element_size() <= 4
        if x.dtype != weight.dtype and not (casts and can_be_cast):
            raise ValueError(
                f"hidden_states of {x.dtype}, but this {type(self).__name__} is of {weight.dtype}; "
                f"convert one: hidden_states.to({weight.dtype}), or model.to(...)"
            )

    def example_condition(self, batch_size: int) -> dict[str, Tensor]:
        """What tells the model what to draw, by argument, for counting and measuring."""
        raise NotImplementedError

    @property
    def is_elastic(self) -> bool:
        """Whether the model has a latent interface: its own, or one that it was given."""
        return self.group is not None

    def resolve_budget(self, budget: float) -> int | None:
        """`num_latents` of a budget in (0, 1]; None, "all there is", for a plain model at 1."""
        if self.is_elastic:
            return resolve_budget(budget, self.max_latents)
        if budget == 1:
            return None
        raise ValueError(
            f"budget {budget} asked of a model that is not elastic; "
            f"leave the budget at 1, or use a model with groups (elit-...)"
        )

    def budget_of(self, num_latents: int | None) -> float:
        """Budget that `num_latents` really are; 1 for a plain model."""
        if not self.is_elastic or num_latents is None:
            return 1.0
        return check_num_latents(num_latents, self.max_latents) / self.max_latents

    def check_num_latents(self, num_latents: int | None, indices: Tensor | None) -> int:
        """`num_latents`, or the number of all latents, or an error. 0 in a plain model."""
        if not self.is_elastic:
            if num_latents is not None or indices is not None:
                raise ValueError(
                    f"num_latents {num_latents} asked of a model that is not elastic; "
                    f"leave it out, or use a model with groups (elit-...)"
                )
            return 0
        if num_latents is None:
            num_latents = self.max_latents
        if indices is not None and self.group is None:
            name = type(self).__bases__[-1].__name__
            raise ValueError(
                f"an elasticized {name} keeps the first latents; leave latent_indices out"
            )
        if indices is not None:
            _check_indices(indices, num_latents, self.max_latents)
        return check_num_latents(num_latents, self.max_latents)

    def token_grid(self, x: Tensor) -> TokenGrid:
        """Token grid of an input (B, C, *space), checked against channels, patch and groups."""
        num_axes = len(self.patch_size)
        axes = "(batch, channels, height, width)"
        axes = axes if num_axes == 2 else axes.replace("height", "frames, height")
        if x.ndim != num_axes + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"input of shape {tuple(x.shape)} does not fit; "
                f"this model takes {axes} with {self.in_channels} channels"
            )
        space = tuple(x.shape[2:])
        if len(x) < 1:
            raise ValueError("a batch of no samples; give at least one")
        return TokenGrid.of_input(space, self.patch_size, self.group)

    def split_blocks(self, blocks: Iterable[_T]) -> tuple[list[_T], ...]:
        """Head, core and tail of the blocks."""
        head, core, _ = self.split
        blocks = list(blocks)
        return blocks[:head], blocks[head : head + core], blocks[head + core :]

    def cache_blocks(self) -> list[Block]:
        """Blocks, Read and Write: a skipped Read hands on the tokens, a skipped Write the same."""
        head, core, tail = self.split_blocks(self.blocks)
        if self.group is not None:
            if not head:
                raise ValueError(
                    f"a step cache watches the first block on tokens, but this "
                    f"{type(self).__name__} has no head; use a model with head >= 1"
                )
            core = [self.read, *core, self.write]
        return [(block, BlockPort.of(block)) for block in (*head, *core, *tail)]

    def run(
        self,
        blocks: Iterable[nn.Module],
        x: Tensor,
        condition: Tensor,
        rotary: Rotary | Neighborhood | None,
        *more: Tensor,
    ) -> Tensor:
        """Run blocks one after the other, checkpointed where that is switched on."""
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, condition, rotary, *more)
            else:
                x = block(x, condition, rotary, *more)
        return x
