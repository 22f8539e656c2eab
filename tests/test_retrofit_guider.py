"""The guider of modular pipelines, alone and in real modular denoise loops."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.modular_pipelines import ComponentSpec
from diffusers.modular_pipelines.modular_pipeline import BlockState, SequentialPipelineBlocks
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from helpers import refuses
from retrofit_models import make, relative_error
from stock_pipelines import pooled, run, text
from test_retrofit_pipelines import elastic_pipeline, watch_core
from torch import Tensor, nn

from elit import CFG, CheapCFG, ElasticGuidance


def states(guider: ElasticGuidance, step: int = 0, steps: int = 10, timestep: float = 500) -> list:
    guider.set_state(step, steps, torch.tensor(timestep))
    return guider.prepare_inputs({"condition": ("yes", "no")})


# ---- alone ----


def test_branches_and_conditions() -> None:
    both = states(ElasticGuidance(3.0, guide_budget=0.25))
    assert [state.condition for state in both] == ["yes", "no"]
    both = states(ElasticGuidance(3.0, drop_condition=False, guide_budget=0.25))
    assert [state.condition for state in both] == ["yes", "yes"]
    guider = ElasticGuidance(3.0)
    guider.set_state(0, 10, torch.tensor(500))
    fields = BlockState(positive="yes", negative="no", other="same")
    named = {"condition": ("positive", "negative"), "picture": "other"}
    both = guider.prepare_inputs_from_block_state(fields, named)
    assert [(state.condition, state.picture) for state in both] == [("yes", "same"), ("no", "same")]
    for off in (ElasticGuidance(1.0), ElasticGuidance(3.0, enabled=False)):
        assert [state.condition for state in states(off)] == ["yes"]


@pytest.mark.parametrize(
    ("start", "stop", "interval", "active"),
    [
        (0.0, 1.0, (0.0, 1.0), range(10)),
        (0.2, 0.7, (0.0, 1.0), range(2, 7)),
        (0.0, 1.0, (0.3, 0.6), range(4, 8)),  # levels 1, 0.9, ...: both ends count
        (0.5, 1.0, (0.3, 0.6), range(5, 8)),
    ],
)
def test_steps_and_noise_levels(
    start: float, stop: float, interval: tuple[float, float], active: range
) -> None:
    guider = ElasticGuidance(3.0, start=start, stop=stop, interval=interval)
    calls = [len(states(guider, step, 10, 1000 - 100 * step)) for step in range(10)]
    assert calls == [2 if step in active else 1 for step in range(10)]


def test_same_arithmetic_as_our_own_guidance() -> None:
    own, guide = torch.randn(2, 3, 4, 4)
    ours = CFG(2.5).velocity(
        lambda x, sigma, condition, n: torch.stack(
            [guide if is_null else own for is_null in condition["null"]]
        ),
        torch.zeros(1), 0.5, {"null": torch.tensor([False])}, {"null": torch.tensor([True])}, 4, 4,
    )  # fmt: skip
    output = ElasticGuidance(2.5).forward(own, guide)
    assert torch.equal(output.pred, ours[0])
    assert torch.equal(ElasticGuidance(2.5).forward(own).pred, own)
    half = ElasticGuidance(2.5).forward(own.bfloat16(), guide.bfloat16()).pred
    assert half.dtype == torch.bfloat16


def test_budgets_are_set_and_given_back() -> None:
    model = elastic_pipeline("qwen").transformer
    model.set_budget(0.5, guide=0.125)
    branches = model._elit_session.branches
    cases = {
        (None, None): (8, 2),  # the model's own
        (1.0, None): (16, 16),
        (None, 0.25): (8, 4),
        (0.75, 0.25): (12, 4),
        (0.75, "lowest"): (12, 1),
    }
    for (budget, guide), wanted in cases.items():
        guider = ElasticGuidance(3.0, budget=budget, guide_budget=guide)
        found = []
        for _ in states(guider):
            guider.prepare_models(model)
            found.append(branches.num_latents())
            guider.cleanup_models(model)
        assert tuple(found) == wanted, (budget, guide)
        assert (branches.budget, branches.guide, branches.name) == (0.5, 0.125, None)


def test_a_step_that_failed_leaves_no_budget_behind() -> None:
    model = elastic_pipeline("qwen").transformer
    guider = ElasticGuidance(3.0, budget=0.25)
    states(guider)
    guider.prepare_models(model)
    assert model._elit_session.branches.budget == 0.25
    states(guider)
    assert model._elit_session.branches.budget == 1


def test_a_budget_on_a_model_that_is_not_elastic() -> None:
    for arguments in ({"budget": 0.5}, {"budget": 1.0, "guide_budget": 0.25}):
        guider = ElasticGuidance(3.0, **arguments)
        states(guider)
        with pytest.raises(ValueError, match="a budget on a model that isn't elastic: QwenImage"):
            guider.prepare_models(make("qwen"))
    guider = ElasticGuidance(3.0, guide_budget="lowest")
    states(guider)
    guider.prepare_models(nn.Linear(1, 1))  # the guided branch
    with pytest.raises(ValueError, match="isn't elastic: Linear; elasticize it, or leave out"):
        guider.prepare_models(nn.Linear(1, 1))
    guider = ElasticGuidance(3.0)
    states(guider)
    guider.prepare_models(make("qwen"))
    guider.cleanup_models(make("qwen"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": -1}, "guidance scale -1 is not allowed"),
        ({"budget": 0}, r"budget 0 is outside \(0, 1\]"),
        ({"budget": "lowest"}, r"budget 'lowest' is outside \(0, 1\]"),
        ({"guide_budget": 1.5}, r"guide budget 1\.5 is unknown; give a fraction in \(0, 1\]"),
        ({"guide_budget": "low"}, r"guide budget 'low' is unknown; .* or 'lowest'"),
        ({"drop_condition": False}, "same label and the same budget guides nothing"),
        ({"drop_condition": False, "budget": 0.5, "guide_budget": 0.5}, "same budget 0.5 guides"),
        ({"interval": (0.7, 0.2)}, "give noise levels 0 <= low <= high <= 1"),
        ({"interval": (0.5,)}, "give two noise levels"),
        ({"start": 1.0}, "start"),
        ({"stop": 1.5}, "stop"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], message: str) -> None:
    refuses(message, ElasticGuidance, **arguments)


def test_save_and_load(tmp_path: Path) -> None:
    guider = ElasticGuidance(2.0, False, 0.75, "lowest", 0.1, 0.9, (0.2, 0.8))
    guider.save_pretrained(tmp_path)
    loaded = ElasticGuidance.from_pretrained(tmp_path)
    for one in (loaded, guider.new()):
        assert type(one) is ElasticGuidance
        assert one.guidance == guider.guidance
        assert (one.budget, one.guide_budget) == (0.75, "lowest")
        assert (one._start, one._stop) == (0.1, 0.9)
    assert guider.new(scale=4.0).guidance.scale == 4
    assert "scale" in repr(guider)


# ---- in modular pipelines ----


def modular(name: str, guider: Any) -> Any:
    """A modular pipeline from prompt embeddings to latents, around a tiny elastic transformer."""
    blocks = {"qwen": QwenImageCoreDenoiseStep, "sd3": StableDiffusion3T2ICoreDenoiseStep}[name]()
    classic = elastic_pipeline(name)
    pipe = blocks.init_pipeline()
    pipe.update_components(
        transformer=classic.transformer, scheduler=classic.scheduler, guider=guider
    )
    pipe.set_progress_bar_config(disable=True)
    for block in blocks.sub_blocks.values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, name: str) -> Tensor:
    given = {"prompt_embeds": text(1), "negative_prompt_embeds": text(2)}
    if name == "qwen":
        mask = torch.ones(1, 5, dtype=torch.long)
        given |= {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    else:
        given |= {"pooled_prompt_embeds": pooled(1), "negative_pooled_prompt_embeds": pooled(2)}
    generator = torch.Generator().manual_seed(0)
    return pipe(
        **given, height=128, width=64, num_inference_steps=2, generator=generator, output="latents"
    )


@pytest.mark.parametrize(("budget", "guide"), [(1.0, None), (0.5, 0.125)])
@pytest.mark.parametrize("name", ["qwen", "sd3"])
def test_modular_pipelines_draw_what_the_classic_ones_draw(name, budget, guide) -> None:
    classic = elastic_pipeline(name)
    classic.transformer.set_budget(budget, guide=guide)
    pipe = modular(name, ElasticGuidance(3.0, budget=budget, guide_budget=guide))
    seen = watch_core(pipe.transformer)
    drawn = draw(pipe, name)
    assert seen == [(1, 2 * round(16 * b)) for b in (budget, guide or budget)] * 2
    if name == "qwen":
        drawn = diffusers.QwenImagePipeline._pack_latents(drawn, 1, 4, 16, 8)
    assert relative_error(drawn, run(classic, name)) < 1e-5


def test_autoguidance_and_intervals_in_a_modular_pipeline() -> None:
    pipe = modular("sd3", ElasticGuidance(3.0, drop_condition=False, guide_budget=0.125))
    seen = watch_core(pipe.transformer)
    auto = draw(pipe, "sd3")
    assert seen == [(1, 32), (1, 4)] * 2
    seen.clear()
    pipe.update_components(guider=pipe.guider.new(interval=(0.9, 1.0)))
    late = draw(pipe, "sd3")
    assert seen == [(1, 32), (1, 4), (1, 32)]
    assert not torch.equal(late, auto)


def test_a_step_cache_in_a_modular_pipeline() -> None:
    """The branches have a cache each; diffusers' own guiders name none, and it refuses to run."""
    pipe = modular("qwen", ElasticGuidance(3.0, budget=0.5, guide_budget=0.125))
    wanted = draw(pipe, "qwen")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    assert relative_error(draw(pipe, "qwen"), wanted) < 1e-5


