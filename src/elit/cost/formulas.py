"""What a model of ours costs, by formulas from its config alone: no torch, and nothing is built.

A function for each kind of layer says what it holds and does; a model is a sum of them.
`tests/test_presets.py` compares them with what the real modules hold and PyTorch counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from elit._numbers import MOST
from elit.interface.budget import Budgeted, check_num_latents
from elit.interface.fit import format_size
from elit.layers.sizes import slab_size
from elit.models.geometry import Geometry
from elit.retrofit.settings import interface_heads

TIME_FEATURES = 256
# What the models' classes take where a config has nothing.
_DEFAULTS = {
    "group": None, "head": 0, "tail": 0, "min_latents": 1, "mlp_ratio": 4.0, "kernel_size": 7,
    "qk_norm": False, "write_depth": 1, "text_dim": None, "vocab_size": None, "pooled_dim": None,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Parameters, and FLOPs of one forward of one sample; a multiply-add counts as 2."""

    parameters: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.flops + other.flops)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.parameters * times, self.flops * times)


# ---- layers: what they are in `layers/` and `interface/` ----


def linear(rows: int, width: int, out: int, bias: bool = True) -> Cost:
    """A linear layer on so many rows."""
    return Cost(width * out + bias * out, 2 * rows * width * out)


def learned(vectors: int, width: int) -> Cost:
    """Learned vectors: tables, weights of norms."""
    return Cost(vectors * width)


def attend(queries: int, keys: int, width: int) -> Cost:
    """Softmax attention in which every query sees so many keys: two products."""
    return Cost(flops=4 * queries * keys * width)


def mlp(rows: int, width: int, ratio: float = 1, bias: bool = True) -> Cost:
    """Two linear layers."""
    hidden = round(ratio * width)
    return linear(rows, width, hidden, bias) + linear(rows, hidden, width, bias)


def self_attention(rows: int, width: int, norms: Cost, attention: Cost) -> Cost:
    """Queries, keys, values and output of `attention`."""
    return linear(rows, width, 3 * width) + norms + attention + linear(rows, width, width)


