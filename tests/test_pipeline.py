"""The pipeline: what it draws, how it is steered, saved and loaded, and what it refuses."""

import contextlib
import json
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers import make_generators, randomise, refuses, tiny_dit, tiny_elastic
from prepare_sources import tiny_vae
from safetensors.torch import load_file, save_file
from tiny_autoencoders import tiny_autoencoder
from torch import Tensor, nn

from elit.flow.guidance import CFG, AutoGuidance, CheapCFG
from elit.flow.schedulers import SAMPLERS, FlowMatchUniformEulerScheduler, make_scheduler
from elit.models.dit import DiT
from elit.pipelines.base import check_sample_dtype
from elit.pipelines.budgets import draw_budgets
from elit.pipelines.elit_pipeline import ElitPipeline
from elit.pipelines.text_pipeline import ElitTextPipeline
from elit.retrofit.elastic import elasticize


def make_pipeline(transformer: nn.Module | None = None, sampler: str = "euler", vae=None):
    if transformer is None:
        transformer = tiny_elastic(in_channels=3, min_latents=2)
    pipeline = ElitPipeline(transformer, make_scheduler(sampler), vae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: ElitPipeline, labels: Any = (0, 1, 2), seeds=(1, 2, 3), **options) -> Tensor:
    """Raw samples of a short run, one seed for each label."""
    options = {"num_inference_steps": 3, "output_type": "latent"} | options
    return pipeline(labels, **{"generator": make_generators(*seeds)} | options).images


def record_calls(pipeline: ElitPipeline) -> list[tuple[list[int], int | None, float]]:
    """Notes (labels, num_latents, sigma) of each call of the transformer."""
    calls = []

    def note(_, args: tuple, kwargs: dict) -> None:
        assert not torch.is_grad_enabled()
        labels, level = kwargs["class_labels"].tolist(), round(args[1][0].item(), 4)
        calls.append((labels, kwargs.get("num_latents"), level))

    pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    return calls


# ---- what an image depends on ----


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [None, CFG(2.0), CheapCFG(2.0)], ids=["none", "cfg", "cheap"])
def test_an_image_depends_on_its_generator_and_not_on_its_batch(sampler: str, guidance) -> None:
    pipeline = make_pipeline(sampler=sampler)
    batch = draw(pipeline, guidance=guidance, budget=0.5)
    alone = [
        draw(pipeline, [label], [seed], guidance=guidance, budget=0.5)
        for label, seed in zip((0, 1, 2), (1, 2, 3), strict=True)
    ]
    torch.testing.assert_close(torch.cat(alone), batch, rtol=1e-4, atol=1e-4)
    others = draw(pipeline, (2, 2, 0), (3, 7, 1), guidance=guidance, budget=0.5)
    torch.testing.assert_close(others[[0, 2]], batch[[2, 0]], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(others[1], others[0], atol=0.1)  # same label, another seed


def test_a_run_draws_from_its_generators_alone() -> None:
    pipeline = make_pipeline(sampler="euler-maruyama")
    first = draw(pipeline)
    draw(pipeline, num_inference_steps=5, guidance=CFG(2.0))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(draw(pipeline), first)
    assert torch.equal(draw(pipeline, generator=tuple(make_generators(1, 2, 3))), first)
    assert torch.equal(torch.get_rng_state(), before)  # nothing comes from the global one
    of_one, again = (draw(pipeline, (1, 1), generator=make_generators(5)[0]) for _ in range(2))
    assert torch.equal(of_one, again)
    assert not torch.allclose(of_one[0], of_one[1])


def test_noise_is_the_same_whatever_the_samples_dtype() -> None:
    pipeline = make_pipeline()
    pipeline.scheduler = FlowMatchUniformEulerScheduler()
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=g) for g in make_generators(1, 2, 3)])
    assert torch.equal(draw(pipeline, noise=noise), draw(pipeline))
    wide = draw(pipeline, dtype=torch.float64)
    assert torch.equal(wide, draw(pipeline, dtype=torch.float64, noise=noise))
    torch.testing.assert_close(wide.float(), draw(pipeline))


def test_all_budgets_from_one_noise() -> None:
    pipeline = make_pipeline()
    options = {"num_inference_steps": 3, "output_type": "latent"}
    for what, at_once in (([0, 1, 2], 2), ({"class_labels": [0, 1, 2]}, None)):
        drawn = draw_budgets(pipeline, what, [0.25, 1.0], [1, 2, 3], at_once, **options)
        for budget, (images, seconds) in zip((0.25, 1.0), drawn, strict=True):
            expected = draw(pipeline, budget=budget)
            torch.testing.assert_close(torch.stack(images), expected, rtol=1e-4, atol=1e-4)
            assert seconds > 0


