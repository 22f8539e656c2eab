"""Step caches: computed steps are the uncached ones, skipped ones are what the cache says.

`reference` runs a model without a cache and sees through torch's hooks what enters and leaves its
blocks; which steps are skipped, and what they give, it works out from the caches' definitions.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers.hooks as stock
import numpy as np
import pytest
import retrofit_models
import stock_pipelines
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig
from diffusers.hooks import HookRegistry
from helpers import TINY, TINY_ELASTIC, randomise, refuses, tiny_dit
from retrofit_models import Stack, some
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter

import elit
from elit import CFG, CheapCFG, TeaCacheConfig, calibrate_cache
from elit.caching.hooks import CALL_HOOK
from elit.models.elastic import ElasticMixin

STEPS = 10
NUM_LATENTS = (16, 4, 4, 1, 16, 9, 2, 16, 16, 1)
RATIOS = [1.0, 1.02, 0.97, 0.99, 1.01, 0.98, 0.99, 1.03, 0.98, 0.99]


# ---- models, and runs of them ----


def ours(kind: type, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: randomise(kind(**TINY_ELASTIC | {"depth": 5} | changes))


TEXT = {"num_classes": None, "max_text_length": 3, "text_dim": 6}


def mmdit(**changes: Any) -> Callable[[], nn.Module]:
    settings = TINY_ELASTIC | {"depth": 5} | TEXT | changes
    return lambda: randomise(
        elit.MMDiT(**{key: value for key, value in settings.items() if value is not None})
    )


def elasticized(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = retrofit_models.make(name)
        elit.elasticize(model, head=1, tail=1, group=retrofit_models.FOREIGN[name].group)
        randomise(model.elit, std=0.05)
        return model

    return make


@dataclass(frozen=True)
class Case:
    """A model, where its tokens are, and the part whose input is modulated."""

    make: Callable[[], nn.Module]
    probe: str
    lists: tuple[str, ...] = ("blocks",)
    output: int = 0
    foreign: str | None = None

    def ends(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """First and last block."""
        return getattr(model, self.lists[0])[0], getattr(model, self.lists[-1])[-1]

    def tokens(self, result: Any) -> Tensor:
        return result if isinstance(result, Tensor) else result[self.output]


PLAIN = {"group": None, "head": 0, "tail": 0}
FLUX = ("transformer_blocks", "single_transformer_blocks")
CASES = {
    "dit": Case(tiny_dit, "attention"),
    "elastic-dit": Case(ours(elit.DiT), "attention"),
    "uvit": Case(ours(elit.UViT, **PLAIN), "attention"),
    "elastic-uvit": Case(ours(elit.UViT, head=2, depth=7, tail=2), "attention"),
    "elastic-hdit": Case(ours(elit.HDiT, patch_size=2, group=2, sample_size=16), "attention"),
    "hdit": Case(ours(elit.HDiT, patch_size=2, group=None, sample_size=16), "attention"),
    "mmdit": Case(mmdit(**PLAIN), "image.attention.to_qkv"),
    "elastic-mmdit": Case(mmdit(), "image.attention.to_qkv"),
    "sd3": Case(elasticized("sd3"), "attn", ("transformer_blocks",), 1, "sd3"),
    "qwen": Case(elasticized("qwen"), "attn", ("transformer_blocks",), 1, "qwen"),
    "flux": Case(elasticized("flux"), "attn", FLUX, 1, "flux"),
    "wan": Case(elasticized("wan"), "attn1", foreign="wan"),
    "our-plain-dit-elasticized": Case(elasticized("ours"), "attention", foreign="ours"),
}
QUICK = ("dit", "elastic-dit", "elastic-mmdit", "flux")


def inputs_of(case: Case, model: nn.Module, seed: int = 0, batch: int = 2) -> dict[str, Any]:
    """What does not change from step to step."""
    torch.manual_seed(100 + seed)
    if case.foreign is not None:
        return retrofit_models.FOREIGN[case.foreign].inputs(batch)
    assert isinstance(model, ElasticMixin)
    condition = model.example_condition(batch)
    if "encoder_hidden_states" in condition:
        condition["encoder_hidden_states"] = torch.randn(batch, 3, 6)
    sample = torch.randn(batch, model.in_channels, *model.sample_size)
    return {"hidden_states": sample, "timestep": torch.ones(batch), **condition}


def calls_of(case: Case, model: nn.Module, seed: int = 0, steps: int = STEPS) -> list[dict]:
    """The arguments of each step of a run: samples that change unevenly, at changing budgets."""
    given = inputs_of(case, model, seed)
    calls = []
    for i in range(steps):
        level = given["timestep"] * (1 - i / steps)
        noise = torch.randn(given["hidden_states"].shape)
        sample = given["hidden_states"] * (1 - i / steps) + 0.02 * (i % 4) * noise
        call = given | {"hidden_states": sample, "timestep": level}
        if model.is_elastic:
            call["num_latents"] = min(NUM_LATENTS[i], model.max_latents)
        calls.append(call)
    return calls


def run(model: nn.Module, calls: Sequence[dict], name: str | None = None) -> list[Tensor]:
    outputs = []
    for call in calls:
        with torch.no_grad():
            if name is None:
                outputs.append(model(**call, return_dict=False)[0])
            else:
                with model.cache_context(name):
                    outputs.append(model(**call, return_dict=False)[0])
    return outputs


# ---- the definitions, written anew ----


@dataclass
class Seen:
    """What passed in one uncached step."""

    output: Tensor
    first_in: Tensor
    first_out: Tensor
    probed: Tensor
    last_out: Tensor


def see(case: Case, model: nn.Module, call: dict, replace: Tensor | None = None) -> Seen:
    """Run a step without a cache; `replace` stands for what the last block gives."""
    first, last = case.ends(model)
    seen: dict[str, Tensor] = {}

    def at_first(part, args, kwargs, result) -> None:
        seen["first_in"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen["first_out"] = case.tokens(result)

    def at_probe(part, args, kwargs) -> None:
        value = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen.setdefault("probed", value)

    def at_last(part, args, result):
        seen["last_out"] = case.tokens(result)
        if replace is None:
            return None
        if isinstance(result, Tensor):
            return replace
        changed = list(result)
        changed[case.output] = replace
        return tuple(changed)

    handles = [
        first.register_forward_hook(at_first, with_kwargs=True),
        first.get_submodule(case.probe).register_forward_pre_hook(at_probe, with_kwargs=True),
        last.register_forward_hook(at_last),
    ]
    try:
        (output,) = run(model, [call])
    finally:
        for handle in handles:
            handle.remove()
    return Seen(output, **seen)


def change(new: Tensor, old: Tensor) -> float:
    return float((new - old).abs().mean() / old.abs().mean())


class First:
    """FirstBlockCache, from its definition."""

    anchor = "first_out"

    def __init__(self, run: Sequence[Seen]):
        added = [seen.first_out - seen.first_in for seen in run]
        self.config = FirstBlockCacheConfig(1.1 * typical(map(change, added[1:], added)))
        self.kept: Tensor | None = None

    def skips(self, step: int, seen: Seen) -> bool:
        added = seen.first_out - seen.first_in
        if self.kept is not None and change(added, self.kept) <= self.config.threshold:
            return True
        self.kept = added
        return False


class Mag:
    """MagCache, from its definition."""

    anchor = "first_in"
    config = MagCacheConfig(
        threshold=0.05, max_skip_steps=2, retention_ratio=0.2, num_inference_steps=STEPS,
        mag_ratios=RATIOS,
    )  # fmt: skip

    def __init__(self, run: Sequence[Seen]):
        self.product, self.error, self.count = 1.0, 0.0, 0

    def skips(self, step: int, seen: Seen) -> bool:
        if step < 2:
            return False
        self.product *= float(np.float32(RATIOS[step]))
        self.error += abs(1 - self.product)
        self.count += 1
        if self.error <= 0.05 and self.count <= 2:
            return True
        self.product, self.error, self.count = 1.0, 0.0, 0
        return False


class Tea:
    """TeaCache, from its definition."""

    anchor = "first_in"
    coefficients = (-0.01, 0.02, 0.1, 0.9, 0.01)

    def __init__(self, run: Sequence[Seen]):
        probed = [seen.probed for seen in run]
        threshold = 1.7 * typical(map(self.expected, probed[1:], probed))
        self.config = TeaCacheConfig(threshold, self.coefficients, num_inference_steps=STEPS)
        self.before: Tensor | None = None
        self.total = 0.0

    def expected(self, new: Tensor, old: Tensor) -> float:
        return float(np.polyval(self.coefficients, change(new, old)))

    def skips(self, step: int, seen: Seen) -> bool:
        before, self.before = self.before, seen.probed
        if before is None or step == STEPS - 1:
            self.total = 0.0
            return False
        self.total += self.expected(seen.probed, before)
        if self.total < self.config.threshold:
            return True
        self.total = 0.0
        return False


def typical(changes: Iterable[float]) -> float:
    return float(np.median(list(changes)))


DEFINITIONS = {"first-block": First, "mag": Mag, "tea": Tea}


def reference(
    case: Case, model: nn.Module, calls: Sequence[dict], definition: Any
) -> tuple[list[Tensor], list[bool]]:
    """Outputs of a run with a cache, and which steps it skips."""
    residual, outputs, skipped = None, [], []
    for step, call in enumerate(calls):
        seen = see(case, model, call)
        anchor = getattr(seen, definition.anchor)
        skipped.append(definition.skips(step, seen))
        if skipped[-1]:
            seen = see(case, model, call, replace=anchor + residual)
        else:
            residual = seen.last_out - anchor
        outputs.append(seen.output)
    return outputs, skipped


def assert_all_equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(a, b), f"step {step}: {(a - b).abs().max()}"


@pytest.mark.parametrize("cache", DEFINITIONS)
@pytest.mark.parametrize("name", some(CASES, QUICK))
def test_a_cache_is_its_definition_at_changing_budgets(name, cache) -> None:
    case = CASES[name]
    model = case.make()
    calls = calls_of(case, model)
    uncached = run(model, calls)
    definition = DEFINITIONS[cache]([see(case, model, call) for call in calls])
    wanted, skipped = reference(case, model, calls, definition)
    assert any(skipped), skipped
    assert not all(skipped[1:]), skipped

    model.enable_cache(definition.config)
    found = run(model, calls, "cond")
    assert_all_equal(found, wanted)
    for a, b, skip in zip(found, uncached, skipped, strict=True):
        assert torch.equal(a, b) != skip
    assert model.cache_counts() == (STEPS - sum(skipped), sum(skipped))

    model.disable_cache()
    assert_all_equal(run(model, calls), uncached)


# ---- runs, branches, sizes ----


@pytest.fixture
def model() -> nn.Module:
    return CASES["elastic-dit"].make()


@pytest.fixture
def calls(model) -> list[dict]:
    return calls_of(CASES["elastic-dit"], model)


LAX = {
    "first-block": FirstBlockCacheConfig(threshold=1e9),
    "mag": MagCacheConfig(
        threshold=1e9, max_skip_steps=99, retention_ratio=0, num_inference_steps=STEPS,
        mag_ratios=RATIOS,
    ),
    "tea": TeaCacheConfig(threshold=1e9),
}  # fmt: skip


@pytest.mark.parametrize("cache", LAX)
def test_branches_keep_to_themselves(model, calls, cache) -> None:
    others = [call | {"num_latents": 1} for call in calls_of(CASES["elastic-dit"], model, seed=1)]
    model.enable_cache(LAX[cache])
    alone = [run(model, branch, "alone") for branch in (calls, others)]
    together = [
        output
        for one, other in zip(calls, others, strict=True)
        for output in (*run(model, [one], "cond"), *run(model, [other], "uncond"))
    ]
    assert_all_equal(together[::2], alone[0])
    assert_all_equal(together[1::2], alone[1])


@pytest.mark.parametrize("broken_off", [1, 3, STEPS])
@pytest.mark.parametrize("cache", LAX)
@pytest.mark.parametrize("name", [None, "cond"])
def test_a_run_knows_nothing_of_the_one_before(model, calls, cache, name, broken_off) -> None:
    """Noise levels jump back, or the first one is there again."""
    others = calls_of(CASES["elastic-dit"], model, seed=1)
    model.enable_cache(LAX[cache])
    wanted = run(model, calls, name)
    model._reset_stateful_cache()
    run(model, others[:broken_off], name)
    assert_all_equal(run(model, calls, name), wanted)


def test_a_level_is_visited_twice_by_one_run_but_not_thrice_nor_the_first(model, calls) -> None:
    """Heun's method, which pipelines of diffusers don't number, goes on as one run."""
    model.enable_cache(LAX["tea"])
    heun = [calls[0], *(call for call in calls[1:] for _ in range(2))]
    run(model, heun, "cond")
    assert model.cache_counts() == (1, 2 * STEPS - 2)
    uncached = CASES["elastic-dit"].make()
    for before in (calls[:1], [calls[0], calls[3], calls[3]]):
        model._reset_stateful_cache()
        run(model, before)
        other = before[-1] | {"hidden_states": -before[-1]["hidden_states"]}
        assert_all_equal(run(model, [other]), run(uncached, [other]))


def test_the_noise_level_is_not_read_where_steps_are_numbered(model, calls) -> None:
    """It would wait for the device."""
    model.enable_cache(LAX["tea"])
    hook = HookRegistry.check_if_exists_or_initialize(model).get_hook(CALL_HOOK)
    for index in range(2):
        with model.cache_context("cond", step_index=index):
            hook.steps.begin_call(torch.ones(2, device="meta"))  # holds no number to read
    assert hook.steps.step == 1


@pytest.mark.parametrize("length", [1, 9])
def test_a_text_of_another_length_begins_anew(length) -> None:
    case = CASES["qwen"]
    model = case.make()
    calls = calls_of(case, model, steps=2)
    calls[1] |= {
        "encoder_hidden_states": torch.randn(2, length, 12),
        "encoder_hidden_states_mask": torch.ones(2, length, dtype=torch.bool),
    }
    wanted = run(model, calls)
    model.enable_cache(LAX["tea"])
    assert_all_equal(run(model, calls), wanted)
    assert model.cache_counts() == (2, 0)


DEEP = Case(ours(elit.DiT, depth=12), "attention")


@pytest.mark.parametrize(
    "case", [DEEP, CASES["our-plain-dit-elasticized"]], ids=["ours", "foreign"]
)
def test_a_cache_and_compiled_blocks(case) -> None:
    """One graph serves many blocks; a full graph has no place for a cache."""
    model = case.make()
    calls = [call | {"num_latents": 4} for call in calls_of(case, model)]
    model.enable_cache(TeaCacheConfig(1e9, num_inference_steps=STEPS))
    wanted = run(model, calls)
    with pytest.raises(ValueError, match=r"a step cache is on; .* use .*fullgraph=False"):
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.compiler.reset()
    counter = CompileCounter()
    model.compile_repeated_blocks(backend=counter)
    assert_all_equal(run(model, calls), wanted)
    assert model.cache_counts() == (4, 2 * STEPS - 4)
    assert 0 < counter.frame_count <= 4  # of 11 blocks, or 5
    model.disable_cache()

    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=r"compiled to full graphs; .* use .*fullgraph=False"):
        model.enable_cache(TeaCacheConfig())
    assert not model.is_cache_enabled
    copy.deepcopy(model).enable_cache(TeaCacheConfig())  # a copy is not compiled
    model.compile_repeated_blocks(backend="eager")
    model.enable_cache(TeaCacheConfig(1e9, num_inference_steps=STEPS))
    assert_all_equal(run(model, calls), wanted)


def test_a_stock_model_compiled_to_full_graphs_says_why() -> None:
    model = retrofit_models.make("qwen")
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    elit.enable_step_cache(model, TeaCacheConfig())
    with pytest.raises(Unsupported, match=r"use compile_repeated_blocks\(fullgraph=False\)"):
        run(model, [retrofit_models.inputs("qwen")])


def test_noise_levels_may_go_up_instead(model, calls) -> None:
    """Of models that count time from noise to data; the first turn is taken for a new run."""
    model.enable_cache(LAX["tea"])
    calls = [call | {"timestep": 1 - call["timestep"]} for call in calls]
    run(model, calls)
    assert model.cache_counts() == (2, STEPS - 2)
    run(model, calls)
    assert model.cache_counts() == (3, 2 * STEPS - 3)


@pytest.mark.parametrize("cache", LAX)
def test_another_batch_or_size_begins_anew(model, calls, cache) -> None:
    uncached = run(model, calls)
    model.enable_cache(LAX[cache])
    run(model, calls[:3])
    wide = torch.randn(2, 2, 8, 16)
    for call in (
        calls[3] | {"hidden_states": calls[3]["hidden_states"][:1], "timestep": torch.tensor(0.7),
                    "class_labels": torch.tensor([0])},
        calls[4] | {"hidden_states": wide},
    ):  # fmt: skip
        model.disable_cache()
        wanted = run(model, [call])
        model.enable_cache(LAX[cache])
        run(model, calls[:3])
        assert_all_equal(run(model, [call]), wanted)
    assert_all_equal(run(model, calls[5:6]), uncached[5:6])


def test_a_branch_that_missed_a_step_begins_anew(model, calls) -> None:
    """Guidance in an interval changes between one branch and both in a batch."""
    uncached = run(model, calls)
    model.enable_cache(LAX["tea"])
    found = [
        run(model, [call], "cond_uncond" if 2 <= i < 5 else "cond")[0]
        for i, call in enumerate(calls)
    ]
    computed = [i for i in range(STEPS) if torch.equal(found[i], uncached[i])]
    assert computed == [0, 2, 5]


@pytest.mark.parametrize("told", ["config", "context", "nobody"])
def test_the_last_step_is_computed_where_it_is_known(model, calls, told) -> None:
    uncached = run(model, calls)
    model.enable_cache(TeaCacheConfig(1e9, num_inference_steps=STEPS if told == "config" else None))
    found = []
    for i, call in enumerate(calls):
        place = {"step_index": i, "num_inference_steps": STEPS} if told == "context" else {}
        with model.cache_context("cond", **place), torch.no_grad():
            found.append(model(**call).sample)
    assert torch.equal(found[-1], uncached[-1]) == (told != "nobody")
    assert model.cache_counts()[0] == (1 if told == "nobody" else 2)


def test_magcache_stretches_its_ratios_to_the_run(model, calls) -> None:
    config = MagCacheConfig(
        threshold=0.03, retention_ratio=0.2, num_inference_steps=5, mag_ratios=RATIOS[::2]
    )
    stretched = MagCacheConfig(
        threshold=0.03, retention_ratio=0.2, num_inference_steps=STEPS,
        mag_ratios=stock.mag_cache.nearest_interp(torch.tensor(RATIOS[::2]), STEPS),
    )  # fmt: skip
    found = []
    for one in (config, stretched):
        model.enable_cache(one)
        for i, call in enumerate(calls):
            place = {"step_index": i, "num_inference_steps": STEPS}
            with model.cache_context("cond", **place), torch.no_grad():
                found.append(model(**call).sample)
        assert all(model.cache_counts())
        model.disable_cache()
    assert_all_equal(found[:STEPS], found[STEPS:])


def test_with_gradients_nothing_is_skipped(model, calls) -> None:
    model.enable_cache(LAX["tea"])
    run(model, calls[:2])
    plain = CASES["elastic-dit"].make()
    for one in (model, plain):
        one(**calls[2]).sample.square().mean().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# ---- beside diffusers' own, and on stock models ----


@pytest.mark.parametrize("cache", ["first-block", "mag"])
@pytest.mark.parametrize("name", some(("qwen", "wan"), ("qwen",)))
def test_on_stock_models_ours_are_diffusers_caches(name, cache) -> None:
    model = retrofit_models.make(name)
    case = Case(lambda: model, "attn", foreign=name)
    given = inputs_of(case, model)
    calls = [
        given
        | {
            "timestep": given["timestep"] * (1 - i / STEPS),
            "hidden_states": given["hidden_states"] * (1 - i / STEPS),
        }
        for i in range(STEPS)
    ]
    threshold = {"qwen": 0.3, "wan": 0.15}[name]
    config = FirstBlockCacheConfig(threshold) if cache == "first-block" else Mag.config
    model.enable_cache(config)
    wanted = run(model, calls, "cond")
    model.disable_cache()
    elit.enable_step_cache(model, config)
    found = run(model, calls, "cond")
    elit.disable_step_cache(model)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    uncached = run(model, calls)
    same = sum(torch.equal(a, b) for a, b in zip(found, uncached, strict=True))
    assert 1 < same < STEPS


@pytest.mark.parametrize("name", some(("sd3", "qwen", "wan"), ("sd3", "qwen")))
@pytest.mark.parametrize("is_elastic", [False, True])
def test_a_stock_pipeline_draws_with_teacache(name, is_elastic) -> None:
    pipe = stock_pipelines.build(name)
    transformer = pipe.transformer
    if is_elastic:
        foreign = retrofit_models.FOREIGN[stock_pipelines.STOCK[name].transformer]
        elit.elasticize(transformer, head=1, tail=1, group=foreign.group)
        transformer.set_budget(1.0, guide=0.25)
    images = stock_pipelines.run(pipe, name, steps=4)
    calibration = calibrate_cache(
        transformer, lambda: stock_pipelines.run(pipe, name, steps=4), degree=1
    )
    assert calibration.num_steps == 4
    assert len(calibration.changes) == 3 * (2 if is_elastic or name != "sd3" else 1)
    for threshold in (0.0, 1e9):
        elit.enable_step_cache(transformer, calibration.teacache(threshold))
        drawn = stock_pipelines.run(pipe, name, steps=4)
        again = stock_pipelines.run(pipe, name, steps=4)
        elit.disable_step_cache(transformer)
        assert torch.equal(drawn, again)
        assert torch.equal(drawn, images) == (threshold == 0)
    assert torch.equal(stock_pipelines.run(pipe, name, steps=4), images)


# ---- our pipelines ----


@pytest.fixture
def pipe(model) -> Any:
    pipe = elit.ElitPipeline(model, elit.make_scheduler("euler"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, guidance: Any = None, **kwargs: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    options = {"num_inference_steps": 6, "output_type": "latent"} | kwargs
    return pipe([0, 2], guidance=guidance, generator=generators, **options).images


GUIDANCES = {"none": None, "cfg": CFG(2.0), "ccfg": CheapCFG(2.0), "in part": CFG(2.0, (0.3, 0.7))}


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_our_pipeline_draws_with_caches(pipe, guidance, sampler) -> None:
    pipe.scheduler = elit.make_scheduler(sampler)
    calls = {"euler": 6, "heun": 11}[sampler]
    budgets = list(itertools.islice(itertools.cycle((1.0, 0.25, 0.5)), calls))
    options = {"guidance": GUIDANCES[guidance], "budgets_of_steps": budgets}
    images = draw(pipe, **options)
    model, branches = pipe.transformer, 2 if guidance == "ccfg" else 1
    model.enable_cache(TeaCacheConfig(0.0))
    # Without a cache a guide of another budget goes in one batch with what it guides.
    torch.testing.assert_close(draw(pipe, **options), images)
    assert model.cache_counts() == (branches * calls, 0)
    model.disable_cache()
    model.enable_cache(TeaCacheConfig(1e9))
    drawn = draw(pipe, **options)
    computed, skipped = model.cache_counts()
    assert skipped
    # First and last; where guidance is on in part, the first of each stretch: Euler's last is one.
    in_part = {"euler": 3, "heun": 4}[sampler]
    assert computed == (in_part if guidance == "in part" else 2 * branches)
    assert not torch.equal(drawn, images)
    assert torch.equal(draw(pipe, **options), drawn)


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


# Where it begins unguided, it would take up the guided branch's state at its second step.
@pytest.mark.parametrize("later", [{}, {"guidance": CFG(2.0, interval=(0.0, 0.9))}])
@pytest.mark.parametrize("config", [TeaCacheConfig(1e9), FirstBlockCacheConfig(threshold=50.0)])
def test_a_pipeline_that_broke_off_leaves_nothing(pipe, config, later) -> None:
    pipe.transformer.enable_cache(config)
    images = draw(pipe, **later)
    for before in ({"guidance": CFG(2.0)}, {"budget": 0.25}):
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, callback_on_step_end=stop, **before)
        assert torch.equal(draw(pipe, **later), images)


# ---- what is refused ----


def attention(**kwargs: Any) -> Any:
    return stock.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, **kwargs)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (attention(current_timestep_callback=lambda: 1), "attention of an earlier step"),
        (stock.TaylorSeerCacheConfig(), "extrapolates what each block gave"),
        (stock.FasterCacheConfig(), "both branches of guidance in one batch of one budget"),
        (stock.SeaCacheConfig(), "not known to work there"),
        (0.1, "float is not for elastic transformers"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_caches_that_cannot_work_are_refused(model, config, reason) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        model.enable_cache(config)
    assert "use FirstBlockCacheConfig, MagCacheConfig or TeaCacheConfig" in str(caught.value)
    assert not model.is_cache_enabled


def test_what_else_cannot_be(model, calls) -> None:
    for config, message in (
        (MagCacheConfig(calibrate=True), r"use elit\.calibrate_cache"),
        (TeaCacheConfig(probe="attn"), r"no part 'attn'.*it has modulation, attention, mlp"),
    ):
        refuses(message, model.enable_cache, config)
    model.enable_cache(TeaCacheConfig(probe="modulation"))  # of the noise level alone
    run(model, calls)
    refuses("is on already; call disable_cache", model.enable_cache, TeaCacheConfig())
    refuses("a step cache is on already", calibrate_cache, model, lambda: None)
    refuses("call disable_cache\\(\\) before you copy", copy.deepcopy, model)
    model.disable_cache()
    model.disable_cache()
    copied = copy.deepcopy(model)
    assert_all_equal(run(copied, calls), run(model, calls))
    transformer = retrofit_models.make("qwen")
    elit.enable_step_cache(transformer, TeaCacheConfig())
    refuses("a step cache is on", elit.elasticize, transformer, 1, 1, (4, 4))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (elit.DiT(**TINY_ELASTIC | {"head": 0}), "this DiT has no head; use a model with head >="),
        (elit.DiT(**TINY | {"depth": 1}), "this DiT has 1 block; a step cache needs two"),
        (nn.Linear(2, 2), "Linear has none of the lists of blocks"),
    ],
)
def test_models_that_no_cache_fits(model, message) -> None:
    refuses(message, elit.enable_step_cache, model, TeaCacheConfig())


class Bare(nn.Module):
    """A block without parts that could be listened to."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + 1


