"""Sizes that a model is made with, checked once, without torch: input, groups, blocks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from elit._numbers import check_whole, is_real, is_whole
from elit.interface.budget import check_num_latents
from elit.interface.grid import TokenGrid

_MOST_BLOCKS = 1000  # the largest models have tens; making one takes milliseconds


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model's input, patches and groups, and how its blocks are split."""

    sample_size: tuple[int, ...]  # (t,) h, w of the input that the model was made for
    in_channels: int  # of input and output
    patch_size: tuple[int, ...]  # input elements per token along each axis
    group: tuple[int, ...] | None  # tokens of one group along each axis, None in a plain model
    min_latents: int  # fewest latents per group that training keeps, 0 in a plain model
    split: tuple[int, int, int]  # blocks of head, core and tail
    rotary: tuple[int, float] | None  # width of a head, base of the wavelengths; None in a SiT

    @classmethod
    def of(
        cls,
        sample_size: int | Sequence[int],
        in_channels: int,
        patch_size: int | Sequence[int],
        group: int | Sequence[int] | None,
        min_latents: int,
        blocks: tuple[int, int, int],
        rotary: tuple[int, int, float] | None = None,
        always_split: bool = False,
    ) -> "Geometry":
        """Check a model's arguments, where one number stands for all axes, or raise a ValueError.

        `blocks` are depth, head and tail, which a plain model has too if `always_split`; `rotary`
        are the model's width, its heads and the base of the wavelengths.
        """
        num_axes = len(sample_size) if isinstance(sample_size, Sequence) else 2
        if num_axes not in (2, 3):
            raise ValueError(
                f"sample_size={sample_size!r} has {num_axes} axes; give (h, w) or (t, h, w)"
            )
        check_whole(in_channels, "in_channels")
        groups = None if group is None else per_axis(group, num_axes, "group")
        return cls(
            per_axis(sample_size, num_axes, "sample_size"),
            in_channels,
            per_axis(patch_size, num_axes, "patch_size"),
            groups,
            _min_latents(min_latents, groups),
            _split(*blocks, always_split or groups is not None),
            None if rotary is None else _rotary(*rotary, num_axes),
        )

    @property
    def max_latents(self) -> int:
        """J, latents per group at full budget, 0 in a plain model."""
        return 0 if self.group is None else math.prod(self.group)

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch."""
        return self.in_channels * math.prod(self.patch_size)

    def grid(self, shape: Sequence[int]) -> TokenGrid:
        """Token grid of an input of shape (B, C, *space); a plain model's is one group."""
        num_axes = len(self.patch_size)
        axes = "(batch, channels, height, width)"
        axes = axes if num_axes == 2 else axes.replace("height", "frames, height")
        if len(shape) != num_axes + 2 or shape[1] != self.in_channels:
            raise ValueError(
                f"input of shape {tuple(shape)} does not fit; "
                f"this model takes {axes} with {self.in_channels} channels"
            )
        if shape[0] < 1:
            raise ValueError("a batch of no samples; give at least one")
        return TokenGrid.of_input(tuple(shape[2:]), self.patch_size, self.group)


def per_axis(value: int | Sequence[int], num_axes: int, name: str) -> tuple[int, ...]:
    """Tuple of `num_axes` positive integers, from one number for all axes or one for each."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * num_axes
    if len(values) != num_axes or not all(is_whole(v) for v in values):
        raise ValueError(
            f"{name}={value!r} does not fit inputs of {num_axes} axes; "
            f"give one positive integer, or {num_axes} of them"
        )
    return tuple(map(int, values))


def check_core(depth: int, head: int, tail: int) -> None:
    """Raise a ValueError if no block is left between head and tail."""
    if head + tail >= depth:
        raise ValueError(
            f"a head of {head} and a tail of {tail} blocks leave no core of {depth}; "
            f"choose head + tail < {depth}"
        )


def _min_latents(min_latents: int, group: tuple[int, ...] | None) -> int:
    if group is not None:
        return check_num_latents(min_latents, math.prod(group), "min_latents")
    if min_latents != 1:
        raise ValueError(
            f"min_latents={min_latents} means nothing without groups; "
            f"give group=(4, 4) for an elastic model, or leave min_latents at 1"
        )
    return 0


def _split(depth: int, head: int, tail: int, has_core: bool) -> tuple[int, int, int]:
    """Blocks of head, core and tail."""
    advice = f"a positive integer, at most {_MOST_BLOCKS}"
    check_whole(depth, "depth", most=_MOST_BLOCKS, advice=advice)
    if not (is_whole(head, 0) and is_whole(tail, 0)):
        raise ValueError(
            f"a head of {head!r} and a tail of {tail!r} blocks are not allowed; give whole "
            f"numbers of at least 0"
        )
    if has_core:
        check_core(depth, head, tail)
        return head, depth - head - tail, tail
    if head or tail:
        raise ValueError(
            f"head={head} and tail={tail} mean nothing without groups; "
            f"give group=(4, 4) for an elastic model, or leave head and tail at 0"
        )
    return depth, 0, 0


def _rotary(dim: int, num_heads: int, theta: float, num_axes: int) -> tuple[int, float]:
    """Width of a head and base of the wavelengths."""
    from elit.layers.transformer import head_dim, pairs_per_axis

    if not is_real(theta) or theta <= 0:
        raise ValueError(f"rope_theta={theta!r} is not allowed; give a number above 0, as 10000")
    width = head_dim(dim, num_heads)
    pairs_per_axis(width, num_axes)  # raises now what a forward would raise
    return width, theta
