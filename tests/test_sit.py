"""SiT and ELIT-SiT: the public format's formulas, its samplers' steps, positions, costs."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import randomise
from sit_reference import ReferenceSiT, make_state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import elit
from elit import ElitPipeline, create_model, from_official_checkpoint
from elit.cost.flops import forward_flops, on_meta
from elit.flow.schedulers import (
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchUniformEulerScheduler,
    FlowMatchUniformHeunScheduler,
    make_scheduler,
)
from elit.interface.grid import TokenGrid
from elit.models.presets import SIT_SIZES, preset_config
from elit.models.sit import SiT, SiTBlock, sincos_positions


@pytest.mark.parametrize(
    ("changes", "encoder", "decoder"),
    [
        ({}, 2, 2),
        ({"group": None}, 0, 0),
        ({"qk_norm": True, "ratio": 2}, 1, 3),
        ({"side": 6, "patch": 1, "group": 3, "writes": 2, "depth": 4}, 1, 2),
        ({"group": None, "qk_norm": True, "channels": 3, "patch": 4, "classes": 2}, 0, 0),
        ({"side": 16, "group": 8, "width": 32, "heads": 2, "depth": 4, "qk_norm": True}, 1, 1),
    ],
    ids=["elastic", "plain", "qk-norm", "two writes", "plain qk-norm", "groups of 64"],
)
def test_equals_the_formulas(tmp_path, changes: dict, encoder: int, decoder: int) -> None:
    """An implementation of the format's formulas that shares no line with the library."""
    state = make_state(**changes)
    torch.save({"ema": state}, tmp_path / "x.pt")
    heads = changes.get("heads", 4)
    depths = {"encoder_depth": encoder, "decoder_depth": decoder} if encoder else {}
    model = from_official_checkpoint(tmp_path / "x.pt", num_heads=heads, **depths).double()
    reference = ReferenceSiT(state, heads, encoder, decoder)
    side = state["x_embedder.proj.weight"].shape[-1] * changes.get("side", 8)
    x = torch.randn(2, model.in_channels, side, side, dtype=torch.float64)
    sigma, labels = torch.tensor([0.1, 0.8]), torch.tensor([0, model.config.num_classes])
    for kept in (1, 3, model.max_latents) if model.is_elastic else (None,):
        with torch.no_grad():
            out = model(x, sigma, labels, num_latents=kept).sample
        # The table of positions and the features of time are float32 in both.
        torch.testing.assert_close(out, reference(x, sigma, labels, kept), rtol=0, atol=2e-6)


# ---- steps ----


@pytest.mark.parametrize(
    "scheduler", [FlowMatchUniformEulerScheduler, FlowMatchUniformHeunScheduler]
)
def test_a_float64_run_is_more_exact_than_float32(scheduler: type) -> None:
    """A constant velocity of 1/3 over 300 steps: the steps' rounding adds up in float32 alone."""
    errors = []
    for dtype in (torch.float32, torch.float64):
        steps = scheduler()
        steps.set_timesteps(300)
        sample = torch.full((4,), 1.0, dtype=dtype)
        velocity = torch.full((4,), 1 / 3, dtype=torch.float64).to(dtype)
        for timestep in steps.timesteps:
            (sample,) = steps.step(velocity, timestep, sample, return_dict=False)
        errors.append((sample.double() - 2 / 3).abs().max().item())
    assert errors[1] < 1e-14 < errors[0]


def test_the_cosine_path_of_euler_maruyama_has_no_drift_of_its_own() -> None:
    """At its own optimum for one point as data, the drift is (v - sigma * score) of closed form."""
    sigma, data = 0.6, torch.tensor([0.7], dtype=torch.float64)
    noise = torch.tensor([-1.3], dtype=torch.float64)
    angle = math.pi * sigma / 2
    x = math.cos(angle) * data + math.sin(angle) * noise
    velocity = math.pi / 2 * (math.cos(angle) * noise - math.sin(angle) * data)
    score = -noise / math.sin(angle)  # of N(cos(a) data, sin(a)^2)
    scheduler = FlowMatchEulerMaruyamaScheduler(path="cosine")
    scheduler.set_timesteps(1, sigmas=[sigma])
    (result,) = scheduler.step(velocity, scheduler.timesteps[0], x, return_dict=False)
    torch.testing.assert_close(result, x - sigma * (velocity - sigma * score))
    with pytest.raises(ValueError, match=r"unknown path 'cosin': .*did you mean 'cosine'"):
        FlowMatchEulerMaruyamaScheduler(path="cosin")


# ---- settings, positions, initialisation ----


