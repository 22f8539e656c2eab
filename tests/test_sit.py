"""SiT and ELIT-SiT: the goldens of the public format, its formulas, samplers, positions, costs."""

import functools
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import randomise
from safetensors.torch import load_file
from sit_reference import ReferenceSiT, make_state
from torch import Tensor, nn

import elit
from elit import CFG, AutoGuidance, CheapCFG, ElitPipeline, create_model, from_official_checkpoint
from elit.evaluation.flops import forward_flops
from elit.flow.schedulers import (
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchUniformEulerScheduler,
    FlowMatchUniformHeunScheduler,
    make_scheduler,
)
from elit.interface.grid import TokenGrid
from elit.interop.official_format import official_name, official_shapes
from elit.models.presets import SIT_SIZES
from elit.models.sit import SiT, sincos_positions

GOLDEN = Path(__file__).parent / "golden_sit"
VARIANTS = ("elit_tiny", "sit_tiny")


@functools.cache
def golden(variant: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and settings of a golden model."""
    numbers = load_file(GOLDEN / f"{variant}.io.safetensors")
    return numbers, json.loads((GOLDEN / f"{variant}.json").read_text())


def golden_model(variant: str) -> SiT:
    depth = {"encoder_depth": 2} if variant == "elit_tiny" else {}
    return from_official_checkpoint(GOLDEN / f"{variant}.weights.safetensors", num_heads=4, **depth)


shared_model = functools.cache(golden_model)  # for tests that change nothing in it


def latents_of(model: SiT, key: str) -> int | None:
    """`num_latents` of a tensor that ends in `b0.25`; None where it names no budget."""
    budget = key.partition(".b")[2]
    return model.resolve_budget(float(budget)) if budget else None


# ---- forwards ----


@pytest.mark.parametrize(
    ("variant", "key"),
    [(v, k) for v in VARIANTS for k in sorted(golden(v)[0]) if k.startswith("out")],
)
def test_forward_is_the_golden_one(variant: str, key: str) -> None:
    """At 5e-7 in float64, an epsilon within the root or of another size would show."""
    numbers, _ = golden(variant)
    wide = key.startswith("out_f64")
    model = golden_model(variant).to(torch.float64 if wide else torch.float32)
    x = numbers["x"].double() if wide else numbers["x"]
    with torch.no_grad():
        out = model(x, numbers["t"], numbers["y"], num_latents=latents_of(model, key)).sample
    assert out.dtype == numbers[key].dtype
    torch.testing.assert_close(out, numbers[key], rtol=0, atol=5e-7 if wide else 1e-5)


def test_every_stage_is_the_golden_one() -> None:
    numbers, _ = golden("elit_tiny")
    model = golden_model("elit_tiny")
    grid = TokenGrid((8, 8), (4, 4))
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module, *, raster: bool = False) -> None:
        def after(_: nn.Module, __: tuple, out: Tensor) -> None:
            seen[name] = grid.from_groups(out.unflatten(1, (4, -1))) if raster else out

        module.register_forward_hook(after)

    watch("x_embedder", model.patch_embed, raster=True)
    watch("t_embed", model.time_embed)
    watch("y_embed", model.label_embed)
    watch("encoder_out", model.blocks[1], raster=True)
    watch("read_latents", model.read, raster=True)
    watch("core_out", model.blocks[3])  # the first row of each group: raster order too
    watch("write_out", model.write, raster=True)
    watch("final_tokens", model.project, raster=True)
    before = {}
    model.blocks[2].register_forward_pre_hook(lambda _, given: before.update(core_in=given[0]))
    model.write.register_forward_pre_hook(lambda _, given: before.update(restored=given[1]))
    with torch.no_grad():
        model(numbers["x"], numbers["t"], numbers["y"], num_latents=4)
    seen["core_in"] = before["core_in"]
    seen["restored_latents"] = grid.from_groups(before["restored"].unflatten(1, (4, -1)))
    # Their features of a patch have the channel last, ours first.
    seen["final_tokens"] = seen["final_tokens"].unflatten(-1, (4, 2, 2)).movedim(2, -1).flatten(2)
    expected = {k.removeprefix("stage.b0.25."): v for k, v in numbers.items() if "stage." in k}
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=0, atol=1e-5, msg=name)


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


@pytest.mark.parametrize(
    ("variant", "key"), [(v, key) for v in VARIANTS for key in golden(v)[1]["grad"]]
)
def test_gradients_are_the_golden_ones(variant: str, key: str) -> None:
    numbers, settings = golden(variant)
    model = golden_model(variant)
    images, noise, t = numbers["grad.images"], numbers["grad.noise"], numbers["t"]
    level = t.view(-1, 1, 1, 1)
    kept = None if key == "none" else latents_of(model, f".{key}")
    out = model((1 - level) * images + level * noise, t, numbers["y"], num_latents=kept).sample
    loss = (out - (noise - images)).square().mean()
    loss.backward()
    expected = settings["grad"][key]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    ours = {official_name(name): p.grad for name, p in model.named_parameters()}
    assert ours.keys() == expected["params"].keys()
    for name, gradient in ours.items():
        wanted = expected["params"][name]["norm"]
        assert gradient.norm().item() == pytest.approx(wanted, rel=1e-4, abs=1e-6), name


# ---- samplers ----

SAMPLES = [(v, name) for v in VARIANTS for name in golden(v)[1]["samples"]]


def draw(variant: str, name: str, dtype: torch.dtype, euler: type | None = None) -> Tensor:
    """A golden sample's settings in our words."""
    numbers, settings = golden(variant)
    how = settings["samples"][name]
    if how["sampler"] == "euler_maruyama_sampler":
        scheduler = FlowMatchEulerMaruyamaScheduler(path=how.get("path_type", "linear"))
    elif how.get("heun"):
        scheduler = FlowMatchUniformHeunScheduler()
    else:
        scheduler = (euler or FlowMatchUniformEulerScheduler)()
    scale = how.get("cfg_scale", 1.0)
    interval = (how.get("guidance_low", 0.0), how.get("guidance_high", 1.0))
    cheap = how.get("unconditional_inference_budget")
    if cheap is None:
        guidance = CFG(scale, interval)
    else:
        guidance = (AutoGuidance if how.get("autoguidance") else CheapCFG)(scale, cheap, interval)
    pipeline = ElitPipeline(shared_model(variant), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        numbers["sample.y"],
        how.get("inference_budget", 1.0),
        how["num_steps"],
        guidance,
        generator=torch.Generator().manual_seed(how.get("torch_seed", 0)),
        noise=numbers["sample.latents"],
        output_type="latent",
        dtype=dtype,
    ).images


@pytest.mark.parametrize(("variant", "name"), SAMPLES)
def test_samples_are_the_golden_ones(variant: str, name: str) -> None:
    expected = golden(variant)[0][f"sample.{name}"]
    drawn = draw(variant, name, torch.float64)
    assert drawn.dtype == torch.float64
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    if name in ("ode_cfg2", "ode_ccfg", "heun_cfg2", "ode_autog"):  # of an SDE the noise is another
        drawn = draw(variant, name, torch.float32)
        assert drawn.dtype == torch.float32
        torch.testing.assert_close(drawn.double(), expected, rtol=0, atol=1e-5)


def test_noise_of_the_sde_is_the_golden_one() -> None:
    generator = torch.Generator().manual_seed(1234)
    for noise in golden("elit_tiny")[0]["sample.sde_noise"]:
        drawn = torch.randn(noise.shape, dtype=torch.float64, generator=generator)
        assert torch.equal(drawn, noise)


def test_diffusers_euler_draws_the_same_in_float32() -> None:
    numbers, _ = golden("elit_tiny")
    drawn = draw("elit_tiny", "ode_ccfg", torch.float32, lambda: make_scheduler("euler"))
    torch.testing.assert_close(drawn.double(), numbers["sample.ode_ccfg"], rtol=0, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"FlowMatchEulerDiscreteScheduler rounds samples to float32"
    ):
        draw("elit_tiny", "ode_ccfg", torch.float64, lambda: make_scheduler("euler"))
    for wrong in (torch.bfloat16, torch.int64, "float64"):
        with pytest.raises(ValueError, match="would lose what a step adds"):
            draw("elit_tiny", "ode_cfg1", wrong)


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
    level = float(torch.tensor(sigma))
    torch.testing.assert_close(result, x - level * (velocity - level * score), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"unknown path 'cosin': .*did you mean 'cosine'"):
        FlowMatchEulerMaruyamaScheduler(path="cosin")


# ---- settings, positions, initialisation ----


def test_keys_and_shapes_of_elit_sit_s_2() -> None:
    rows = [r.split("\t") for r in (GOLDEN / "keys_elit_sit_s2_256.tsv").read_text().splitlines()]
    expected = {key: tuple(json.loads(shape.strip("()").join("[]").replace(",]", "]")))
                for key, shape, _ in rows}  # fmt: skip
    with torch.device("meta"):
        shapes = official_shapes(create_model("elit-sit-s/2"))
        plain = official_shapes(create_model("sit-s/2"))
    assert shapes == expected
    assert sum(map(math.prod, shapes.values())) == 37_357_456
    assert plain == {k: v for k, v in expected.items() if "token_editor" not in k}
    assert sum(map(math.prod, plain.values())) == 32_957_200


@pytest.mark.parametrize("resolution", [256, 512])
def test_splits_of_the_presets_are_the_public_ones(resolution: int) -> None:
    splits = {"s": (8, 2, 2), "b": (8, 2, 2), "l": (8, 12, 4), "xl": (8, 16, 4)}
    assert SIT_SIZES.keys() == splits.keys()
    for size, split in splits.items():
        with torch.device("meta"):
            model = create_model(f"elit-sit-{size}/2", resolution)
        assert model.split == split
        assert model.own_grid() == TokenGrid((resolution // 16,) * 2, (resolution // 64,) * 2)


@pytest.mark.parametrize(
    ("budget", "gigaflops"),
    [(1, 245.4), (1 / 2, 176.6), (1 / 4, 143.1), (1 / 8, 126.5), (1 / 16, 118.3)],
)
def test_flops_of_xl_are_the_public_models(budget: float, gigaflops: float) -> None:
    with torch.device("meta"):
        model = create_model("elit-sit-xl/2").requires_grad_(False)
    counted = forward_flops(model, model.resolve_budget(budget)) / 1e9
    assert counted == pytest.approx(gigaflops, rel=1e-3)


@pytest.mark.parametrize(
    ("depth", "ratios"), [(8, (1.079, 0.953, 0.923)), (4, (1.079, 0.700, 0.610))]
)
def test_flops_of_b_over_the_plain_model(depth: int, ratios: tuple) -> None:
    with torch.device("meta"):
        model = create_model("elit-sit-b/2", head=depth).requires_grad_(False)
        plain = create_model("sit-b/2").requires_grad_(False)
    whole = forward_flops(plain)
    counted = [forward_flops(model, n) / whole for n in (16, 4, 1)]
    assert counted == pytest.approx(ratios, abs=1e-3)


def test_positions_of_a_stretched_grid_lie_between_the_model_s_own() -> None:
    model = golden_model("elit_tiny")  # 8x8 tokens
    grid = TokenGrid((8, 16), (4, 4))
    places = grid.token_places()
    stretched = torch.stack((places[:, 0], (places[:, 1] + 0.5) / 2 - 0.5), dim=1)
    like = torch.empty(1, 128, 64)
    torch.testing.assert_close(model.positions(grid, like), sincos_positions(stretched, 64))
    own = model.own_grid()
    exact = sincos_positions(own.token_places(), 64)
    assert torch.equal(model.positions(own, like[:, :64]), exact)
    with torch.no_grad():  # where latents' vectors are a plane, so they are between
        row, col = (axis[:, None] for axis in own.token_places().unbind(1))
        model.read.latent_places.copy_((3 * row + col).expand(-1, 64))
        found = model.read.places_on(grid)
        inner = (places[:, 1] > 2) & (places[:, 1] < 13) & (places[:, 0] > 1) & (places[:, 0] < 6)
        wanted = 3 * stretched[:, :1] + stretched[:, 1:]
        torch.testing.assert_close(found[inner], wanted[inner].expand(-1, 64), rtol=0, atol=0.3)
        sample = torch.randn(1, 4, 16, 32)
        assert model(sample, 0.5, num_latents=3).sample.shape == sample.shape


def test_positions_have_no_rounding_error_at_the_far_end() -> None:
    places = torch.tensor([[127.0, 63.0], [5.0, 126.0]])
    found = sincos_positions(places, 1152)
    for line, (row, col) in zip(found, places.tolist(), strict=True):
        for k, (axis, part) in itertools.product((0, 1, 100, 287), enumerate((col, row))):
            angle = part * 10_000 ** (-k / 288)
            at = 2 * 288 * axis + k
            assert line[at].item() == pytest.approx(math.sin(angle), abs=2e-7)
            assert line[at + 288].item() == pytest.approx(math.cos(angle), abs=2e-7)


def test_dropped_latents_reach_the_write_as_the_read_left_them() -> None:
    model = golden_model("elit_tiny")
    seen = {}
    model.read.register_forward_hook(lambda _, __, out: seen.update(read=out))
    model.write.register_forward_pre_hook(lambda _, given: seen.update(write=given[1]))
    with torch.no_grad():
        model(torch.randn(2, 4, 16, 16), 0.5, num_latents=5)
    read, written = (seen[name].unflatten(1, (4, 16)) for name in ("read", "write"))
    assert torch.equal(read[:, :, 5:], written[:, :, 5:])
    assert (read[:, :, :5] != written[:, :, :5]).any(-1).all()


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
