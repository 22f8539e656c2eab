"""What we rely on in diffusers, a test for each fact.

Where one fails after an update of diffusers, its docstring or name says what of ours to look at.
"""

import pkgutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from helpers import make_inputs, tiny_dit, tiny_elastic

import elit
from elit.flow.schedulers import make_scheduler
from elit.models.dit import DiT
from elit.pipelines.elit_pipeline import ElitPipeline

PACKAGES = [p.parent.name for p in Path(elit.__file__).parent.rglob("__init__.py")]


def test_eulers_own_grid_ends_at_a_thousandth() -> None:
    """So `start_sampling` gives it the uniform grid."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    expected = torch.tensor([1, 0.667, 0.334, 0.001, 0])
    torch.testing.assert_close(scheduler.sigmas, expected, atol=1e-3, rtol=0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 5)[:-1])
    assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_unipc_rounds_timesteps_and_not_sigmas() -> None:
    """So noise levels are read from `sigmas`."""
    scheduler = make_scheduler("unipc")
    scheduler.set_timesteps(7)
    assert not scheduler.timesteps.is_floating_point()
    levels = scheduler.sigmas[:-1] * 1000
    assert (levels - levels.round()).abs().max() > 0.1
    assert (levels - scheduler.timesteps).abs().max() <= 1
    assert scheduler.sigmas[-1] == 0


def test_weights_are_safetensors_and_may_be_sharded_or_a_variant(tmp_path) -> None:
    model = tiny_dit()
    model.save_pretrained(tmp_path / "a", variant="ema")
    assert (tmp_path / "a" / "diffusion_pytorch_model.ema.safetensors").exists()
    model.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    for loaded in (
        DiT.from_pretrained(tmp_path / "a", variant="ema"),
        DiT.from_pretrained(tmp_path / "b"),
    ):
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)


def test_regional_compilation_finds_the_blocks() -> None:
    model = tiny_elastic()
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = model(*inputs).sample
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
        assert [type(module).__name__ for module in compiled] == ["TransformerBlock"] * 3
        torch.testing.assert_close(model(*inputs).sample, expected)


def test_layerwise_casting_stores_small_and_computes_wide() -> None:
    model = tiny_elastic()
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = model(*inputs).sample
        model.enable_layerwise_casting(torch.bfloat16, torch.float32)
        out = model(*inputs).sample
    assert model.blocks[0].mlp[0].weight.dtype == torch.bfloat16
    assert model.patch_embed.weight.dtype == torch.float32  # matches a pattern to be skipped
    assert out.dtype == torch.float32
    assert (out - expected).norm() / expected.norm() < 0.05


def test_components_are_named_by_their_module_path() -> None:
    """If a package of ours bore the name of one in `diffusers.pipelines`, loading would fail."""
    theirs = {module.name for module in pkgutil.iter_modules(diffusers.pipelines.__path__)}
    assert {"dit", "flux", "wan"} <= theirs  # `elit.dit.model` would be written as just "dit"
    assert not theirs & {*PACKAGES}
    index = ElitPipeline(tiny_dit(), make_scheduler("heun")).config
    assert index["transformer"] == ("elit.models.dit", "DiT")
    assert index["scheduler"] == ("elit.flow.schedulers", "FlowMatchUniformHeunScheduler")
    assert index["vae"] == (None, None)  # `_optional_components`
    index = ElitPipeline(tiny_dit(), make_scheduler("euler")).config
    assert index["scheduler"] == ("diffusers", "FlowMatchEulerDiscreteScheduler")


def test_ema_ramps_up() -> None:
    """Decay (1 + n) / (10 + n) after n + 1 steps, at most `decay`; 0 at the first."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    ema = EMAModel([parameter], decay=0.9)
    for step, expected in ((0, 0), (1, 0), (2, 2 / 11), (3, 3 / 12), (50, 50 / 59), (1000, 0.9)):
        assert ema.get_decay(step) == pytest.approx(expected)
    with torch.no_grad():
        parameter.fill_(1.0)
        ema.step([parameter])
        assert ema.shadow_params[0].item() == 1  # the first step copies
        parameter.fill_(2.0)
        ema.step([parameter])
    assert ema.cur_decay_value == pytest.approx(2 / 11)
    assert ema.shadow_params[0].item() == pytest.approx(2 / 11 * 1 + 9 / 11 * 2)
    assert ema.optimization_step == 2
    assert {"decay", "optimization_step", "shadow_params"} <= ema.state_dict().keys()