def test_labels_in_any_form() -> None:
    pipeline = make_pipeline()
    images = draw(pipeline, [1], [1])
    for labels in (1, (1,), np.array([1]), torch.tensor([1]), torch.tensor(1)):
        assert torch.equal(draw(pipeline, labels, [1]), images)
    conditions = ({"class_labels": torch.tensor([label])} for label in (1, 3))
    options = {"num_inference_steps": 3, "output_type": "latent"}
    direct = pipeline.draw(*conditions, generator=make_generators(1), **options).images
    assert torch.equal(direct, images)


def test_a_run_is_the_euler_method_by_hand() -> None:
    pipeline = make_pipeline()
    transformer, labels = pipeline.transformer, torch.tensor([0, 1, 2])
    x = torch.cat([torch.randn(1, 3, 8, 8, generator=g) for g in make_generators(1, 2, 3)])
    null = torch.full_like(labels, 3)
    with torch.no_grad():
        for sigma, sigma_next in pairwise((1.0, 0.75, 0.5, 0.25, 0.0)):
            level = torch.full((3,), sigma)
            velocity = transformer(x, level, labels, num_latents=8).sample
            if sigma <= 0.75:
                guide = transformer(x, level, null, num_latents=2).sample
                velocity = guide + 2.5 * (velocity - guide)
            x = x - (sigma - sigma_next) * velocity
    guidance = CheapCFG(2.5, interval=(0.0, 0.75))
    drawn = draw(pipeline, budget=0.5, num_inference_steps=4, guidance=guidance)
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [None, CFG(2.0), CheapCFG(2.0, 0.25)])
def test_a_float64_model_is_not_rounded_on_the_way(guidance) -> None:
    pipeline = make_pipeline(tiny_elastic(in_channels=3, min_latents=2).double())
    pipeline.scheduler = FlowMatchUniformEulerScheduler()
    noise, labels = torch.randn(1, 3, 8, 8, dtype=torch.float64), torch.tensor([1])
    given = {"noise": noise, "guidance": guidance, "num_inference_steps": 1}
    drawn = draw(pipeline, [1], [1], dtype=torch.float64, **given)
    with torch.no_grad():
        model, level = pipeline.transformer, torch.ones(1)
        velocity = model(noise, level, labels).sample
        if guidance:
            few = {} if guidance.budget is None else {"num_latents": 4}
            guide = model(noise, level, None, **few).sample
            velocity = guide + 2 * (velocity - guide)
    torch.testing.assert_close(drawn, noise - velocity, rtol=0, atol=1e-13)
    assert draw(pipeline, [1], [1], **given).dtype == torch.float32  # as wide as asked for


@pytest.mark.parametrize(
    ("dtype", "device", "reason"),
    [
        (torch.float16, "cpu", "torch.float16 would lose what a step adds; use"),
        (torch.complex128, "cuda", "torch.complex128 are not real numbers with a fraction; use"),
        (torch.int64, "mps", "torch.int64 are not real numbers with a fraction; use"),
        ("float64", "cpu", "float64 are not real numbers with a fraction; use"),
        (torch.float64, "mps", "torch.float64 cannot be on mps; use torch.float32, or"),
        (torch.float64, "cuda", ""),
        (torch.float32, "mps", ""),
    ],
)
def test_types_that_samples_can_have(dtype, device: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) if reason else contextlib.nullcontext():
        check_sample_dtype(dtype, device, FlowMatchUniformEulerScheduler())


def test_bfloat16_weights_and_float32_samples() -> None:
    pipeline = make_pipeline()
    expected = draw(pipeline)
    pipeline.transformer.to(torch.bfloat16)
    images = draw(pipeline)
    assert images.dtype == torch.float32
    assert (images - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (CheapCFG(2.0, interval=(0.9, 1)), [("cond", 0), ("uncond", 0), ("cond", 1)]),
        (CFG(2.0, interval=(0.4, 0.9)), [("cond", 0), ("cond_uncond", 1)]),
    ],
)
def test_step_caches_are_told_of_each_call(guidance, expected, monkeypatch) -> None:
    pipeline, told = make_pipeline(), []
    context = pipeline.transformer.cache_context

    def note(name: str, step_index: int, num_inference_steps: int):
        told.append((name, step_index))
        return context(name, step_index=step_index, num_inference_steps=num_inference_steps)

    monkeypatch.setattr(pipeline.transformer, "cache_context", note)
    # Without a cache a guide of another budget would go in one batch with what it guides.
    monkeypatch.setattr(ElitPipeline, "mixes_budgets", lambda *_: False)
    draw(pipeline, num_inference_steps=2, guidance=guidance)
    assert told == expected