def test_a_block_without_modulated_input_is_an_error() -> None:
    stack = Stack(Bare(), Bare())
    elit.enable_step_cache(stack, TeaCacheConfig())
    with torch.no_grad(), pytest.raises(ValueError, match="no modulated input in the first block"):
        stack(torch.ones(1, 2, 3))


# ---- text after the blocks ----


class TwoStreams(nn.Module):
    """A block that changes both streams."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor
        self.part = nn.Identity()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple:
        tokens = self.part(hidden_states * 1.0) * self.factor
        return tokens, encoder_hidden_states + tokens.mean(), "kept"


class TextLast(nn.Module):
    """A model that reads its text behind the blocks too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoStreams(factor) for factor in (2.0, 3.0, 0.5))

    def forward(self, hidden_states: Tensor, text: Tensor, timestep: Tensor) -> tuple:
        for block in self.blocks:
            hidden_states, text, rest = block(hidden_states, text)
            assert rest == "kept"
        return hidden_states, text


def test_the_text_has_a_residual_too() -> None:
    model = TextLast()
    elit.enable_step_cache(model, TeaCacheConfig(1e9))
    x, text = torch.full((1, 4, 2), 1.0), torch.zeros(1, 3, 2)
    with torch.no_grad():
        tokens, words = model(x, text, torch.tensor(1.0))
        assert (float(tokens.mean()), float(words.mean())) == (3.0, 2 + 6 + 3)
        tokens, words = model(2 * x, text + 1, torch.tensor(0.5))
    assert torch.equal(tokens, 2 * x + 2)
    assert torch.equal(words, text + 1 + 11)


def test_a_block_that_the_computed_step_left_out_runs() -> None:
    """Some models leave out blocks at some calls, such as SD3 with `skip_layers`."""
    transformer = CASES["sd3"].make()
    calls = calls_of(CASES["sd3"], transformer, steps=2)
    transformer.enable_cache(TeaCacheConfig(1e9))
    wanted = run(transformer, [calls[0] | {"skip_layers": [2]}, calls[1] | {"skip_layers": [2]}])
    transformer._reset_stateful_cache()
    found = run(transformer, [calls[0] | {"skip_layers": [2]}, calls[1]])
    assert_all_equal(found, wanted)
    assert transformer.cache_counts() == (2, 2)
