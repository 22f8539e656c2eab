"""What we rely on in diffusers, a test for each fact.

Where one fails after an update of diffusers, its docstring or name says what of ours to look at.
"""

import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from diffusers.utils.torch_utils import randn_tensor
from helpers import make_generators, make_inputs, tiny_dit, tiny_elastic

import elit
from elit.flow.schedulers import make_scheduler
from elit.models.base import ModelBase
from elit.models.dit import DiT
from elit.pipelines.elit_pipeline import ElitPipeline

PACKAGES = [p.parent.name for p in Path(elit.__file__).parent.rglob("__init__.py")]

# ---- schedulers ----


def test_euler_steps_by_the_difference_of_sigma_times_the_velocity() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.25])
    x, velocity = torch.randn(2, 3, 4, 4)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.6, 0.25, 0.0])
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 600, 250])  # 1000 sigma
    for timestep, sigma, sigma_next in zip(
        scheduler.timesteps, (1, 0.6, 0.25), (0.6, 0.25, 0), strict=True
    ):
        out = scheduler.step(velocity, timestep, x).prev_sample
        torch.testing.assert_close(out, x + (sigma_next - sigma) * velocity)


def test_sigma_one_is_noise_and_the_velocity_is_noise_minus_data() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    data, noise = torch.randn(2, 1, 3, 4, 4)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    middle = scheduler.scale_noise(data, scheduler.timesteps[1:], noise)
    torch.testing.assert_close(middle, 0.5 * data + 0.5 * noise)
    there = scheduler.step(noise - data, scheduler.timesteps[0], noise).prev_sample
    torch.testing.assert_close(there, middle)


def test_eulers_own_grid_ends_at_a_thousandth() -> None:
    """So `start_sampling` gives it the uniform grid."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    expected = torch.tensor([1, 0.667, 0.334, 0.001, 0])
    torch.testing.assert_close(scheduler.sigmas, expected, atol=1e-3, rtol=0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 5)[:-1])
    assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_euler_refuses_a_number_of_steps_that_is_not_that_of_the_sigmas() -> None:
    """So `start_sampling` must not hand on both."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="same length"):
        scheduler.set_timesteps(40, sigmas=[1.0, 0.5])


def test_unipc_rounds_timesteps_and_not_sigmas() -> None:
    """So noise levels are read from `sigmas`."""
    scheduler = make_scheduler("unipc")
    scheduler.set_timesteps(7)
    assert not scheduler.timesteps.is_floating_point()
    levels = scheduler.sigmas[:-1] * 1000
    assert (levels - levels.round()).abs().max() > 0.1
    assert (levels - scheduler.timesteps).abs().max() <= 1
    assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("sampler", ["unipc", "dpm-solver"])
def test_multistep_solvers_take_our_velocity(sampler: str) -> None:
    """data = x - sigma v, with `flow_prediction` and `use_flow_sigmas`."""
    scheduler = make_scheduler(sampler)
    scheduler.set_timesteps(4)
    data, noise = torch.randn(2, 1, 3, 4, 4)
    sigma = scheduler.sigmas[0]
    x = (1 - sigma) * data + sigma * noise
    scheduler._step_index = 0
    predicted = scheduler.convert_model_output(noise - data, sample=x)
    torch.testing.assert_close(predicted, data, atol=1e-5, rtol=0)


def test_which_schedulers_take_sigmas_and_generators() -> None:
    def takes(scheduler: type, method: str, name: str) -> bool:
        return name in inspect.signature(getattr(scheduler, method)).parameters

    assert takes(diffusers.FlowMatchEulerDiscreteScheduler, "set_timesteps", "sigmas")
    assert takes(diffusers.UniPCMultistepScheduler, "set_timesteps", "sigmas")
    # The reason for our own uniform-grid Heun:
    assert not takes(diffusers.FlowMatchHeunDiscreteScheduler, "set_timesteps", "sigmas")
    assert not takes(diffusers.DPMSolverMultistepScheduler, "set_timesteps", "sigmas")
    assert takes(diffusers.FlowMatchEulerDiscreteScheduler, "step", "generator")
    assert not takes(diffusers.UniPCMultistepScheduler, "step", "generator")
    # The reason for our own Euler-Maruyama:
    assert not [name for name in dir(diffusers) if "Maruyama" in name]


# ---- random numbers ----


def test_a_list_of_generators_draws_each_sample_alone() -> None:
    drawn = randn_tensor((2, 3, 4), generator=make_generators(1, 2))
    expected = [torch.randn(1, 3, 4, generator=g) for g in make_generators(1, 2)]
    assert torch.equal(drawn, torch.cat(expected))
    with pytest.raises(AttributeError):  # a tuple is not a list
        randn_tensor((2, 3, 4), generator=tuple(make_generators(1, 2)))