def test_a_component_of_a_saved_modular_pipeline(tmp_path: Path) -> None:
    guider = ElasticGuidance(2.0, guide_budget=0.25, interval=(0.2, 0.8))
    guider.save_pretrained(tmp_path / "parts" / "guider")
    spec = ComponentSpec(
        "guider", ElasticGuidance, pretrained_model_name_or_path=str(tmp_path / "parts"),
        subfolder="guider",
    )  # fmt: skip
    pipe = modular("sd3", spec.load())
    pipe.save_pretrained(str(tmp_path / "saved"), overwrite_modular_index=True)
    index = json.loads((tmp_path / "saved" / "modular_model_index.json").read_text())
    assert index["guider"][:2] == ["elit.retrofit.guider", "ElasticGuidance"]
    blocks: SequentialPipelineBlocks = StableDiffusion3T2ICoreDenoiseStep()
    loaded = blocks.init_pipeline(str(tmp_path / "saved"))
    loaded.load_components()
    assert type(loaded.guider) is ElasticGuidance
    assert loaded.guider.guidance == CheapCFG(2.0, 0.25, (0.2, 0.8))
    assert type(loaded.transformer) is type(pipe.transformer)
    assert relative_error(draw(loaded, "sd3"), draw(pipe, "sd3")) < 1e-5
