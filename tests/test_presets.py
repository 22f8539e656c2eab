"""The named models: their sizes, and their costs by formulas, as counted and as published.

All on the meta device: no weights.
"""

import functools
import re

import pytest
from retrofit_models import make

from elit import elasticize
from elit.cost.flops import CountedCost, cost_of, flops_report, forward_flops, on_meta
from elit.cost.formulas import ModelCost
from elit.models.dit import DiT
from elit.models.presets import (
    PRESETS,
    SIZES,
    create_model,
    preset_class,
    preset_config,
    preset_inputs,
    preset_model,
)
from elit.reproduce.spread import SpreadDiT

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


@functools.cache
def shape_of(name: str, resolution: int | None = None) -> ModelCost:
    return ModelCost(preset_class(name), preset_config(name, resolution))


def gigaflops(name: str, resolution: int, budget: float = 1.0) -> float:
    """GFLOPs of one forward pass of one sample; a multiply-add counts as 2."""
    cost = shape_of(name, resolution)
    return cost.flops(cost.resolve_budget(budget)) / 1e9


# ---- by formulas, as the real modules hold and PyTorch counts ----


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
        if re.search("-(tiny|xl|sd3|qwen)/[124]$", case[0])
        else pytest.param(*case, marks=pytest.mark.slow)
        for case in CASES
    ],
)
def test_presets_have_their_sizes_and_cost_what_is_counted(name: str, resolution: int) -> None:
    """Of a few blocks: they are alike."""
    config = preset_config(name, resolution)
    few = {part: 1 for part in ("head", "tail") if config.get(part)} | {"depth": 5}
    model = on_meta(preset_model(name), config | few)
    cost = ModelCost(preset_class(name), config | few)
    for key in ("sample_size", "group", "split", "max_latents", "min_latents", "is_elastic"):
        assert getattr(cost, key) == getattr(model, key), key
    assert cost.takes_text == model.takes_text
    check(model, cost, some_of(cost)[-2:-1] or [None])

    is_tiny, patch, is_video = "tiny" in name, int(name.split("/")[1]), "video" in name
    side = resolution if is_tiny else resolution // (16 if "rae" in name else 8)
    assert model.sample_size == (8, side, side)[not is_video :]
    assert model.patch_size == (2 if is_tiny else 1, patch, patch)[not is_video :]
    assert model.is_elastic == name.startswith("elit-")
    if model.is_elastic and is_video:
        assert model.group == (2, 4, 4)
    elif model.is_elastic:
        is_wide = "sd3" in name or "qwen" in name
        assert model.group == ((8, 8) if resolution > 256 else (4, 4))
        assert model.min_latents == (1 if resolution < 512 else 8 if is_wide else 4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "resolution"), CASES)
