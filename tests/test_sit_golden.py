"""SiT and ELIT-SiT equal the golden values of the public format."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from elit import CFG, AutoGuidance, CheapCFG, ElitPipeline, create_model, from_official_checkpoint
from elit.flow.schedulers import (
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchUniformEulerScheduler,
    FlowMatchUniformHeunScheduler,
    make_scheduler,
    start_sampling,
)
from elit.interface.grid import TokenGrid
from elit.interface.raster import from_groups
from elit.interop.official import official_name, official_shapes
from elit.models.sit import SiT

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
            seen[name] = from_groups(grid, out.unflatten(1, (4, -1))) if raster else out

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
    seen["restored_latents"] = from_groups(grid, before["restored"].unflatten(1, (4, -1)))
    # Their features of a patch have the channel last, ours first.
    seen["final_tokens"] = seen["final_tokens"].unflatten(-1, (4, 2, 2)).movedim(2, -1).flatten(2)
    expected = {k.removeprefix("stage.b0.25."): v for k, v in numbers.items() if "stage." in k}
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=0, atol=1e-5, msg=name)


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
    ours = {official_name(name): as_theirs(model, name, p.grad) for name, p in
            model.named_parameters()}  # fmt: skip
    assert ours.keys() == expected["params"].keys()
    for name, gradient in ours.items():
        wanted = expected["params"][name]
        norm, size = wanted["norm"], gradient.numel()
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), name
        # A sum gathers the rounding errors of all its terms.
        near = 1e-5 * norm * math.sqrt(size) + 1e-6
        assert gradient.double().sum().item() == pytest.approx(wanted["sum"], abs=near), name
        first = gradient.flatten()[: len(wanted["first"])].tolist()
        assert first == pytest.approx(wanted["first"], rel=1e-4, abs=1e-5 * norm + 1e-7), name


def as_theirs(model: SiT, name: str, value: Tensor) -> Tensor:
    """A parameter of ours, or its gradient, in the order of the public files."""
    if name.startswith("project.linear."):  # rows: channels last
        return value.unflatten(0, (model.in_channels, 4)).transpose(0, 1).flatten(0, 1)
    if name == "read.latent_places":  # places in raster order
        return from_groups(TokenGrid((8, 8), (4, 4)), value.view(1, 4, 16, -1))[0]
    return value


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("variant", "name"), SAMPLES)
def test_samples_are_the_golden_ones(variant: str, name: str, dtype: torch.dtype) -> None:
    drawn = draw(variant, name, dtype)
    assert drawn.dtype == dtype
    expected = golden(variant)[0][f"sample.{name}"]
    torch.testing.assert_close(drawn.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [("ode", FlowMatchUniformEulerScheduler), ("sde", FlowMatchEulerMaruyamaScheduler)],
)
def test_levels_and_the_guided_ones_are_the_golden_ones(
    variant: str, kind: str, scheduler: type
) -> None:
    settings = golden(variant)[1]
    levels = [*start_sampling(scheduler(), 10, "cpu"), 0.0]
    expected = list(map(float, settings[f"{kind}_t_steps"]))
    assert levels == pytest.approx(expected, rel=0, abs=3e-16)
    guidance = CFG(2.0, (0.1, 0.7))
    assert [guidance.is_active(t) for t in levels] == settings[f"{kind}_guided_0.1_0.7"]


def test_diffusers_euler_draws_the_same_in_float32() -> None:
    numbers, _ = golden("elit_tiny")
    drawn = draw("elit_tiny", "ode_ccfg", torch.float32, lambda: make_scheduler("euler"))
    torch.testing.assert_close(drawn.double(), numbers["sample.ode_ccfg"], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="to float32 by a FlowMatchEulerDiscreteScheduler"):
        draw("elit_tiny", "ode_ccfg", torch.float64, lambda: make_scheduler("euler"))


# ---- keys ----


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
