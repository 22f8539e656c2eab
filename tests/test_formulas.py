"""Formulas of parameters and FLOPs, against what the real modules hold and PyTorch counts."""

import re

import pytest
import torch
from retrofit_models import make

from elit import elasticize
from elit.cost.flops import CountedCost, forward_flops, on_meta
from elit.cost.formulas import ModelCost
from elit.models.presets import (
    PRESETS,
    preset_class,
    preset_config,
    preset_inputs,
    preset_model,
)

CASES = [(name, resolution) for name in PRESETS for resolution in preset_inputs(name)]
ODD = [
    ("elit-dit-tiny/2", {"depth": 5, "head": 0, "tail": 3, "mlp_ratio": 2.3, "group": (2, 4)}),
    ("elit-dit-tiny/2", {"group": 1, "sample_size": (16, 24), "num_classes": 3}),
    ("dit-tiny/2", {"depth": 1}),
    ("uvit-tiny/2", {"depth": 6}),
    ("elit-uvit-tiny/2", {"depth": 9, "head": 3, "tail": 1}),
    ("elit-uvit-tiny/2", {"depth": 4, "head": 0, "tail": 0}),
    ("hdit-tiny/2", {"kernel_size": 3, "sample_size": (24, 40)}),
    ("elit-hdit-tiny/2", {"kernel_size": 9, "sample_size": (4, 16, 16), "patch_size": (1, 2, 2),
                          "group": (2, 4, 4)}),
    ("elit-mmdit-tiny/2", {"tail": 0, "pooled_dim": 48}),
    ("mmdit-tiny/2", {"vocab_size": None, "text_dim": 24, "max_text_length": 5, "depth": 1}),
    ("elit-sit-tiny/2", {"qk_norm": True, "write_depth": 3, "group": (2, 4), "depth": 7}),
    ("sit-tiny/2", {"qk_norm": True, "mlp_ratio": 1.5}),
]  # fmt: skip


def check(model, cost: ModelCost, kept: list[int | None], size=None) -> None:
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    counted = CountedCost(type(model), model.config, size)
    assert [cost.flops(n) for n in kept] == [counted.flops(n) for n in kept]


def some_of(cost: ModelCost) -> list[int | None]:
    """The fewest latents, an odd number of them and all."""
    if not cost.is_elastic:
        return [None]
    return sorted({1, max(1, cost.max_latents // 2 - 1), cost.max_latents})


# Sizes of a family differ in width and depth alone: the least and the largest run by default.
@pytest.mark.parametrize(
    ("name", "resolution"),
    [
        case
        if re.search("-(tiny|xl|sd3|qwen)/[24]$", case[0])
        else pytest.param(*case, marks=pytest.mark.slow)
        for case in CASES
    ],
)
def test_presets_cost_what_is_counted(name: str, resolution: int) -> None:
    """Of a few blocks: they are alike."""
    config = preset_config(name, resolution)
    few = {part: 1 for part in ("head", "tail") if config.get(part)} | {"depth": 5}
    model = on_meta(preset_model(name), config | few)
    cost = ModelCost(preset_class(name), config | few)
    for key in ("sample_size", "group", "split", "max_latents", "min_latents", "is_elastic"):
        assert getattr(cost, key) == getattr(model, key), key
    assert cost.takes_text == model.takes_text
    check(model, cost, some_of(cost)[-2:-1] or [None])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "resolution"), CASES)
def test_presets_cost_what_is_counted_at_every_budget(name: str, resolution: int) -> None:
    config = preset_config(name, resolution)
    cost = ModelCost(preset_class(name), config)
    kept = list(range(1, cost.max_latents + 1)) or [None]
    check(on_meta(preset_model(name), config), cost, kept[:: max(1, len(kept) // 8)])


@pytest.mark.parametrize(("name", "overrides"), ODD)
def test_odd_configs_cost_what_is_counted(name: str, overrides: dict) -> None:
    config = preset_config(name, overrides=overrides)
    model = on_meta(preset_model(name), config)
    for of in (config, dict(model.config)):  # with the classes' defaults left out, and spelt
        cost = ModelCost(preset_class(name), of)
        check(model, cost, some_of(cost))


@pytest.mark.parametrize("name", ["elit-dit-tiny/2", "elit-sit-tiny/2", "hdit-tiny/2"])
def test_another_size_of_input_costs_what_is_counted(name: str) -> None:
    model = on_meta(preset_model(name), preset_config(name))
    kept = [None] if name == "hdit-tiny/2" else [3, 16]
    check(model, ModelCost(preset_class(name), model.config, (16, 40)), kept, (16, 40))


def test_a_shorter_text_costs_less() -> None:
    config = preset_config("elit-mmdit-tiny/2")
    short = ModelCost("MMDiT", config, text_tokens=3)
    assert short.flops(2) == ModelCost("MMDiT", config | {"max_text_length": 3}).flops(2)
    assert short.parameters == ModelCost("MMDiT", config).parameters


@pytest.mark.parametrize("backbone", ["ours", "sit"])
@pytest.mark.parametrize("init", ["identity", "learned"])
@pytest.mark.parametrize("rank", [0, 3])
def test_retrofits_cost_what_is_counted(backbone: str, init: str, rank: int) -> None:
    base = (
        make("ours")
        if backbone == "ours"
        else preset_model("sit-tiny/2")(**preset_config("sit-tiny/2", overrides={"depth": 4}))
    )
    model = elasticize(base, 2, 1, 4, init=init, rank=rank)
    cost = ModelCost(type(model).__name__, model.config)
    assert (cost.split, cost.max_latents) == ((2, cost.split[1], 1), 16)
    check(model, cost, [1, 6, 15, 16])
    with torch.no_grad():
        assert forward_flops(model, 6) == cost.flops(6)