def test_presets_cost_what_is_counted_at_every_budget(name: str, resolution: int) -> None:
    cost = shape_of(name, resolution)
    kept = list(range(1, cost.max_latents + 1)) or [None]
    model = on_meta(preset_model(name), preset_config(name, resolution))
    check(model, cost, kept[:: max(1, len(kept) // 8)])


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
    base = make("ours") if backbone == "ours" else create_model("sit-tiny/2", depth=4)
    model = elasticize(base, 2, 1, 4, init=init, rank=rank)
    cost = ModelCost(type(model).__name__, model.config)
    assert (cost.split, cost.max_latents) == ((2, cost.split[1], 1), 16)
    check(model, cost, [1, 6, 15, 16])
    assert forward_flops(model, 6) == cost.flops(6)


def test_a_class_of_another_forward_is_counted() -> None:
    """Its formula is not known, though it is derived from one whose is."""
    model = on_meta(SpreadDiT, preset_config("elit-dit-tiny/2", 16))
    assert cost_of(model).parameters == cost_of(on_meta(DiT, dict(model.config))).parameters
    assert forward_flops(model, 3) > 3.5 * forward_flops(on_meta(DiT, dict(model.config)), 3)


def test_what_was_counted_is_not_mistaken_for_another_model() -> None:
    """Same class and same parameters: the first one has two blocks more in its core."""
    ends = {"depth": 6, "head": 1, "tail": 1}, {"depth": 6, "head": 2, "tail": 2}
    models = [on_meta(SpreadDiT, preset_config("elit-dit-tiny/2", 16, end)) for end in ends]
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    few, many = (forward_flops(model, 1) for model in models)
    assert few < many
    assert [forward_flops(model, 1) for model in models] == [few, many]
    assert forward_flops(models[0], 2) > few
    assert forward_flops(models[0], 1, (16, 32)) > few


# ---- as published ----


def paper_block(tokens: int, width: int) -> int:
    return 24 * tokens * width**2 + 4 * tokens**2 * width + 12 * width**2


@pytest.mark.parametrize("num_latents", [1, 5, 16])
def test_an_elastic_model_costs_what_the_closed_form_says(num_latents: int) -> None:
    width, tokens, groups = SIZES["b"].hidden_size, 256, 16
    kept = groups * num_latents
    expected = 6 * paper_block(tokens, width) + 6 * paper_block(kept, width)
    expected += 4 * tokens * width * 16 + 6 * width**2 + 512 * width
    expected += 2 * num_latents * width**2 + 4 * tokens * width**2  # Read: queries once, context
    expected += 2 * kept * width**2 + 4 * kept * width**2  # output and MLP of the latents
    expected += 2 * tokens * width**2 + 4 * kept * width**2  # Write: queries, context
    expected += 2 * tokens * width**2 + 4 * tokens * width**2  # output and MLP of the tokens
    expected += 2 * 4 * kept * 16 * width  # both attentions, within groups of 16
    expected += 2 * 6 * width**2  # both modulations
    assert shape_of("elit-dit-b/2", 256).flops(num_latents) == expected


@pytest.mark.parametrize(
    ("name", "resolution", "parameters"),
    [
        ("dit-s/2", 256, 32_860_432),
        ("dit-b/2", 256, 130_305_040),
        ("dit-xl/2", 256, 674_820_304),  # paper: 675 M
        ("elit-dit-xl/2", 256, 698_802_928),  # paper: 698 M
        ("elit-dit-xl/2", 512, 699_024_112),  # 64 latents and places instead of 16
    ],
)
def test_parameters(name: str, resolution: int, parameters: int) -> None:
    assert shape_of(name, resolution).parameters == parameters


@pytest.mark.parametrize(
    ("name", "resolution", "budget", "figure", "low", "high"),
    [
        ("dit-xl/2", 256, 1, 2 * 118.6, 0.995, 1.005),  # DiT-XL/2 at 256 px is 118.6 GMAC
        ("dit-xl/2", 512, 1, 1049, 0.995, 1.005),
        # At most 1 % above the paper's; below, because dropped latents are never made.
        ("elit-dit-xl/2", 512, 1, 1083, 0.96, 1.01),
        ("elit-dit-xl/2", 512, 0.75, 877, 0.96, 1.01),
        ("elit-dit-xl/2", 512, 0.5, 685, 0.96, 1.01),
        ("elit-dit-xl/2", 512, 0.25, 503, 0.96, 1.01),
    ],
)
def test_flops(name: str, resolution: int, budget: float, figure, low, high) -> None:
    assert low * figure <= gigaflops(name, resolution, budget) <= high * figure


def test_the_interface_costs_little() -> None:
    """Read and Write take at most 3.5 % of XL's forward at 256 px."""
    elastic, plain = shape_of("elit-dit-xl/2", 256), shape_of("dit-xl/2", 256)
    assert 1 < elastic.flops() / plain.flops() < 1.035
    assert 1 < elastic.parameters / plain.parameters < 1.036


def test_splits_are_the_papers() -> None:
    splits = {
        name: (size.head, size.depth - size.head - size.tail, size.tail)
        for name, size in SIZES.items()
    }
    paper = {"s": (3, 6, 3), "b": (3, 6, 3), "l": (4, 16, 4), "xl": (4, 20, 4)}
    assert splits == paper | {"tiny": (1, 2, 1), "sd3": (4, 16, 4), "qwen": (8, 44, 8)}
    assert shape_of("elit-dit-xl/2", 256).split == (4, 20, 4)
    assert shape_of("dit-xl/2", 256).split == (28, 0, 0)


# ---- what is asked ----


@pytest.mark.parametrize(
    ("overrides", "budgets", "rows"),
    [
        ({"group": 1}, None, [(1.0, 1)]),  # one token has one budget
        ({}, [1, 0.3, 0.31, 0.01], [(1.0, 16), (5 / 16, 5), (1 / 16, 1)]),  # those that run
    ],
)
def test_rows_of_a_report(overrides: dict, budgets: list | None, rows: list) -> None:
    cost = ModelCost("DiT", preset_config("elit-dit-tiny/2", 16, overrides))
    report = flops_report(cost, "x", 16, budgets)
    assert [(row["budget"], row["num_latents"]) for row in report["rows"]] == rows


def test_presets_of_rae_latents_are_as_wide_as_their_tokens() -> None:
    names = [name for name in PRESETS if "rae-dit" in name]
    assert names == [
        f"{form}rae-dit-{size}/1" for form in ("", "elit-") for size in ("b", "l", "xl")
    ]
    for name in names:
        for resolution, side in ((256, 16), (512, 32)):
            config = preset_config(name, resolution)
            assert (config["sample_size"], config["in_channels"]) == (side, 768)
            assert config["hidden_size"] >= 768
        # Beside 2x2 of 4 channels: only what goes in and out of a token differs
        usual = name.replace("rae-", "").replace("/1", "/2")
        more = 2 * 2 * 256 * (768 - 16) * preset_config(name)["hidden_size"]
        assert gigaflops(name, 256) == pytest.approx(gigaflops(usual, 256) + more / 1e9)


def test_names_in_capitals_and_overrides() -> None:
    assert preset_config("ELIT-DiT-XL/2") == preset_config("elit-dit-xl/2", 256)
    changed = preset_config("elit-dit-tiny/2", overrides={"depth": 6, "group": (2, 4)})
    assert (changed["depth"], changed["group"]) == (6, (2, 4))
    model = create_model("dit-tiny/4", 32, num_classes=3)
    assert (model.config.num_classes, model.config.sample_size) == (3, 32)


@pytest.mark.parametrize(
    ("name", "near"),
    [("dit-xl2", "dit-xl/2"), ("elit-dit-x/2", "elit-dit-xl/2"), ("DiT-Tny/4", "dit-tiny/4")],
)
def test_unknown_presets_name_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"preset .*did you mean {near!r}") as caught:
        create_model(name)
    assert f" or {len(PRESETS) - 6} others" in str(caught.value)


def test_unknown_resolution_and_argument() -> None:
    with pytest.raises(ValueError, match="'dit-xl/2' is not made for 128 px; it knows 256 and 512"):
        create_model("dit-xl/2", 128)
    with pytest.raises(ValueError, match=re.escape("'dit-tiny/2' is not made for 256 px")):
        create_model("dit-tiny/2", 256)
    with pytest.raises(TypeError, match=r"'depht' of DiT: did you mean depth\?"):
        create_model("dit-tiny/2", depht=3)