def test_a_run_leaves_nothing_to_the_next(monkeypatch) -> None:
    """Neither in a step cache, where it broke off, nor on the device, where it is offloaded."""
    pipeline, freed = make_pipeline(), []
    monkeypatch.setattr(pipeline, "maybe_free_model_hooks", lambda: freed.append(1))
    pipeline.transformer.enable_cache(diffusers.FirstBlockCacheConfig(100.0))

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    first = draw(pipeline)
    with pytest.raises(KeyboardInterrupt):
        draw(pipeline, (2, 2, 2), (7, 8, 9), callback_on_step_end=interrupt)
    assert torch.equal(draw(pipeline), first)
    assert freed == [1, 1]


# ---- budgets and guidance ----


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (None, [([1], 8)]),
        (CFG(3.0), [([1, 3], 8)]),
        (CFG(1.0), [([1], 8)]),
        (AutoGuidance(3.0), [([1, 1], (8, 2))]),
        (AutoGuidance(3.0, budget=0.25), [([1, 1], (8, 4))]),
        (CheapCFG(3.0), [([1, 3], (8, 2))]),
        (CheapCFG(3.0, budget=0.25), [([1, 3], (8, 4))]),
        (CheapCFG(3.0, budget=0.5), [([1, 3], 8)]),
    ],
)
def test_which_labels_and_budgets_the_transformer_sees(guidance, expected: list) -> None:
    pipeline = make_pipeline()
    calls = record_calls(pipeline)
    draw(pipeline, [1], [1], budget=0.5, num_inference_steps=1, guidance=guidance)
    assert [(labels, latents) for labels, latents, _ in calls] == expected


@pytest.mark.parametrize(
    ("sampler", "options", "latents", "levels"),
    [
        ("euler", {"budgets_of_steps": [0.25, 0.5, 1]}, [4, 8, 16], [1, 0.6667, 0.3333]),
        ("euler", {"budget": (0.3,)}, [5] * 3, [1, 0.6667, 0.3333]),
        ("euler", {"num_latents": 5}, [5] * 3, [1, 0.6667, 0.3333]),
        ("heun", {"budgets_of_steps": [0.25, 0.5, 0.5, 1, 1]}, [4, 8, 8, 16, 16], None),
        ("heun", {"sigmas": [1.0, 0.7, 0.2], "num_inference_steps": 40}, [16] * 5,
         [1, 0.7, 0.7, 0.2, 0.2]),
        ("euler", {"guidance": CheapCFG(3.0, interval=(0.3, 0.7))}, [16, (16, 2), (16, 2)],
         [1, 0.6667, 0.3333]),
    ],
)  # fmt: skip
def test_budgets_and_levels_of_each_call(sampler: str, options, latents, levels) -> None:
    pipeline = make_pipeline(sampler=sampler)
    calls = record_calls(pipeline)
    draw(pipeline, [1], [1], **options)
    assert [n for _, n, _ in calls] == latents
    assert levels in (None, [level for *_, level in calls])


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("guidance", [None, CFG(2.0), CheapCFG(2.0), AutoGuidance(2.0)])
def test_each_image_of_a_mixed_batch_is_that_drawn_alone(guidance, mixes, monkeypatch) -> None:
    monkeypatch.setattr(ElitPipeline, "mixes_budgets", lambda *_: mixes)
    pipeline, budgets, labels = make_pipeline(), [1, 0.25, 0.5, 0.25], [0, 1, 2, 2]
    together = draw(pipeline, labels, (5, 6, 7, 8), budget=budgets, guidance=guidance)
    alone = [
        draw(pipeline, [label], (seed,), budget=budget, guidance=guidance)
        for label, seed, budget in zip(labels, (5, 6, 7, 8), budgets, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert (together - draw(pipeline, labels, (5, 6, 7, 8), guidance=guidance)).abs().max() > 0.01


def test_a_guide_in_one_batch_is_the_same_guide(monkeypatch) -> None:
    pipeline = make_pipeline()
    together = draw(pipeline, guidance=CheapCFG(3.0))
    monkeypatch.setattr(ElitPipeline, "mixes_budgets", lambda *_: False)
    torch.testing.assert_close(draw(pipeline, guidance=CheapCFG(3.0)), together)


def test_what_goes_in_one_batch() -> None:
    """Small batches on a CPU; not where a cache or a compiled graph is of one budget."""
    pipeline = make_pipeline()
    assert pipeline.mixes_budgets(32, (8, 8))  # of 64 tokens of width 32
    assert not pipeline.mixes_budgets(33, (8, 8))
    pipeline.transformer.blocks[0].compile()
    assert not pipeline.mixes_budgets(1, (8, 8))
    other = make_pipeline()
    other.transformer.enable_cache(diffusers.FirstBlockCacheConfig(0.1))
    assert not other.mixes_budgets(1, (8, 8))


def test_mixed_budgets_and_a_step_cache_are_refused() -> None:
    pipeline = make_pipeline()
    pipeline.transformer.enable_cache(diffusers.FirstBlockCacheConfig(0.1))
    refuses("a step cache is for samples of one budget", draw, pipeline, budget=[1, 0.5, 0.5])


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ({"guidance": "cfg", "guidance_scale": 3.0}, {"guidance": CFG(3.0)}),
        ({"guidance_scale": 3.0}, {"guidance": CFG(3.0)}),
        ({"guidance_scale": 1.0}, {}),
        ({"guidance": "none"}, {}),
        ({"guidance": "ccfg", "guidance_scale": 2.5}, {"guidance": CheapCFG(2.5)}),
        ({"guidance": "ag", "guide_budget": 0.25}, {"guidance": AutoGuidance(2.0, 0.25)}),
        ({"generator": None, "seed": 5}, {"generator": make_generators(5, 6, 7)}),
        ({"generator": None, "seed": [9, 9, 2]}, {"generator": make_generators(9, 9, 2)}),
        (
            {"generator": None, "seed": 2**40},
            {"generator": make_generators(2**40, 2**40 + 1, 2**40 + 2)},
        ),
        ({"budget": np.array([1, 0.5, 0.25])}, {"budget": [1, 0.5, 0.25]}),
        ({"num_latents": torch.tensor([4, 1, 4])}, {"num_latents": [4, 1, 4]}),
        ({"num_latents": np.int8(4)}, {"num_latents": 4}),
        ({"guidance": "none", "guidance_scale": 1}, {}),
        ({"latents": torch.ones(3, 3, 8, 8)}, {"noise": torch.ones(3, 3, 8, 8)}),
    ],
)
def test_plain_words_say_the_same(words, ours) -> None:
    """What a server's JSON or a person of diffusers types."""
    pipeline = make_pipeline()
    given = {"num_inference_steps": 3, "output_type": "pt", "generator": make_generators(1, 2, 3)}
    said = pipeline([0, 1, 2], **given | words).images
    given["generator"] = make_generators(1, 2, 3)
    assert torch.equal(said, pipeline([0, 1, 2], **given | ours).images)


