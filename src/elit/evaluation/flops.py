"""Floating-point operations of a model, counted by running it, a large one without memory.

A multiply-add counts as 2, attention included; element-wise work is not counted.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from elit.models.elastic import ElasticMixin
from elit.retrofit.elastic import ElasticTransformer

# Paper: batch of a training step; forward and backward together cost three forwards.
TRAIN_BATCH = 256
TRAIN_BATCH_MULTI_BUDGET = 384

# FLOPs of a forward, by all that they hang on; the oldest go when a server asks for ever new sizes.
_COUNTED: dict[tuple, int] = {}
_MOST_COUNTED = 1024

# Up to these, arithmetic takes less time than shapes alone: those are worked out in Python.
_FEW_PARAMETERS = 2**21
_FEW_NUMBERS = 2**13  # in a sample


@dataclass(frozen=True)
class FlopsRow:
    """Cost of one forward of one sample at one budget; num_latents is None for a plain model."""

    budget: float
    num_latents: int | None
    gflops: float


@dataclass(frozen=True)
class FlopsReport:
    """Cost of a model.

    Attributes:
        model: its name.
        resolution: pixels of an image's side, or of height and width.
        parameters: number of parameters.
        train_tflops: one training step at full budget, batch 256.
        train_tflops_multi_budget: one step with tail dropping, batch 384, averaged over 1 to
            all latents per group, as the paper counts it; None for a plain model.
        rows: forward costs.
        text_tokens: length of the text that a text-conditional model reads; else None.
        frames: of a clip; None of an image.
    """

    model: str
    resolution: int | list[int]
    parameters: int
    train_tflops: float
    train_tflops_multi_budget: float | None
    rows: list[FlopsRow]
    text_tokens: int | None = None
    frames: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)


def on_meta(model_class: Any, config: dict[str, Any]) -> Any:
    """Model of a config on the meta device: shapes without memory."""
    with torch.device("meta"):
        model = model_class.from_config(config)
    return model.requires_grad_(False)  # the counter cannot expand views that want gradients


def forward_flops(
    model: ElasticMixin, num_latents: int | None = None, sample_size: Sequence[int] | None = None
) -> int:
    """Count one forward of one sample; what was counted once in this process is remembered.

    Args:
        model: on any device; only its shapes are used, and it is not changed.
        num_latents: latents per group; None is the full budget.
        sample_size: size of the input, (t,) h, w; by default what the model was made for.
    """
    size = tuple(model.sample_size if sample_size is None else sample_size)
    key = type(model), _shape_of(model), num_latents, size
    if key not in _COUNTED:
        if len(_COUNTED) >= _MOST_COUNTED:
            del _COUNTED[next(iter(_COUNTED))]
        _COUNTED[key] = _count(model, num_latents, size)
    return _COUNTED[key]


def _shape_of(model: ElasticMixin) -> str:
    """A digest of all that a model's cost hangs on besides its class: settings and parameters."""
    settings = {k: v for k, v in model.config.items() if not k.startswith("_")}  # no paths
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]  # adapters show here
    text = repr((sorted(settings.items()), shapes, next(model.parameters()).device.type == "meta"))
    return hashlib.sha256(text.encode()).hexdigest()


def _count(model: ElasticMixin, num_latents: int | None, size: tuple[int, ...]) -> int:
    if next(model.parameters()).device.type != "meta":
        model = on_meta(type(model), dict(model.config))
    shape = (1, model.in_channels, *size)
    device = "meta"
    few = sum(p.numel() for p in model.parameters()) <= _FEW_PARAMETERS
    if few and math.prod(shape) <= _FEW_NUMBERS:
        device = "cpu"
        model = copy.deepcopy(model).to_empty(device=device)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    kwargs = {} if num_latents is None else {"num_latents": num_latents}
    # As matrix products: the counter misses what attention has of its own on a CPU.
    products = sdpa_kernel(SDPBackend.MATH)
    with torch.device(device), products, FlopCounterMode(display=False) as counter:
        sample = torch.zeros(shape)
        with _each_kind_once(model.blocks, counter) as repeats:
            model(sample, torch.zeros(1), **model.example_condition(1), **kwargs)
    return counter.get_total_flops() + sum(repeats)