def test_densities_of_noise_levels() -> None:
    """Mean comes before standard deviation; an unknown name would silently be uniform."""
    generator = torch.Generator().manual_seed(0)
    drawn = compute_density_for_timestep_sampling("logit_normal", 4, -1.0, 2.0, generator=generator)
    normal = torch.normal(-1.0, 2.0, (4,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, normal.sigmoid())
    drawn = compute_density_for_timestep_sampling("unifrom", 4, generator=make_generators(0)[0])
    assert torch.equal(drawn, torch.rand(4, generator=make_generators(0)[0]))


# ---- models ----


def test_missing_and_unexpected_weights_are_only_warned_of(tmp_path) -> None:
    """The reason for `ModelBase.from_pretrained`."""
    tiny_dit().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    settings = json.loads(config.read_text())
    for depth, kind in ((4, "missing_keys"), (2, "unexpected_keys")):
        config.write_text(json.dumps(settings | {"depth": depth}))
        load = super(ModelBase, DiT).from_pretrained
        _, info = load(tmp_path, output_loading_info=True)
        assert len(info[kind]) == 12
        with pytest.raises(ValueError, match="12 " + kind.replace("_", " ")):
            DiT.from_pretrained(tmp_path)


def test_loading_finds_the_base_class_in_the_models_module() -> None:
    module = importlib.import_module(DiT.__module__)
    assert module.ModelMixin is ModelMixin


def test_a_config_keeps_arguments_and_gives_tuples_back_as_lists(tmp_path) -> None:
    model = tiny_elastic(group=(2, 4))
    model.save_pretrained(tmp_path)
    assert DiT.load_config(tmp_path)["group"] == [2, 4]
    assert DiT.from_config(DiT.load_config(tmp_path)).group == (2, 4)


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


def test_gradient_checkpointing_sets_a_flag_and_a_function() -> None:
    model = tiny_dit()
    assert not model.gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.gradient_checkpointing
    assert callable(model._gradient_checkpointing_func)
    model.disable_gradient_checkpointing()
    assert not model.gradient_checkpointing


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


# ---- pipelines ----


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


def test_pictures_are_taken_from_minus_one_to_one() -> None:
    processor = VaeImageProcessor(vae_scale_factor=1)
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).repeat(2).view(1, 1, 2, 5)
    values = processor.postprocess(x, output_type="np").flatten().tolist()
    assert values == [0, 0, 0.5, 1, 1] * 2
    (picture,) = processor.postprocess(x, output_type="pil")
    assert (picture.mode, picture.size) == ("L", (5, 2))


def test_autoencoders_say_scale_and_shift_in_their_config() -> None:
    defaults = inspect.signature(diffusers.AutoencoderKL.__init__).parameters
    assert defaults["scaling_factor"].default == 0.18215
    assert defaults["shift_factor"].default is None
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2)
    assert len(vae.config.block_out_channels) == 2  # the side is divided by 2 ** (2 - 1)


# ---- branches of guidance, guiders, hooks: what elasticize relies on ----


def source(pipeline: str) -> str:
    return inspect.getsource(getattr(diffusers, pipeline).__call__)


@pytest.mark.parametrize(
    ("pipeline", "names"),
    [
        ("QwenImagePipeline", {"cond", "uncond"}),
        ("FluxPipeline", {"cond", "uncond"}),
        ("WanPipeline", {"cond", "uncond"}),
        ("CogView4Pipeline", {"cond", "uncond"}),
        ("LTXPipeline", {"cond_uncond"}),
        ("CogVideoXPipeline", {"cond_uncond"}),
        ("MochiPipeline", {"cond_uncond"}),
        ("StableDiffusion3Pipeline", set()),
        ("DiTPipeline", set()),
        ("PixArtAlphaPipeline", set()),
    ],
)
def test_names_that_pipelines_give_their_calls(pipeline: str, names: set[str]) -> None:
    """`Branches` tells the guide by them."""
    assert {*re.findall(r'cache_context\("(\w+)"', source(pipeline))} == names


def test_where_batching_pipelines_put_the_guide() -> None:
    """`Layout.guide_half`: the first half, but in DiT the second."""
    for pipeline in ("StableDiffusion3Pipeline", "PixArtAlphaPipeline"):
        assert "cat([negative_prompt_embeds, prompt_embeds]" in source(pipeline)
    assert "cat([class_labels, class_null]" in source("DiTPipeline")


def test_positional_arguments_are_lost_when_a_config_is_copied() -> None:
    """So `ElasticGuidance` clears `_use_default_values`."""
    guider = diffusers.guiders.ClassifierFreeGuidance(2.0)
    assert guider.config["guidance_scale"] == 2
    assert guider.new().guidance_scale != 2
    assert diffusers.guiders.ClassifierFreeGuidance(guidance_scale=2.0).new().guidance_scale == 2


def test_what_a_modular_step_calls_of_a_guider() -> None:
    from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3LoopDenoiser

    text = inspect.getsource(StableDiffusion3LoopDenoiser.__call__)
    calls = ("set_state(", "prepare_inputs(", "prepare_models(", "cleanup_models(", "guider(guider")
    places = [text.index(f"guider.{call}" if "guider" not in call else call) for call in calls]
    assert places == sorted(places)


def test_a_hook_wraps_the_forward_and_is_found_by_name() -> None:
    """`core_hook` and `CoreHook.compile` use `hooks` and `fn_ref.original_forward`."""

    class Double(ModelHook):
        def new_forward(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.fn_ref.original_forward(x)

    module = torch.nn.Identity()
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(Double(), "double")
    assert registry is module._diffusers_hook
    assert module(torch.ones(())) == 2
    assert registry.hooks["double"].fn_ref.original_forward(torch.ones(())) == 1
    registry.remove_hook("double")
    assert module(torch.ones(())) == 1


def test_sd3_and_dit_name_no_repeated_blocks() -> None:
    """So `attach` does, for `compile_repeated_blocks`."""
    for model in (diffusers.SD3Transformer2DModel, diffusers.DiTTransformer2DModel):
        assert not getattr(model, "_repeated_blocks", None)
    assert diffusers.QwenImageTransformer2DModel._repeated_blocks == ["QwenImageTransformerBlock"]


# ---- training ----


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
