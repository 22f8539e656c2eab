"""FLOPs of a model: by formulas where it is one of ours, else counted by PyTorch without memory.

A multiply-add counts as 2, attention included; element-wise work is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache as cached
from typing import TYPE_CHECKING, Any

from elit.caching.step_cache import StepCache
from elit.cost.formulas import Cost, ModelCost
from elit.interface.budget import TailDropping, default_budgets
from elit.models.presets import MODELS

if TYPE_CHECKING:
    from elit.models.elastic import ElasticMixin

# Paper: batch of a training step; forward and backward together cost three forwards.
TRAIN_BATCH = 256
TRAIN_BATCH_MULTI_BUDGET = 384


def cost_of(
    model: ElasticMixin, sample_size: Sequence[int] | None = None, text_tokens: int | None = None
) -> ModelCost:
    """Cost of a model; only its class and its config are used.

    Args:
        model: on any device.
        sample_size: size of the input, (t,) h, w; by default what the model was made for.
        text_tokens: length of its text; by default the longest.
    """
    kind = type(model)
    ours = kind.__module__.startswith("elit.") and kind.__name__.removeprefix("Elastic") in MODELS
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    if ours:
        return ModelCost(kind.__name__, config, sample_size, text_tokens)
    return CountedCost(kind, config, sample_size, text_tokens)


def forward_flops(
    model: ElasticMixin, num_latents: int | None = None, sample_size: Sequence[int] | None = None
) -> int:
    """FLOPs of one forward of one sample at a number of latents per group; None keeps all."""
    return cost_of(model, sample_size).flops(num_latents)


class CountedCost(ModelCost):
    """Cost of a class that no formula knows, such as one derived from ours: PyTorch counts it."""

    def __init__(
        self,
        model_class: Any,
        config: Mapping[str, Any],
        sample_size: Sequence[int] | None = None,
        text_tokens: int | None = None,
    ):
        super().__init__(model_class.__name__, config, sample_size, text_tokens)
        own = {} if text_tokens is None else {"max_text_length": text_tokens}
        self.made = model_class, dict(config) | own
        self.cost = cached(self._count)  # type: ignore[method-assign]

    def _count(self, num_latents: int | None = None) -> Cost:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        model = on_meta(*self.made)
        kwargs = {} if num_latents is None else {"num_latents": num_latents}
        # As matrix products: the counter misses what attention has of its own on a CPU.
        products = sdpa_kernel(SDPBackend.MATH)
        with torch.device("meta"), products, FlopCounterMode(display=False) as counter:
            sample = torch.zeros(1, model.in_channels, *self.sample_size)
            model(sample, torch.zeros(1), **model.example_condition(1), **kwargs)
        return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


def skipped_flops(
    model: ElasticMixin,
    cache: StepCache,
    num_latents: int | None = None,
    sample_size: Sequence[int] | None = None,
    text_tokens: int | None = None,
) -> int:
    """FLOPs of a forward of one sample whose blocks a step cache leaves out, counted by PyTorch.

    Args:
        model: on its device, without a cache.
        cache: that is to skip.
        num_latents: latents per group; None keeps all.
        sample_size: size of the input, (t,) h, w; by default what the model was made for.
        text_tokens: length of its text; by default the longest.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    always = replace(cache, threshold=math.inf if cache.kind == "FirstBlockCache" else 1e30)
    condition = model.example_condition(1)
    if "encoder_hidden_states" in condition:
        condition["encoder_hidden_states"] = condition["encoder_hidden_states"][:, :text_tokens]
    given = {name: value.to(model.device) for name, value in condition.items()}
    kept: dict[str, Any] = {} if num_latents is None else {"num_latents": num_latents}
    size = tuple(sample_size or model.sample_size)
    sample = torch.ones(1, model.in_channels, *size, device=model.device, dtype=model.dtype)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), model.cached(always.config()), sdpa_kernel(SDPBackend.MATH):
        for step in range(2):  # the first is computed
            level = torch.full((1,), 1 - step / 4, device=model.device)
            place = model.cache_context("cond", step_index=step, num_inference_steps=4)
            with place, counter if step else nullcontext():
                model(sample, level, **given, **kept)
        assert model.cache_counts() == (1, 1)
    return int(counter.get_total_flops())