def test_images_of_each_label() -> None:
    pipeline, options = make_pipeline(), {"num_inference_steps": 2, "output_type": "numpy"}
    images = pipeline([0, 2], seed=3, num_images_per_prompt=2, **options).images
    again = pipeline([0, 0, 2, 2], seed=3, **options).images
    assert images.shape == (4, 8, 8, 3)
    np.testing.assert_array_equal(images, again)


def test_threads_wait_for_each_other() -> None:
    """Each gets what it would get alone, of one pipeline and of two that share a transformer."""
    pipeline = make_pipeline()
    other = ElitPipeline(pipeline.transformer, pipeline.scheduler)
    settings = [(2 + i % 3, 1 / (1 + i % 4)) for i in range(12)]

    def one(i: int) -> torch.Tensor:
        steps, budget = settings[i]
        pipe = (pipeline, other)[i % 2]
        return draw(pipe, [1], (i,), budget=budget, num_inference_steps=steps)

    expected = [one(i) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        assert all(map(torch.equal, pool.map(one, range(12)), expected))


def test_threads_wait_for_a_scheduler_that_pipelines_share() -> None:
    pipeline = make_pipeline()
    pipelines = pipeline, ElitPipeline(tiny_elastic(in_channels=3, depth=4), pipeline.scheduler)

    def one(i: int) -> torch.Tensor:
        return draw(pipelines[i % 2], [1], (i,), num_inference_steps=2 + i % 3)

    expected = [one(i) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        assert all(map(torch.equal, pool.map(one, range(12)), expected))


def test_a_step_callback_begins_no_run_with_parts_of_its_own() -> None:
    pipeline, other = make_pipeline(), make_pipeline()
    before = draw(pipeline)
    with pytest.raises(ValueError, match="is in a run, whose step callback can't begin another"):
        draw(pipeline, callback_on_step_end=lambda *_: draw(pipeline) is None or {})
    assert torch.equal(draw(pipeline, callback_on_step_end=lambda *_: draw(other) is None or {}),
                       before)  # fmt: skip


def test_a_step_callback_may_change_either_of_two_names() -> None:
    pipeline = make_pipeline()
    inputs = {"callback_on_step_end_tensor_inputs": ["samples", "latents"]}
    for name in inputs["callback_on_step_end_tensor_inputs"]:
        given = draw(pipeline, callback_on_step_end=lambda *x, n=name: x[3] | {n: x[3][n] * 0},
                     **inputs)  # fmt: skip
        assert (given == 0).all()


def test_a_plain_transformer() -> None:
    pipeline = make_pipeline(tiny_dit(in_channels=3))
    calls = record_calls(pipeline)
    assert draw(pipeline).shape == (3, 3, 8, 8)
    assert {latents for _, latents, _ in calls} == {None}
    cfg = draw(pipeline, guidance=CFG(3.0))
    assert torch.equal(draw(pipeline, guidance=CheapCFG(3.0)), cfg)  # it has one budget only
    for options in ({"budget": 0.5}, {"num_latents": 4}):
        refuses("asked of a model that is not elastic", draw, pipeline, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": [1, 1, 1 / 16]}, "budget 0.0625 keeps 1 latents per group, but this model was"),
        ({"guidance": CheapCFG(2.0, 1 / 16)}, "guide budget 0.0625 keeps 1 latents per group"),
        ({"budget": 2 / 16, "guidance": AutoGuidance(3.0)}, "autoguidance has no effect where its"),
        ({"budget": 0.5, "guidance": CheapCFG(2.0, 1.0)}, "the guide keeps 16 latents per group"),
        ({"guidance": CFG(3.0, (0.4, 0.6))}, "guidance has no effect: Guidance(scale=3.0"),
        ({"guidance": CFG(1.0, (0.4, 0.6))}, ""),
        ({"budget": 2 / 16, "guidance": CheapCFG(3.0, interval=(0.6, 1))}, ""),
        ({"budget": 0.5, "guidance": AutoGuidance(3.0)}, ""),
    ],
)
def test_what_has_no_effect_or_was_never_trained_is_warned_of(options, message, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        draw(make_pipeline(), **options)
    assert len(caplog.records) == bool(message)
    assert all(record.message.startswith(message) for record in caplog.records)


# ---- sizes, steps, outputs ----


@pytest.mark.parametrize(("height", "width"), [(None, None), (4, None), (8, 12), (16, 4)])
def test_other_sizes(height: int | None, width: int | None) -> None:
    images = draw(make_pipeline(), height=height, width=width)
    assert images.shape == (3, 3, height or 8, width or 8)
    assert make_pipeline().input_size(None, 128, 128) == (128, 128)  # 256 times


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 4), ("heun", 7), ("unipc", 4)])
def test_the_callback_sees_and_may_change_every_step(sampler: str, calls: int) -> None:
    pipeline, seen = make_pipeline(sampler=sampler), []

    def run(callback) -> Tensor:
        return draw(pipeline, num_inference_steps=4, callback_on_step_end=callback)

    def look(given_pipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        assert given_pipeline is pipeline
        assert list(tensors) == ["samples"]
        seen.append((step, timestep.item(), tensors["samples"].clone()))
        return {}

    images = run(look)
    levels = pipeline.scheduler.timesteps.tolist()
    assert [note[:2] for note in seen] == list(zip(range(calls), levels, strict=True))
    assert torch.equal(seen[-1][2], images)
    assert torch.equal(run(lambda *_: None), images)
    images = run(lambda _, step, *__: {"samples": torch.full_like(images, float(step))})
    assert (images == calls - 1).all()


def test_output_types() -> None:
    pipeline = make_pipeline()
    raw = draw(pipeline)
    expected = (raw / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(draw(pipeline, output_type="pt"), expected)
    as_array = draw(pipeline, output_type="np")
    np.testing.assert_allclose(as_array, expected.permute(0, 2, 3, 1).numpy(), rtol=1e-6)
    for picture, array in zip(draw(pipeline, output_type="pil"), as_array, strict=True):
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), (array * 255).round().astype("uint8"))
    assert draw(pipeline, output_type="pil", height=4)[2].size == (8, 4)
    options = {"num_inference_steps": 3, "output_type": "latent", "return_dict": False}
    assert torch.equal(pipeline([0, 1, 2], generator=make_generators(1, 2, 3), **options)[0], raw)
    grey = make_pipeline(tiny_elastic(in_channels=1))
    assert draw(grey, output_type="np").shape == (3, 8, 8, 1)
    assert {picture.mode for picture in draw(grey, output_type="pil")} == {"L"}