@contextmanager
def _each_kind_once(blocks: Iterable[nn.Module], counter: FlopCounterMode) -> Iterator[list[int]]:
    """Run only one block of those that have the same shapes; a list of what the others cost.

    Without memory an operation still takes a tenth of a millisecond: an XL's blocks, a second.
    """
    counted: dict[tuple, tuple[int, Any]] = {}
    repeats: list[int] = []

    def run(block: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
        given = (x.shape if isinstance(x, Tensor) else x for x in tree_leaves(args))
        key = type(block), *(p.shape for p in block.parameters()), *given
        if key in counted:
            repeats.append(counted[key][0])
        else:
            before = counter.get_total_flops()
            result = forward(*args)
            counted[key] = counter.get_total_flops() - before, result
        return counted[key][1]

    # What a retrofit put around a block, Read or Write, costs too: those run all.
    alike = [block for block in blocks if "forward" not in vars(block)]
    for block in alike:
        block.forward = partial(run, block, block.forward)
    try:
        yield repeats
    finally:
        for block in alike:
            del block.forward  # the class's again


class ElasticFlops:
    """Cost of a forward as a function of the latents per group; a text is as long as may be.

    It is a polynomial of degree 2 (attention among latents is the square), so three counts give all
    the others exactly. A retrofit's full budget is apart: its adapters cost nothing there.
    """

    def __init__(self, model: ElasticMixin, sample_size: Sequence[int] | None = None):
        most = model.max_latents
        last = max(1, most - 1) if isinstance(model, ElasticTransformer) else most
        points = {1, (1 + last) // 2, last}
        counts = {n: forward_flops(model, n, sample_size) for n in sorted({*points, most})}
        self.full = most, counts[most]
        self.counts = {n: counts[n] for n in points}

    def __call__(self, num_latents: int) -> int:
        """Flops of a forward of one sample: Lagrange's polynomial, in exact arithmetic."""
        if num_latents == self.full[0]:
            return self.full[1]
        total = Fraction(0)
        for point, count in self.counts.items():
            term = Fraction(count)
            for other in self.counts.keys() - {point}:
                term *= Fraction(num_latents - other, point - other)
            total += term
        return int(total)


def flops_report(
    model: ElasticMixin,
    name: str,
    resolution: int | list[int],
    budgets: Sequence[float] | None = None,
    frames: int | None = None,
) -> FlopsReport:
    """Count a model at several budgets.

    Args:
        model: best made by `on_meta`.
        name: what to call it.
        resolution: what to say of its input.
        budgets: budgets of the rows, each shown as the one that really runs; by default halves
            of 1 down to the fewest latents the model is meant for.
        frames: what to say of its input, of a clip.
    """
    most = model.max_latents
    if budgets is None:
        budgets = default_budgets(model.min_latents, most) if model.is_elastic else [1]
    kept = dict.fromkeys(model.resolve_budget(budget) for budget in budgets)
    multi_budget = None
    if not model.is_elastic:
        full = forward_flops(model)
        rows = [FlopsRow(1.0, None, full / 1e9)]
    else:
        flops = ElasticFlops(model)
        full = flops(most)
        rows = [FlopsRow(model.budget_of(n), n, flops(n or most) / 1e9) for n in kept]
        mean = sum(flops(n) for n in range(1, most + 1)) / most
        multi_budget = 3 * TRAIN_BATCH_MULTI_BUDGET * mean / 1e12
    return FlopsReport(
        model=name,
        resolution=resolution,
        parameters=sum(p.numel() for p in model.parameters()),
        train_tflops=3 * TRAIN_BATCH * full / 1e12,
        train_tflops_multi_budget=multi_budget,
        rows=rows,
        text_tokens=model.config.max_text_length if model.takes_text else None,
        frames=frames,
    )


def default_budgets(min_latents: int, max_latents: int) -> list[float]:
    """1, 1/2, 1/4, ... down to `min_latents` of `max_latents`."""
    budgets = [1.0]
    while budgets[-1] / 2 * max_latents >= min_latents:
        budgets.append(budgets[-1] / 2)
    return budgets