def on_meta(model_class: Any, config: dict[str, Any]) -> Any:
    """Model of a config on the meta device: shapes without memory."""
    import torch

    with torch.device("meta"):
        model = model_class.from_config(config)
    return model.requires_grad_(False)  # the counter cannot expand views that want gradients


def step_flops(cost: ModelCost, samples: int, kept: Sequence[int | None]) -> int:
    """FLOPs of a training step: three forwards, as forward and backward cost.

    What gradient checkpointing computes again isn't counted: MFU is of what the model needs.

    Args:
        cost: of the model.
        samples: of the batch.
        kept: latents per group of each part of it.
    """
    each, rest = divmod(samples, len(kept))  # the first have one more: `tensor_split`
    return 3 * sum((each + (part < rest)) * cost.flops(n) for part, n in enumerate(kept))


def mean_flops(cost: ModelCost, dropping: TailDropping | None, draws: int = 1) -> float:
    """FLOPs of one forward of one sample, mean over the numbers of latents that training draws.

    Args:
        cost: of the model.
        dropping: what draws; None of a plain model.
        draws: numbers in a step: of one they are uniform, of more log-uniform.
    """
    if dropping is None:
        return cost.flops()
    drawn = range(dropping.min_latents, dropping.max_latents + 1)
    weights = {n: 1.0 if draws == 1 else math.log((n + 1) / n) for n in drawn}
    return sum(cost.flops(n) * weight for n, weight in weights.items()) / sum(weights.values())


def flops_report(
    cost: ModelCost,
    name: str,
    resolution: int | list[int],
    budgets: Sequence[float] | None = None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Cost of a model at several budgets, as plain types for JSON.

    Args:
        cost: of the model.
        name: what to call it.
        resolution: what to say of its input: pixels of a side, or of height and width.
        budgets: budgets of the rows, each shown as the one that really runs; by default halves
            of 1 down to the fewest latents the model is meant for.
        frames: what to say of its input, of a clip.

    Returns:
        "parameters"; "rows" of "budget", "num_latents" (None of a plain model) and "gflops" of a
        forward; "train_tflops", one training step at full budget, batch 256;
        "train_tflops_multi_budget", one with tail dropping, batch 384, averaged over 1 to all
        latents per group, as the paper counts it; "train_tflops_as_drawn", the same over
        "latents_drawn", the fewest and the most that training keeps; "text_tokens", length of the
        text.
    """
    most = cost.max_latents
    if budgets is None:
        budgets = default_budgets(cost.min_latents, most) if cost.is_elastic else [1]
    kept = dict.fromkeys(cost.resolve_budget(budget) for budget in budgets)
    multi_budget = drawn = None
    if cost.is_elastic:
        mean = mean_flops(cost, TailDropping(1, most, most))
        multi_budget = 3 * TRAIN_BATCH_MULTI_BUDGET * mean / 1e12
        if cost.min_latents > 1:
            mean = mean_flops(cost, TailDropping(cost.min_latents, most, most))
        drawn = 3 * TRAIN_BATCH_MULTI_BUDGET * mean / 1e12
    return {
        "model": name,
        "resolution": resolution,
        "parameters": cost.parameters,
        "train_tflops": 3 * TRAIN_BATCH * cost.flops() / 1e12,
        "train_tflops_multi_budget": multi_budget,
        "train_tflops_as_drawn": drawn,
        "latents_drawn": [cost.min_latents, most] if cost.is_elastic else None,
        "rows": [
            {"budget": cost.budget_of(n), "num_latents": n, "gflops": cost.flops(n) / 1e9}
            for n in kept
        ],
        "text_tokens": cost.text_tokens,
        "frames": frames,
    }