# ---- an autoencoder ----


def test_the_autoencoder_decodes_scaled_and_shifted_samples() -> None:
    vae = tiny_vae(latent_channels=4)
    pipeline = make_pipeline(tiny_elastic(in_channels=4), vae=vae)
    with torch.no_grad():
        decoded = vae.decode(draw(pipeline) / 0.5 + 0.25).sample
    images = draw(pipeline, output_type="pt")
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    assert images.shape == (3, 3, 16, 16)
    assert draw(pipeline, output_type="np", height=8, width=24).shape == (3, 8, 24, 3)
    message = r"17 pixels is not a multiple of 2, .*; use 18"
    refuses(message, draw, pipeline, height=17)


# ---- save and load ----


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_save_and_load_in_pixels(sampler: str, tmp_path) -> None:
    pipeline = make_pipeline(sampler=sampler)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    found = [index[name] for name in ("_class_name", "transformer", "vae")]
    assert found == [["pipeline", "ElitPipeline"], ["elit.models.dit", "DiT"], [None, None]]
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    loaded = ElitPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert torch.equal(draw(loaded), draw(pipeline))


def test_a_transformer_that_became_elastic_is_saved_as_what_it_is(tmp_path) -> None:
    pipeline = make_pipeline(tiny_dit(in_channels=3, depth=4))
    elasticize(pipeline.transformer, head=1, tail=1, group=2)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["elit.retrofit.elastic", "ElasticDiT"]
    loaded = ElitPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(loaded, budget=0.5), draw(pipeline, budget=0.5))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"depth": 4}, "cannot be loaded"),
        ("transformer", {"depth": 2, "tail": 0}, "cannot be loaded"),
        ("transformer", {"hidden_size": 64}, "cannot be loaded"),
        ("transformer", {"group": [2, 2]}, "cannot be loaded"),
        ("scheduler", {"flow_shift": 0}, r"flow_shift is 0; give 0\.001 to 1000"),
        ("weights", {}, r"\d+ missing keys \(.*\d+ unexpected keys \(_orig_mod\."),
    ],
)
def test_folders_that_do_not_fit(tmp_path, part: str, changes, message: str) -> None:
    make_pipeline(sampler="unipc").save_pretrained(tmp_path)
    if part == "weights":
        (file,) = (tmp_path / "transformer").glob("*.safetensors")
        wrapped = {f"_orig_mod.{name}": x for name, x in load_file(file).items()}
        save_file(wrapped, file, {"format": "pt"})
    else:
        (file,) = (tmp_path / part).glob("*.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refuses(message, ElitPipeline.from_pretrained, tmp_path)
    if part != "scheduler":
        refuses("", DiT.from_pretrained, tmp_path / "transformer")
    kind = r"load it by ElitPipeline\.from_pretrained, or whichever"
    refuses(kind, ElitTextPipeline.from_pretrained, tmp_path)


def test_save_and_load_with_an_autoencoder(tmp_path) -> None:
    pipeline = make_pipeline(tiny_elastic(in_channels=4), "heun", tiny_vae(latent_channels=4))
    pipeline.save_pretrained(tmp_path)
    options = {"output_type": "pt", "guidance": CheapCFG(2.0), "budget": 0.5}
    expected = draw(pipeline, **options)
    assert torch.equal(draw(ElitPipeline.from_pretrained(str(tmp_path)), **options), expected)
    half = ElitPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    assert (draw(half, **options) - expected).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("variant", "as_bin", "message", "options"),
    [
        (".fp16", False, r"no \.safetensors weights without a variant; load it with variant='fp16' "
         r"\(--variant fp16 on the command line\)", {"variant": "fp16"}),
        ("", True, r"load it with no variant and use_safetensors=False: pickles, which "
         r"save_pretrained", {"use_safetensors": False}),
        (".fp16", True, r"variant='fp16' .* and use_safetensors=False",
         {"variant": "fp16", "use_safetensors": False}),
        ("", False, "", {"use_safetensors": None}),
    ],
)  # fmt: skip
def test_other_variants_and_formats_say_how_they_are_loaded(
    tmp_path, variant, as_bin, message, options
) -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    if as_bin:
        torch.save(load_file(file), file.with_name(f"diffusion_pytorch_model{variant}.bin"))
        file.unlink()
    else:
        file.rename(file.with_name(f"diffusion_pytorch_model{variant}.safetensors"))
    if message:
        refuses(message, ElitPipeline.from_pretrained, tmp_path)
    again = ElitPipeline.from_pretrained(tmp_path, **options)
    assert torch.equal(draw(again), draw(pipeline))
    message = r"no \..* weights of variant fp8; load it with"
    refuses(message, ElitPipeline.from_pretrained, tmp_path, **(options | {"variant": "fp8"}))


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": [0, 3]}, r"class label 3 is out of range; .* labels 0\.\.2"),
        ({"class_labels": -1}, "class label -1 is out of range"),
        ({"class_labels": []}, r"class_labels \[\] are not labels"),
        ({"class_labels": [0.5]}, r"class_labels \[0\.5\] are not labels; give .* in 0\.\.2"),
        ({"class_labels": True}, "class_labels True are not labels"),
        ({"budget": 0}, r"budget 0 is outside \(0, 1\]"),
        ({"budget": float("nan")}, r"budget nan is outside \(0, 1\]"),
        ({"budget": "auto"}, "a pipeline chooses no budget, .* elit.choose and elit.load_schedule"),
        ({"budget": "half"}, r"budget 'half' is outside \(0, 1\]"),
        ({"budget": [0.25, 0.5]}, "2 budgets for 1 images; .* is budgets_of_steps="),
        ({"budgets_of_steps": [0.25, 0.5]}, "are not for the 3 calls of the model in this run"),
        ({"num_latents": 17}, r"num_latents 17 is outside 1\.\.16"),
        ({"num_latents": 0.5}, r"num_latents 0\.5 is not an integer"),
        ({"num_latents": 4, "budget": 0.5}, r"budget=0\.5 and num_latents=4; give one"),
        ({"guidance": CFG(1e38)}, "no longer finite; a smaller guidance scale than 1e"),
        ({"height": 8.5}, "a side of 8.5 is no positive integer"),
        ({"budget": [1, 0.5, 0]}, r"budget 0 is outside \(0, 1\]"),
        ({"num_inference_steps": 0}, "num_inference_steps 0 .*; 40 is usual"),
        ({"num_inference_steps": 10**9}, "a whole number from 1 to 10000; 40 is usual"),
        ({"height": 128, "width": 129}, "more than 256 times what this model was made for, 8x8"),
        ({"noise": torch.zeros(1, 3, 8, 8).int()}, r"noise of torch.int32 is none; give floats"),
        ({"class_labels": 1j}, "class_labels 1j are not labels"),
        ({"class_labels": [10**400]}, "class_labels .* are not labels"),
        ({"callback_on_step_end": 3}, "callback_on_step_end 3 is no function"),
        ({"callback_on_step_end": lambda *_: 3}, "the step callback gave 3; give a dict"),
        ({"callback_on_step_end": lambda *_: {"samples": 1}}, "gave samples 1; give a tensor of"),
        ({"sigmas": ["a"]}, r"sigmas \['a'\] are not allowed"),
        ({"guidance": 3.0}, r"guidance 3\.0 is not a Guidance; .* CFG\(3\.0\)"),
        ({"generator": make_generators(1, 2)}, "2 generators for 1 samples; give one"),
        ({"generator": [None]}, "generator None is not a torch.Generator"),
        ({"dtype": torch.float16}, "samples in torch.float16 would lose what a step adds"),
        (
            {"dtype": torch.float64},
            "rounded to float32 by a FlowMatchEulerDiscreteScheduler; use",
        ),
        ({"noise": [[0]]}, r"noise \[\[0\]\] does not fit; give a tensor of shape"),
        ({"height": True}, "a side of True is no positive integer"),
        ({"height": 6}, "6x8 tokens cannot be cut into groups of 4x4: 6 is not a multiple of 4"),
        ({"height": 0}, "a side of 0 is no positive integer"),
        ({"num_frames": 4}, "num_frames=4 asked of a model of images; leave it out"),
        ({"noise": torch.zeros(1, 3, 8, 9)}, r"noise \(1, 3, 8, 9\) does not.*\(1, 3, 8, 8\)"),
        ({"output_type": "jpg"}, "unknown output_type 'jpg': use one of 'pil', 'np'"),
        ({"callback_on_step_end_tensor_inputs": ["latent"]}, "'latent'.*'latents'"),
        ({"callback_on_step_end": lambda *_: {"x": 1}}, "'x'.*'samples'"),
        ({"guidance": "cgf"}, "unknown guidance 'cgf': .* did you mean 'cfg'"),
        ({"guidance": CFG(2.0), "guidance_scale": 3.0}, "guidance_scale=3.0 beside a Guidance"),
        (
            {"guidance": "cfg", "guide_budget": 0.5},
            "guide_budget=0.5 has no effect with guidance='cfg'",
        ),
        ({"guidance_scale": -1}, "guidance scale -1 is not allowed"),
        ({"seed": -1}, "seed=-1 is not allowed"),
        ({"seed": [1, 2]}, "2 seeds for 1 samples"),
        ({"seed": 1, "generator": make_generators(1)}, "seed=1 beside a generator"),
        ({"guidance": "none", "guidance_scale": 3.0}, "guidance_scale=3.0 has no effect with"),
        ({"guidance_scale": True}, "guidance scale True is not allowed"),
        ({"guidance_scale": torch.ones(2)}, "guidance scale tensor.* is not allowed"),
        ({"guidance": "ag", "guide_budget": np.ones(2)}, "guide budget array.* is unknown"),
        ({"guidance_scale": 10**30}, "the samples are no longer finite"),
        ({"seed": [2**63]}, "seed=.* is not allowed"),
        ({"budget": b"1"}, "budget b'1' is not a number"),
        ({"budget": 10**400}, "^.{,200}$"),
        ({"callback_on_step_end_tensor_inputs": iter(["samples"])}, "are no names for"),
        ({"num_images_per_prompt": torch.ones(2)}, "num_images_per_prompt=.* is no positive"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 is no positive whole number"),
        ({"latents": torch.zeros(1, 3, 8, 8), "noise": torch.zeros(1, 3, 8, 8)}, "give one"),
        ({"num_latents": 4, "budgets_of_steps": [1] * 3}, "give one"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(options: dict, message: str) -> None:
    pipeline = make_pipeline()
    refuses(message, pipeline, **{"class_labels": [1], "num_inference_steps": 3} | options)


def clip_model(channels: int = 3) -> nn.Module:
    sizes = {"sample_size": (2, 4, 4), "group": (1, 2, 2), "in_channels": channels}
    return randomise(tiny_elastic(**sizes))


def test_clips_are_lists_of_frames_of_any_length_and_size() -> None:
    pipeline = make_pipeline(clip_model())
    assert pipeline.pixel_size() == (2, 4, 4)
    assert draw(pipeline).shape == (3, 3, 2, 4, 4)
    assert draw(pipeline, output_type="pt", num_frames=5, height=8).shape == (3, 5, 3, 8, 4)
    clips = draw(pipeline, output_type="pil", num_frames=3)
    assert [len(clip) for clip in clips] == [3, 3, 3]
    assert clips[0][0].size == (4, 4)
    pixels = draw(pipeline, output_type="np", num_frames=3)
    assert np.abs(np.asarray(clips[1][2]) / 255 - pixels[1, 2]).max() < 0.003


def test_clips_in_the_latents_of_a_video_autoencoder() -> None:
    vae = tiny_autoencoder("AutoencoderKLWan")  # 1/4 in time and 1/8 in space
    pipeline = make_pipeline(clip_model(4), vae=vae)
    assert pipeline.pixel_size() == (5, 32, 32)
    latents = draw(pipeline, [1], [1])
    assert latents.shape == (1, 4, 2, 4, 4)
    mean, std = (torch.tensor(x).view(1, 4, 1, 1, 1) for x in (
        vae.config.latents_mean, vae.config.latents_std
    ))  # fmt: skip
    with torch.no_grad():
        expected = vae.decode(latents * std + mean).sample  # (1, 3, 5, 32, 32)
    clips = draw(pipeline, [1], [1], output_type="pt")
    torch.testing.assert_close(clips, (expected / 2 + 0.5).clamp(0, 1).transpose(1, 2))
    longer = draw(pipeline, [1], [1], output_type="pt", num_frames=9, height=64)
    assert longer.shape == (1, 9, 3, 64, 32)
    message = r"num_frames=8 is not a multiple of 4.*use 5 or 9"
    refuses(message, draw, pipeline, [1], [1], num_frames=8)
    message = "AutoencoderKL is of images, the transformer draws clips"
    refuses(message, make_pipeline, clip_model(4), vae=tiny_vae())


def test_levels_shift_with_the_size_that_is_drawn() -> None:
    """Flux's settings: mu is .5 at 256 tokens, here with 4x4 and 8x8."""
    pipeline = make_pipeline()
    scheduler = pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64
    )
    for side, mu in ((4, 0.5), (8, 1.15)):
        draw(pipeline, num_inference_steps=2, height=side, width=side)
        expected = [1, math.exp(mu) / (math.exp(mu) + 1), 0]
        assert scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-5)
    assert len(pipeline.calls(1.0, 2)) == 2


@pytest.mark.parametrize("legacy", [False, True])
def test_shards_of_a_variant_are_told_apart(tmp_path, legacy: bool) -> None:
    """Also in the order of names that diffusers wrote once."""
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    folder = tmp_path / "transformer"
    shards = sorted(folder.glob("*.fp16-*-of-*.safetensors"))
    assert len(shards) > 1
    (index,) = folder.glob("*.index.fp16.json")
    if legacy:
        text = index.read_text()
        for shard in shards:
            name = shard.name.replace(".fp16-", "-").replace(".safe", ".fp16.safe")
            text = text.replace(shard.name, name)
            shard.rename(folder / name)
        index.write_text(text)
    there = r"load it with variant='fp16' \(--variant fp16 on the command line\)"
    refuses(f"weights without a variant; {there}", ElitPipeline.from_pretrained, tmp_path)
    refuses(f"of variant bf16; {there}", ElitPipeline.from_pretrained, tmp_path, variant="bf16")
    loaded = ElitPipeline.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(draw(loaded), draw(pipeline))
    index.unlink()
    message = "shards of weights without their index"
    refuses(message, ElitPipeline.from_pretrained, tmp_path, variant="fp16")
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(ElitPipeline.from_pretrained(tmp_path)), draw(pipeline))
