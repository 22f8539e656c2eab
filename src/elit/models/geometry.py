"""Sizes that a model is made with, checked once, without torch: input, groups, blocks, widths."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elit._numbers import check_whole, is_real, is_whole
from elit.interface.budget import check_num_latents
from elit.interface.fit import format_size
from elit.interface.grid import TokenGrid
from elit.layers.sizes import head_dim, pairs_per_axis

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

    @classmethod
    def of(cls, config: Mapping[str, Any], always_split: bool = False) -> "Geometry":
        """Check a model's arguments, where one number stands for all axes, or raise a ValueError.

        A plain model has a head and a tail too if `always_split`.
        """
        sample_size, group = config["sample_size"], config["group"]
        num_axes = len(sample_size) if isinstance(sample_size, Sequence) else 2
        if num_axes not in (2, 3):
            raise ValueError(
                f"sample_size={sample_size!r} has {num_axes} axes; give (h, w) or (t, h, w)"
            )
        check_whole(config["in_channels"], "in_channels")
        groups = None if group is None else per_axis(group, num_axes, "group")
        sizes = cls(
            per_axis(sample_size, num_axes, "sample_size"),
            config["in_channels"],
            per_axis(config["patch_size"], num_axes, "patch_size"),
            groups,
            _min_latents(config["min_latents"], groups),
            _split(config["depth"], config["head"], config["tail"], always_split or bool(groups)),
        )
        _check_widths(config, num_axes)
        return sizes

    @property
    def max_latents(self) -> int:
        """J, latents per group at full budget, 0 in a plain model."""
        return 0 if self.group is None else math.prod(self.group)

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch."""
        return self.in_channels * math.prod(self.patch_size)

    def grid(self, space: Sequence[int]) -> TokenGrid:
        """Token grid of an input of size (t,) h, w; a plain model's is one group."""
        sizes = list(zip(space, self.patch_size, self.group or (1,) * len(space), strict=True))
        if any(n % p for n, p, _ in sizes):
            nearest = [math.ceil(n / (p * g)) * p * g for n, p, g in sizes]
            raise ValueError(
                f"input of size {format_size(space)} cannot be cut into patches of "
                f"{format_size(self.patch_size)}; resize or pad it to {format_size(nearest)}"
            )
        tokens = tuple(n // p for n, p, _ in sizes)
        return TokenGrid(tokens, self.group or tokens)


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
            f"head={head} and tail={tail} leave no core of {depth} blocks; "
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


def _check_widths(config: Mapping[str, Any], num_axes: int) -> None:
    theta, ratio, dim = config.get("rope_theta"), config["mlp_ratio"], config["hidden_size"]
    if "rope_theta" in config and not (is_real(theta) and theta > 0):
        raise ValueError(f"rope_theta={theta!r} is not allowed; give a number above 0, as 10000")
    width = head_dim(dim, config["num_heads"])
    if "rope_theta" in config:
        pairs_per_axis(width, num_axes)  # raises now what a forward would raise
    hidden = ratio * dim if is_real(ratio) else 0
    if not is_real(hidden) or not is_whole(round(hidden)):
        raise ValueError(
            f"mlp_ratio={ratio!r} is not allowed with hidden_size={dim}; give one above 0, as 4"
        )
    if "num_classes" in config:
        check_whole(config["num_classes"], "num_classes")