def cross_attention(
    queries: int, context: int, groups: int, width: int, norms: Cost, projected: int | None = None
) -> Cost:
    """Attention within groups; queries that all groups share are `projected` once."""
    return (
        linear(queries if projected is None else projected, width, width)
        + linear(context, width, 2 * width)
        + norms
        + attend(queries, context // groups, width)
        + linear(queries, width, width)
    )


def block(
    rows: int, width: int, ratio: float, norms: Cost, attention: Cost, condition: int | None = None
) -> Cost:
    """A transformer block with adaLN-Zero."""
    modulation = linear(1, condition or width, 6 * width)
    return modulation + self_attention(rows, width, norms, attention) + mlp(rows, width, ratio)


def adapters(rows: int, width: int, ratio: float, rank: int) -> Cost:
    """Low-rank adapters of the linear layers of a block."""
    hidden = round(ratio * width)
    layers = (
        (1, width, 6 * width), (rows, width, 3 * width), (rows, width, width),
        (rows, width, hidden), (rows, hidden, width),
    )  # fmt: skip
    total = Cost()
    for n, inside, out in layers:
        total += linear(n, inside, rank, bias=False) + linear(n, rank, out)
    return total


# ---- models ----


class ModelCost(Budgeted):
    """Sizes, parameters and FLOPs of a model of ours.

    Args:
        kind: name of its class, such as "DiT", or "ElasticDiT" of one that was elasticized.
        config: its arguments, with which the class would make a model.
        sample_size: size of the input, (t,) h, w; by default what the model was made for.
        text_tokens: length of its text; by default the longest.

    Raises:
        ValueError: of an input that patches or groups do not divide.
    """

    def __init__(
        self,
        kind: str,
        config: Mapping[str, Any],
        sample_size: Sequence[int] | None = None,
        text_tokens: int | None = None,
    ):
        retrofit = config.get("elastic") if kind.startswith("Elastic") else None
        self.kind = kind.removeprefix("Elastic")
        split = {"head": 1, "tail": 1} if self.kind == "HDiT" else {}
        self.config = config = _DEFAULTS | split | dict(config) | dict(retrofit or {})
        self.retrofit = retrofit is not None
        sizes = Geometry.of(config, always_split=self.kind == "HDiT")
        self.sizes, self.group = sizes, sizes.group
        self.max_latents, self.min_latents = sizes.max_latents, sizes.min_latents
        self.split, self.patch_dim = sizes.split, sizes.patch_dim
        self.sample_size = tuple(sample_size or sizes.sample_size)
        self.grid = sizes.grid(self.sample_size)
        if self.grid.num_tokens > MOST:
            raise ValueError(
                f"an input of size {format_size(self.sample_size)} has {self.grid.num_tokens} "
                f"tokens: a size is too large; choose a smaller one"
            )
        self.takes_text = self.kind == "MMDiT"
        self.text_tokens: Any = text_tokens or config.get("max_text_length")  # None without a text

        self.width, self.ratio = config["hidden_size"], config["mlp_ratio"]
        self.tokens, self.groups = self.grid.num_tokens, self.grid.num_groups
        # RMS norms of queries and keys, as all but a SiT's blocks have them.
        self.norms = learned(2, self.width // config["num_heads"])

    @cached_property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.cost().parameters

    def flops(self, num_latents: int | None = None) -> int:
        """FLOPs of a forward of one sample; of None at full budget."""
        return self.cost(num_latents).flops

    def cost(self, num_latents: int | None = None) -> Cost:
        """Both, at a number of latents per group; None keeps all."""
        if num_latents is not None:
            check_num_latents(num_latents, self.max_latents)
        kept = self.max_latents if num_latents is None else num_latents
        core = self.groups * kept if self.is_elastic else self.tokens
        width = self.width
        time = linear(1, TIME_FEATURES, width) + linear(1, width, width)
        if self.kind == "HDiT":
            return time + self._labels() + self._hourglass(core) + self._interface(core)
        model = time + linear(self.tokens, self.patch_dim, width)
        model += linear(1, width, 2 * width) + linear(self.tokens, width, self.patch_dim)
        if self.kind == "MMDiT":
            return model + self._text() + self._joint_blocks(core) + self._interface(core)
        model += self._labels()
        head, inner, tail = self.split
        model += self._block(self.tokens) * (head + tail) + self._block(core) * inner
        if self.kind == "UViT":
            outer, stretch = (min(head, tail), inner) if self.is_elastic else (0, head)
            model += linear(self.tokens, 2 * width, width) * outer
            model += linear(core, 2 * width, width) * ((stretch - 1) // 2)
        if self.retrofit:
            return model + self._retrofit(core)
        return model + (self._sit_interface() if self.kind == "SiT" else self._interface(core))

    def _labels(self) -> Cost:
        return learned(self.config["num_classes"] + 1, self.width)

    def _block(self, rows: int) -> Cost:
        norms = self.norms
        if self.kind == "SiT":  # LayerNorms, or none
            norms = norms * 2 if self.config["qk_norm"] else Cost()
        return block(rows, self.width, self.ratio, norms, attend(rows, rows, self.width))

    def _interface(self, core: int, norms: Cost | None = None) -> Cost:
        """Read and Write; nothing in a plain model."""
        norms = norms or self.norms
        if not self.is_elastic:
            return Cost()
        width, most, groups = self.width, self.max_latents, self.groups
        read = learned(3 * most, width) + linear(1, width, 3 * width) + mlp(core, width)
        shared = core // groups
        read += cross_attention(core, self.tokens, groups, width, norms, projected=shared)
        write = learned(most, width) + linear(1, width, 3 * width) + mlp(self.tokens, width)
        return read + write + cross_attention(self.tokens, core, groups, width, norms)

    def _sit_interface(self) -> Cost:
        """The public checkpoints' Read and Write, which make and see all latents."""
        if not self.is_elastic:
            return Cost()
        width, most, rows = self.width, self.max_latents, self.tokens
        own = self.sizes.grid(self.sizes.sample_size).num_tokens
        layer = cross_attention(rows, rows, self.groups, width, learned(2, width))
        layer += mlp(rows, width, bias=False)
        read = learned(most + own, width) + linear(1, width, 6 * width)
        return learned(2 * most, width) + read + layer * (1 + self.config["write_depth"])

    def _retrofit(self, core: int) -> Cost:
        """What `elasticize` adds: of a lossless one, nothing is done at full budget."""
        width, groups, settings = self.width, self.groups, self.config
        norms = learned(2, width // interface_heads(settings["num_heads"], width))
        added = linear(1, TIME_FEATURES, width) + linear(1, width, width)
        if settings["init"] == "identity":
            half = learned(2 * self.max_latents, width) + linear(1, width, 3 * width)
            added += half * 2 + mlp(core, width) + mlp(self.tokens, width)
            added += cross_attention(core, self.tokens, groups, width, norms)
            added += cross_attention(self.tokens, core, groups, width, norms)
            added += Cost(flops=2 * core * self.grid.tokens_per_group * width)  # means of cells
        else:
            added += self._interface(core, norms)
        if rank := settings["rank"]:
            head, inner, tail = self.split
            added += adapters(self.tokens, width, self.ratio, rank) * (head + tail)
            added += adapters(core, width, self.ratio, rank) * inner
        full = settings["init"] == "identity" and core == self.tokens
        return Cost(added.parameters) if full else added

    def _hourglass(self, core: int) -> Cost:
        """An HDiT's levels, from patches to patches."""
        merge = tuple(2 if p % 2 == 0 else 1 for p in self.sizes.patch_size)
        outer_size = tuple(n * m for n, m in zip(self.grid.size, merge, strict=True))
        outer, per_inner, narrow = math.prod(outer_size), math.prod(merge), self.width // 2
        patch_dim = self.patch_dim // per_inner
        keys = math.prod(slab_size(outer_size, self.config["kernel_size"]))
        near = attend(outer, keys, narrow)
        head, inner, tail = self.split
        ends = linear(outer, patch_dim, narrow) + linear(outer, narrow, patch_dim)
        ends += linear(1, self.width, 2 * narrow)
        ends += block(outer, narrow, self.ratio, self.norms, near, self.width) * (head + tail)
        merged = linear(self.tokens, per_inner * narrow, self.width)
        split = linear(self.tokens, self.width, per_inner * narrow)
        return ends + merged + split + learned(1, 1) + self._block(core) * inner

    def _text(self) -> Cost:
        """An MM-DiT's embedding of its text."""
        width, rows, config = self.width, self.text_tokens, self.config
        pooled = Cost()
        if config["pooled_dim"] is not None:
            pooled = linear(1, config["pooled_dim"], width) + linear(1, width, width)
        if config["text_dim"] is not None:
            return pooled + learned(1, config["text_dim"]) + linear(rows, config["text_dim"], width)
        attention = self_attention(rows, width, self.norms, attend(rows, rows, width))
        words = learned(4, width) + attention + mlp(rows, width, self.ratio)
        return pooled + learned(config["vocab_size"], width) + words * 2 + learned(2, width)

    def _joint_blocks(self, core: int) -> Cost:
        """An MM-DiT's blocks: two streams, one attention, and a last one without the text's."""
        head, inner, tail = self.split
        width, text = self.width, self.text_tokens
        stream = block(text, width, self.ratio, self.norms, Cost())

        def words(n: int) -> Cost:
            return stream + attend(text, text + n, width)

        def joint(n: int) -> Cost:
            attention = attend(n, text + n, width)
            return block(n, width, self.ratio, self.norms, attention) + words(n)

        blocks = joint(self.tokens) * (head + tail) + joint(core) * inner
        context = linear(1, width, 2 * width) + linear(text, width, 2 * width)
        last = self.tokens if tail or not self.is_elastic else core
        return blocks + words(last) * -1 + context + learned(1, width // self.config["num_heads"])
