"""The named models have the paper's parameters and FLOPs. All on the meta device: no weights."""

import functools
import re

import pytest
import torch

from elit.cost.flops import forward_flops
from elit.models.dit import DiT
from elit.models.presets import PRESETS, SIZES, create_model, preset_config, preset_inputs


@functools.cache
def make(name: str, resolution: int) -> DiT:
    with torch.device("meta"):
        return create_model(name, resolution).requires_grad_(False)


def count_parameters(model: DiT) -> int:
    return sum(p.numel() for p in model.parameters())


def gigaflops(model: DiT, budget: float = 1.0) -> float:
    """GFLOPs of one forward pass of one sample; a multiply-add counts as 2."""
    return forward_flops(model, model.resolve_budget(budget)) / 1e9


def expected_gigaflops(width: int, depth: int, tokens: int) -> float:
    """The paper's count of a DiT: its blocks, patches and labels of a 4-channel input, patch 2."""
    block = 24 * tokens * width**2 + 4 * tokens**2 * width + 12 * width**2
    small = 4 * tokens * width * 4 * 2**2 + 6 * width**2 + 512 * width
    return (depth * block + small) / 1e9


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
    assert count_parameters(make(name, resolution)) == parameters


@pytest.mark.parametrize(
    ("name", "resolution", "figure"), [("dit-xl/2", 256, 2 * 118.6), ("dit-xl/2", 512, 1049.0)]
)
def test_flops_of_plain_models(name: str, resolution: int, figure: float) -> None:
    """DiT-XL/2 at 256 px is 118.6 GMAC."""
    assert gigaflops(make(name, resolution)) == pytest.approx(figure, rel=5e-3)


@pytest.mark.parametrize("size", ["tiny", "s", "b"])
def test_flops_are_the_papers_formula(size: str) -> None:
    with torch.device("meta"):
        model = create_model(f"dit-{size}/2", sample_size=32, in_channels=4).requires_grad_(False)
    expected = expected_gigaflops(SIZES[size].hidden_size, SIZES[size].depth, 256)
    assert gigaflops(model) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("budget", "figure"), [(1, 1083), (0.75, 877), (0.5, 685), (0.25, 503)])
def test_flops_of_the_elastic_xl_at_512_px(budget: float, figure: float) -> None:
    """At most 1 % above the paper's; below, because dropped latents are never made."""
    assert 0.96 * figure <= gigaflops(make("elit-dit-xl/2", 512), budget) <= 1.01 * figure


def test_the_interface_costs_little() -> None:
    """Read and Write take at most 3.5 % of XL's forward at 256 px."""
    elastic, plain = make("elit-dit-xl/2", 256), make("dit-xl/2", 256)
    assert 1 < gigaflops(elastic) / gigaflops(plain) < 1.035
    assert 1 < count_parameters(elastic) / count_parameters(plain) < 1.036


# Sizes of a family differ in width and depth alone: the least and the largest run by default.
@pytest.mark.parametrize(
    "name",
    [
        name
        if re.search("-(tiny|xl|sd3|qwen)/[24]$", name)
        else pytest.param(name, marks=pytest.mark.slow)
        for name in PRESETS
    ],
)
def test_every_preset_runs_at_every_resolution(name: str) -> None:
    is_tiny, patch, is_video = "tiny" in name, int(name.split("/")[1]), "video" in name
    groups = {256: (4, 4), 512: (8, 8), 1024: (8, 8)}
    for resolution in preset_inputs(name):
        config = preset_config(name, resolution)
        shallow = {part: 1 for part in ("head", "tail") if config.get(part)}  # blocks are alike
        shallow["depth"] = len(shallow) + 1
        with torch.device("meta"):
            model = create_model(name, resolution, **shallow).requires_grad_(False)
        side = resolution if is_tiny else resolution // 8
        assert model.sample_size == (8, side, side)[not is_video :]
        assert model.patch_size == (2 if is_tiny else 1, patch, patch)[not is_video :]
        assert model.is_elastic == name.startswith("elit-")
        if model.is_elastic and is_video:
            assert model.group == (2, 4, 4)
        elif model.is_elastic:
            assert model.group == groups.get(resolution, (4, 4))
            large = {512: 8, 1024: 8} if "sd3" in name or "qwen" in name else {512: 4}
            assert model.min_latents == large.get(resolution, 1)
        with torch.device("meta"):
            sample = torch.empty(1, model.in_channels, *model.sample_size)
            assert model(sample, 0.5, **model.example_condition(1)).sample.shape == sample.shape


def test_splits_are_the_papers() -> None:
    splits = {
        name: (size.head, size.depth - size.head - size.tail, size.tail)
        for name, size in SIZES.items()
    }
    paper = {"s": (3, 6, 3), "b": (3, 6, 3), "l": (4, 16, 4), "xl": (4, 20, 4)}
    assert splits == paper | {"tiny": (1, 2, 1), "sd3": (4, 16, 4), "qwen": (8, 44, 8)}
    assert make("elit-dit-xl/2", 256).split == (4, 20, 4)
    assert make("dit-xl/2", 256).split == (28, 0, 0)


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
    with pytest.raises(TypeError, match="depht"):
        create_model("dit-tiny/2", depht=3)