@pytest.mark.parametrize("resolution", [256, 512])
def test_splits_of_the_presets_are_the_public_ones(resolution: int) -> None:
    splits = {"s": (8, 2, 2), "b": (8, 2, 2), "l": (8, 12, 4), "xl": (8, 16, 4)}
    assert SIT_SIZES.keys() == splits.keys()
    for size, split in splits.items():
        with torch.device("meta"):
            model = create_model(f"elit-sit-{size}/2", resolution)
        assert model.split == split
        assert model.own_grid() == TokenGrid((resolution // 16,) * 2, (resolution // 64,) * 2)
    model, plain = create_model("elit-sit-tiny/2"), create_model("sit-tiny/2", 32)
    assert (model.split, model.group, model.sample_size) == ((1, 2, 1), (4, 4), (16, 16))
    assert (plain.split, plain.group, plain.sample_size) == ((4, 0, 0), None, (32, 32))


XL, B, PLAIN_B = (
    "elit-sit-xl/2",
    "elit-sit-b/2",
    forward_flops(on_meta(SiT, preset_config("sit-b/2"))),
)


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [  # public figures, by latents kept: GFLOPs of XL, and B over the plain model
        (XL, 8, {16: 245.4e9, 8: 176.6e9, 4: 143.1e9, 2: 126.5e9, 1: 118.3e9}),
        (B, 8, {16: 1.079 * PLAIN_B, 4: 0.953 * PLAIN_B, 1: 0.923 * PLAIN_B}),
        (B, 4, {16: 1.079 * PLAIN_B, 4: 0.700 * PLAIN_B, 1: 0.610 * PLAIN_B}),
    ],
)
def test_flops_are_the_public_models(name: str, head: int, expected: dict) -> None:
    model = on_meta(SiT, preset_config(name, overrides={"head": head}))
    for kept, flops in expected.items():
        assert forward_flops(model, kept) == pytest.approx(flops, rel=1e-3)


def elastic_model() -> SiT:
    """8x8 tokens in groups of 4x4."""
    return randomise(SiT(16, 4, 2, 64, 4, 6, 10, group=4, head=2, tail=2))


def in_groups(height: int, width: int) -> list[tuple[int, int]]:
    """Row and column of each token, in groups of 4x4 one after the other."""
    return [
        (row, col)
        for top in range(0, height, 4) for left in range(0, width, 4)
        for row in range(top, top + 4) for col in range(left, left + 4)
    ]  # fmt: skip


@pytest.mark.parametrize("size", [(8, 8), (8, 16), (12, 4)])
def test_positions_are_sines_and_cosines_of_places_on_the_model_s_own_grid(size: tuple) -> None:
    """Columns first; the middles of the outer tokens are as far from the edge as their size."""
    rows, cols = np.array(in_groups(*size), dtype=np.float64).T
    rows, cols = ((rows + 0.5) * 8 / size[0] - 0.5, (cols + 0.5) * 8 / size[1] - 0.5)
    frequencies = 10_000.0 ** (-np.arange(16) / 16)
    waves = [
        wave(axis[:, None] * frequencies) for axis in (cols, rows) for wave in (np.sin, np.cos)
    ]
    expected = torch.from_numpy(np.concatenate(waves, axis=1)).float()
    for dtype in (torch.float32, torch.float64):
        found = elastic_model().positions(
            TokenGrid(size, (4, 4)), torch.empty(1, math.prod(size), 64, dtype=dtype)
        )
        torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=1e-7)


def cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel of cubic convolution, with the slope -3/4 that resizing images uses."""
    d, a = np.abs(distance), -0.75
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


@pytest.mark.parametrize("size", [(8, 16), (12, 4)])
def test_places_of_latents_are_interpolated_on_another_grid(size: tuple) -> None:
    model = elastic_model()
    raster = np.zeros((8, 8, 64))
    raster[tuple(np.array(in_groups(8, 8)).T)] = model.read.latent_places.detach().numpy()
    for axis, tokens in enumerate(size):
        places = (np.arange(tokens) + 0.5) * 8 / tokens - 0.5
        taps = np.arange(-4, 12)  # beyond the edge, its last value
        weights = np.zeros((tokens, 8))
        for tap in taps:
            weights[:, np.clip(tap, 0, 7)] += cubic(places - tap)
        raster = np.moveaxis(np.tensordot(weights, raster, (1, axis)), 0, axis)
    expected = torch.from_numpy(raster[tuple(np.array(in_groups(*size)).T)]).float()
    grid = TokenGrid(size, (4, 4))
    torch.testing.assert_close(model.read.places_on(grid), expected, rtol=0, atol=2e-6)
    sample = torch.randn(1, 4, *(2 * n for n in size))
    with torch.no_grad():
        assert model(sample, 0.5, num_latents=3).sample.shape == sample.shape


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", [16, 32])
def test_a_forward_makes_no_tensor_of_python_numbers(side: int) -> None:
    """On a GPU each were a copy that the host waits for, and which no CUDA graph takes."""
    model = elastic_model()
    inputs = torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    with Operations() as seen, torch.no_grad():
        model(*inputs, num_latents=3)
    assert len(seen.names) > 100
    assert not [name for name in seen.names if "lift_fresh" in name or "_local_scalar" in name]
    with Operations() as seen:
        torch.tensor([1.0])
    assert any("lift_fresh" in name for name in seen.names)  # it is seen where it is done


def test_positions_have_no_rounding_error_at_the_far_end() -> None:
    places = torch.tensor([[127.0, 63.0], [5.0, 126.0]])
    found = sincos_positions(places, 1152)
    for line, (row, col) in zip(found, places.tolist(), strict=True):
        for k, (axis, part) in itertools.product((0, 1, 100, 287), enumerate((col, row))):
            angle = part * 10_000 ** (-k / 288)
            at = 2 * 288 * axis + k
            assert line[at].item() == pytest.approx(math.sin(angle), abs=2e-7)
            assert line[at + 288].item() == pytest.approx(math.cos(angle), abs=2e-7)


def test_initialisation_is_the_public_models() -> None:
    torch.manual_seed(0)
    model = SiT(16, 4, 2, 64, 4, 4, 10, group=4, head=1, tail=1)
    tokens, condition = torch.randn(2, 64, 64), torch.randn(2, 64)
    grid = model.own_grid()
    latents = model.read(tokens, condition, grid)  # does not depend on the input
    expected = model.read.latents.repeat(4, 1) + model.read.latent_places
    assert torch.equal(latents, expected.expand(2, -1, -1))
    written = model.write(tokens, latents, grid)  # adds its places alone
    assert torch.equal(written, model.write.places(tokens, grid))
    bound = 1 / 8  # torch's default of width 64: uniform within 1 / sqrt(64)
    for linear in (model.read.attention.to_q, model.read.attention.to_out, model.read.mlp[2]):
        assert bound * 0.95 < linear.weight.abs().max() <= bound
    assert model.read.attention.to_kv.bias.abs().max() > bound / 2
    xavier = math.sqrt(6 / (64 + 192))
    assert xavier * 0.95 < model.blocks[0].attention.to_qkv.weight.abs().max() <= xavier
    assert not model.blocks[0].attention.to_qkv.bias.any()
    for table in (model.read.latents, model.places.table, model.write.places.table,
                  model.read.latent_places, model.label_embed.table.weight):  # fmt: skip
        assert table.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": (4, 16, 16)}, r"has 3 axes, but a SiT takes images alone"),
        ({"hidden_size": 66, "num_heads": 3}, "hidden_size=66 cannot hold sines and cosines"),
        ({"qk_norm": "x"}, "qk_norm='x' is not allowed; give True or False"),
        ({"write_depth": 0}, "write_depth=0 is not allowed"),
        ({"group": None, "head": 0, "tail": 0, "write_depth": 2}, "leave it at 1 in a plain model"),
        ({"group": 3}, "8x8 tokens cannot be cut into groups of 3x3"),
        ({"num_heads": 5}, "width 64 cannot be divided into 5 heads"),
    ],
)
def test_settings_that_do_not_fit(changes: dict, message: str) -> None:
    sizes = {
        "sample_size": 16, "in_channels": 4, "patch_size": 2, "hidden_size": 64, "num_heads": 4,
        "depth": 4, "num_classes": 10, "group": 4, "head": 1, "tail": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        SiT(**sizes | changes)


@pytest.mark.parametrize("kept", [16, 3])
def test_a_step_cache_that_never_skips_changes_nothing(kept: int) -> None:
    model = randomise(SiT(8, 2, 1, 32, 2, 6, 3, group=4, head=2, tail=1), std=0.1)
    pipeline = ElitPipeline(model, make_scheduler("euler"))
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 2, 8, 8)

    def drawn() -> Tensor:
        given = {"noise": noise, "output_type": "latent", "num_inference_steps": 8}
        return pipeline([1], budget=kept / 16, **given).images

    before = drawn()
    model.enable_cache(elit.TeaCacheConfig(threshold=0.0))
    assert torch.equal(drawn(), before)
    model.disable_cache()
    model.enable_cache(elit.TeaCacheConfig(threshold=10.0))
    after = drawn()
    assert model.cache_counts()[1] > 0
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def test_a_block_makes_no_attention_to_throw_away() -> None:
    """Random numbers are drawn for its own parameters alone."""
    torch.manual_seed(0)
    SiTBlock(32, 2, 4.0, False)
    after = torch.rand(1)
    torch.manual_seed(0)
    for inside, out in ((32, 6 * 32), (32, 3 * 32), (32, 32), (32, 128), (128, 32)):
        nn.Linear(inside, out)
    assert torch.equal(torch.rand(1), after)
