"""What every backbone promises, plain and elastic, in two and three dimensions.

One row of `CASES` is one model: a new backbone adds a row. `changes` gives every setting of the
constructor another value that must show in what the model computes.
"""

import inspect
import math
from collections.abc import Container
from dataclasses import dataclass

import pytest
import torch
from helpers import TINY, ReferenceDiT, make_inputs, randomise
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from elit.cost.flops import forward_flops
from elit.models.dit import DiT
from elit.models.hdit import HDiT
from elit.models.mmdit import MMDiT
from elit.models.sit import SiT
from elit.models.uvit import UViT


@dataclass(frozen=True)
class Case:
    """A model small enough to run at every budget."""

    cls: type[nn.Module]
    config: dict
    unseen: tuple[int, ...]  # an input size that the model was not made for, not square
    changes: dict  # every setting with another value

    @property
    def is_elastic(self) -> bool:
        return "group" in self.config

    @property
    def conditions(self) -> int:
        """Samples that it takes to see every class, or every word."""
        if self.cls is MMDiT:
            return 5
        return self.config["num_classes"] + 1

    @property
    def plain_settings(self) -> dict:
        """Changes that make the model plain; HDiT's head and tail are there in it too."""
        more = {"write_depth": 1} if self.cls is SiT else {}
        return {"group": None} | more | ({} if self.cls is HDiT else {"head": 0, "tail": 0})

    def build(self, **changes) -> nn.Module:
        return randomise(self.cls(**self.config | changes))


PLAIN = {
    "sample_size": 12,
    "in_channels": 3,
    "patch_size": 1,
    "hidden_size": 64,
    "num_heads": 1,
    "depth": 4,
    "num_classes": 5,
    "mlp_ratio": 2.0,
    "rope_theta": 100.0,
    "prediction_type": "sample",
}
FLAT = TINY | {"patch_size": 1, "group": 4, "head": 1, "tail": 1}
WIDE = TINY | {"sample_size": (4, 12), "group": (2, 3), "head": 1, "tail": 0, "patch_size": (1, 2)}
CLIP = TINY | {"sample_size": (4, 4, 4), "patch_size": (1, 2, 2), "depth": 4}
CLIP_GROUPS = CLIP | {"group": (2, 1, 2), "head": 1, "tail": 1}
MORE = PLAIN | {"head": 0, "tail": 0, "min_latents": 2, "depth": 5}

SKIPS = TINY | {"depth": 5}  # an odd depth, and an even one in 3-D
HOURGLASS = TINY | {"sample_size": (8, 12), "depth": 4, "head": 1, "tail": 1, "kernel_size": 3}
HOURGLASS_CHANGES = {"head": 2, "tail": 2, "depth": 6, "hidden_size": 64, "num_heads": 4}
HOURGLASS_CHANGES |= {"patch_size": (4, 2), "kernel_size": 5, "sample_size": 16}
CLIP_CHANGES = {"sample_size": (2, 8, 4), "patch_size": 2}
HOURGLASS_3D = CLIP | {"head": 1, "tail": 1, "kernel_size": 3}
HOURGLASS_3D_GROUPS = HOURGLASS_3D | {"group": (2, 1, 2)}

TEXT = {"max_text_length": 5, "text_dim": 12, "vocab_size": None, "pooled_dim": None}
PROSE = {k: v for k, v in TINY.items() if k != "num_classes"} | TEXT
WORDS = PROSE | {"text_dim": None, "vocab_size": 20}
PROSE_CHANGES = {k: v for k, v in PLAIN.items() if k != "num_classes"} | {
    "max_text_length": 4, "text_dim": 16, "vocab_size": 24, "pooled_dim": 6
}  # fmt: skip
PROSE_CLIP = {k: v for k, v in CLIP_GROUPS.items() if k != "num_classes"} | TEXT
PROSE_MORE = {k: v for k, v in MORE.items() if k != "num_classes"} | PROSE_CHANGES

# Its interface costs the same at any budget: only with a core of some blocks it saves anything.
SIT = FLAT | {"depth": 6}
NOT_OF_SIT = ("rope_theta", "prediction_type")
SIT_CHANGES = {k: v for k, v in PLAIN.items() if k not in NOT_OF_SIT} | {"qk_norm": True}
SIT_MORE = SIT_CHANGES | {
    "head": 0, "tail": 0, "min_latents": 2, "depth": 5, "patch_size": 2, "group": 2,
    "write_depth": 2,
}  # fmt: skip

CASES = {
    "dit": Case(DiT, TINY, (4, 12), PLAIN),
    "dit-3d": Case(DiT, CLIP, (2, 8, 4), PLAIN | {"sample_size": (2, 4, 4), "depth": 3}),
    "elit-dit": Case(DiT, FLAT, (4, 12), MORE | {"patch_size": 2, "group": 2}),
    "elit-dit-sample": Case(
        DiT, FLAT | {"prediction_type": "sample"}, (4, 12),
        MORE | {"patch_size": 2, "group": 2, "prediction_type": "velocity"},
    ),
    "elit-dit-wide": Case(DiT, WIDE, (6, 6), MORE | {"group": (1, 2), "tail": 1}),
    "elit-dit-3d": Case(
        DiT, CLIP_GROUPS, (2, 8, 4), MORE | {"sample_size": (2, 4, 4), "group": (1, 2, 2)}
    ),
    "uvit": Case(UViT, SKIPS, (4, 12), PLAIN),
    "uvit-3d": Case(UViT, CLIP, (2, 8, 4), PLAIN | {"sample_size": (2, 4, 4), "depth": 3}),
    "elit-uvit": Case(
        UViT, FLAT | {"depth": 5}, (4, 12), MORE | {"patch_size": 2, "group": 2, "depth": 6}
    ),
    "elit-uvit-wide": Case(UViT, WIDE, (6, 6), MORE | {"group": (1, 2), "tail": 1}),
    "elit-uvit-3d": Case(
        UViT, CLIP_GROUPS, (2, 8, 4), MORE | {"sample_size": (2, 4, 4), "group": (1, 2, 2)}
    ),
    "hdit": Case(HDiT, HOURGLASS, (4, 12), PLAIN | HOURGLASS_CHANGES),
    "hdit-3d": Case(
        HDiT, HOURGLASS_3D, (2, 8, 4), PLAIN | HOURGLASS_CHANGES | CLIP_CHANGES
    ),
    "elit-hdit": Case(
        HDiT, HOURGLASS | {"group": 2}, (4, 12), MORE | HOURGLASS_CHANGES | {"group": (1, 2)}
    ),
    "elit-hdit-3d": Case(
        HDiT, HOURGLASS_3D_GROUPS, (2, 8, 4),
        MORE | HOURGLASS_CHANGES | CLIP_CHANGES | {"group": (1, 2, 2)},
    ),
    "mmdit": Case(MMDiT, PROSE, (4, 12), PROSE_CHANGES),
    "mmdit-words": Case(MMDiT, WORDS, (4, 12), PROSE_CHANGES),
    "elit-mmdit": Case(
        MMDiT, PROSE | {"patch_size": 1, "group": 4, "head": 1, "tail": 1}, (4, 12),
        PROSE_MORE | {"patch_size": 2, "group": 2, "depth": 5},
    ),
    "elit-mmdit-words": Case(
        MMDiT, WORDS | {"sample_size": (4, 12), "group": (2, 3), "head": 1, "patch_size": (1, 2)},
        (6, 6), PROSE_MORE | {"group": (1, 2), "tail": 1, "depth": 4},
    ),
    "elit-mmdit-3d": Case(
        MMDiT, PROSE_CLIP, (2, 8, 4),
        PROSE_MORE | {"sample_size": (2, 4, 4), "group": (1, 2, 2), "depth": 5},
    ),
    "sit": Case(SiT, TINY | {"qk_norm": True}, (4, 12), SIT_CHANGES | {"qk_norm": False}),
    "elit-sit": Case(SiT, SIT, (4, 12), SIT_MORE),
    "elit-sit-wide": Case(
        SiT, WIDE | {"depth": 6, "write_depth": 2, "qk_norm": True}, (6, 6),
        SIT_MORE | {"group": (1, 2), "tail": 1, "write_depth": 1, "qk_norm": False},
    ),
}  # fmt: skip
# Of these, another row shows nearly as much in less time: `pytest -m slow` runs them.
SLOW = {
    "dit-3d", "elit-dit-wide", "uvit", "uvit-3d", "elit-uvit-wide", "elit-uvit-3d", "hdit-3d",
    "elit-hdit-3d", "mmdit", "mmdit-words", "elit-mmdit-words", "elit-mmdit-3d", "elit-sit-wide",
}  # fmt: skip


def rows(*, elastic: bool, slow: Container[str] = SLOW) -> pytest.MarkDecorator:
    """The cases, or only the elastic ones."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=name, marks=[pytest.mark.slow] if name in slow else [])
            for name, case in CASES.items()
            if case.is_elastic or not elastic
        ],
    )


ALL, ELASTIC = rows(elastic=False), rows(elastic=True)


def budgets(model: nn.Module) -> list[dict]:
    """The keyword arguments of every budget; of a plain model, none."""
    return [{"num_latents": n} for n in range(1, model.max_latents + 1)] or [{}]


def run(model: nn.Module, inputs: tuple, **budget) -> Tensor:
    with torch.no_grad():
        return model(*inputs, **budget).sample


def to_meta(inputs: tuple) -> tuple:
    return tuple(None if x is None else x.to("meta") for x in inputs)


def squared_error(model: nn.Module, inputs: tuple, **budget) -> Tensor:
    return (model(*inputs, **budget).sample.float() - inputs[0].float().flip(0)).square().mean()


def distance(a: Tensor, b: Tensor) -> float:
    """Relative root mean square difference."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- what goes in and what comes out ----


@ALL
def test_output_has_the_inputs_shape_at_every_budget_and_size(case: Case) -> None:
    model = case.build()
    for size in (model.sample_size, case.unseen):
        inputs = make_inputs(model, size=size)
        for budget in budgets(model):
            out = run(model, inputs, **budget)
            assert out.shape == inputs[0].shape
            assert out.isfinite().all()
        assert torch.equal(run(model, inputs), out)  # all latents are kept by default


@ALL
def test_tuple_output_scalar_timestep_and_missing_labels(case: Case) -> None:
    model = case.build()
    samples, _, *condition = make_inputs(model)
    missing = condition
    if not model.takes_text:
        condition = [torch.full_like(condition[0], case.config["num_classes"])]
        missing = []
    reference = run(model, (samples, torch.full((2,), 0.25), *condition))
    with torch.no_grad():
        (output,) = model(samples, 0.25, *missing, return_dict=False)
    assert torch.equal(output, reference)
    assert torch.equal(run(model, (samples, torch.tensor(0.25), *condition)), reference)


@ALL
def test_samples_of_a_batch_do_not_see_each_other(case: Case) -> None:
    model = case.build()
    inputs = make_inputs(model, batch=3)
    alone = [
        run(model, tuple(None if x is None else x[i : i + 1] for x in inputs)) for i in range(3)
    ]
    close: dict[str, float] = {}
    if "prediction_type" in model.config:  # velocities are differences over the noise level
        close = {"atol": 1e-5 / inputs[1].min().item(), "rtol": 1.3e-6}
    torch.testing.assert_close(torch.cat(alone), run(model, inputs), **close)


@ALL
def test_same_input_same_output_and_no_random_numbers(case: Case) -> None:
    model = case.build()
    inputs = make_inputs(model)
    first, before = run(model, inputs), torch.get_rng_state()
    assert torch.equal(run(model.train(), inputs), first)  # no dropout, no randomness in a model
    squared_error(model, inputs).backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.distributed.is_initialized()


@ALL
def test_condition_and_noise_level_matter(case: Case) -> None:
    model = case.build()
    *inputs, condition = make_inputs(model)  # labels or texts
    samples, sigma, *none = inputs
    out = run(model, (*inputs, condition))
    other = condition.flip(-1) if model.takes_text else condition - 1
    assert distance(run(model, (*inputs, other)), out) > 0.01
    step = 0.1 if case.cls is SiT else 0.001  # the highest frequency of its sigma is 1, not 1000
    assert distance(run(model, (samples, sigma + step, *none, condition)), out) > 0.001


@ALL
def test_save_and_load_is_bit_equal(case: Case, tmp_path) -> None:
    model = case.build()
    model.save_pretrained(tmp_path)
    loaded = case.cls.from_pretrained(tmp_path)
    for setting in case.changes:
        # A default prediction_type is left out. JSON has no tuples.
        saved, read = (one.config.get(setting, "velocity") for one in (model, loaded))
        assert read == (list(saved) if isinstance(saved, tuple) else saved)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    inputs = make_inputs(model)
    assert torch.equal(run(loaded, inputs), run(model, inputs))


# ---- the values: an independent implementation, and the baseline ----

DITS = pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.cls is DiT],
    ids=[name for name, case in CASES.items() if case.cls is DiT],
)


@DITS
@pytest.mark.parametrize("unseen", [False, True], ids=["own size", "unseen size"])
def test_equals_an_independent_implementation(case: Case, unseen: bool) -> None:
    model = case.build()
    reference = ReferenceDiT(model)
    samples, sigma, labels = make_inputs(model, size=case.unseen if unseen else None)
    for budget in budgets(model)[:: 1 if model.max_latents < 8 else 5]:
        out = run(model.float(), (samples, sigma, labels), **budget)
        assert out.dtype == torch.float32
        assert distance(out, reference(samples, sigma, labels, **budget)) < 1e-4
        # In float64, at noise level 0: elsewhere the features of the level are float32.
        inputs = samples.double(), torch.zeros(2), labels
        out = run(model.double(), inputs, **budget)
        assert out.dtype == torch.float64
        assert distance(out, reference(*inputs, **budget)) < 1e-6  # rotary tables are float32


def close(modulation: nn.Module) -> None:
    """Closes all gates of a modulation."""
    for parameter in modulation.parameters():
        nn.init.zeros_(parameter)


def close_write(model: nn.Module) -> None:
    """Makes the Write give back the tokens as they are; SiT's has no gate, and adds places."""
    if not isinstance(model, SiT):
        close(model.write.modulation)
        return
    for module in (model.places, model.write.places):
        close(module)
    for layer in model.write.layers:
        close(layer.attention.to_out)
        close(layer.mlp)


@ELASTIC
def test_without_write_it_is_the_plain_model_of_head_and_tail(case: Case) -> None:
    if case.cls not in (DiT, MMDiT, SiT):
        pytest.skip("plain and elastic have other skips and levels here")
    elastic = case.build()
    head, core, tail = elastic.split
    if case.cls is MMDiT:
        if not tail:
            pytest.skip("the last block's text is another")
        for block in elastic.split_blocks(elastic.blocks)[1]:
            close(block.text.modulation)
    close_write(elastic)
    interface = {"group", "head", "tail", "min_latents", "write_depth"}
    config = {k: v for k, v in case.config.items() if k not in interface}
    plain = case.cls(**config | {"depth": head + tail}).eval()
    weights = {}
    for name, value in elastic.state_dict().items():
        kind, _, rest = name.partition(".")
        if kind == "blocks":
            index, _, rest = rest.partition(".")
            if int(index) < head:
                weights[name] = value
            elif int(index) >= head + core:
                weights[f"blocks.{int(index) - core}.{rest}"] = value
        elif kind not in ("read", "write", "places"):
            weights[name] = value
    plain.load_state_dict(weights)
    inputs = make_inputs(elastic)
    for budget in budgets(elastic)[::3]:
        torch.testing.assert_close(run(elastic, inputs, **budget), run(plain, inputs))


def test_at_initialisation_the_gates_are_closed() -> None:
    for case in CASES.values():
        model = case.cls(**case.config)
        inputs = make_inputs(model)
        x, levels, *_ = inputs
        nothing = model.velocity_of(torch.zeros_like(x), x, levels)
        assert torch.equal(run(model, inputs), nothing)  # the final layer is zero
        nn.init.normal_(model.project.linear.weight)
        out = run(model, inputs)
        last = model.blocks[-1]
        nn.init.normal_(getattr(last, "image", last).mlp[2].weight)  # behind a closed gate
        assert torch.equal(run(model, inputs), out)


@ELASTIC
def test_at_initialisation_the_core_learns_at_once_and_latents_are_no_copies(case: Case) -> None:
    """As soon as the last layer isn't zero, each block of the core and Read have a gradient.

    The public format's start, a SiT's, is another: there Write gives back nothing at first.
    """
    if case.cls is SiT:
        pytest.skip("it has the public format's start")
    model = case.cls(**case.config)
    nn.init.normal_(model.project.linear.weight)
    seen: list[Tensor] = []
    model.read.register_forward_hook(lambda module, given, out: seen.append(out))
    squared_error(model, make_inputs(model)).backward()
    latents = seen[0].unflatten(1, (-1, model.max_latents))  # (B, G, J, D)
    alike = torch.cosine_similarity(latents[:, :, :, None], latents[:, :, None], dim=-1)
    others = alike.masked_select(~torch.eye(model.max_latents, dtype=torch.bool))
    assert others.mean() < 0.5
    _, core, _ = model.split_blocks(model.blocks)
    for block in core:
        assert getattr(block, "image", block).modulation.linear.bias.grad.any()
    for name, parameter in model.read.named_parameters():
        assert parameter.grad.any(), name


# ---- gradients ----

ONE_LATENT_MOOT = tuple(f"write.attention.{part}" for part in ("to_q.", "q_norm.", "k_norm."))


@ALL
def test_every_parameter_has_a_gradient_at_every_budget(case: Case) -> None:
    """In every element, but for what cannot matter.

    Latents that are not kept get none. With one latent per group Write's softmax has one entry,
    which its queries and keys cannot change. In a SiT the Write sees all latents at any budget;
    what is added to all keys alike changes no softmax; and the Write's MLP, before which nothing
    is normalised, has units so far below 0 that nothing reaches them.
    """
    model = case.build().train()
    inputs = make_inputs(model, batch=case.conditions)  # every label
    for budget in budgets(model):
        model.zero_grad()
        squared_error(model, inputs, **budget).backward()
        kept = budget.get("num_latents")
        # In float32 the softmax's backward leaves rounding errors where a gradient is zero.
        tiny = 1e-7 * max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient at {budget}"
            gradient = parameter.grad
            expected = torch.ones_like(gradient, dtype=torch.bool)
            if name in ("read.latents", "read.latent_index") and case.cls is not SiT:
                expected[kept:] = False
            if case.cls is SiT and name.endswith("k_norm.bias"):
                expected[:] = False
            if case.cls is SiT and not model.config.qk_norm and name.endswith("to_qkv.bias"):
                width = case.config["hidden_size"]
                expected[width : 2 * width] = False
            if kept == 1 and name.startswith(ONE_LATENT_MOOT):
                expected[:] = False
            elif kept == 1 and name.startswith("write.attention.to_kv."):
                expected[: case.config["hidden_size"]] = False  # the keys
            assert (gradient[~expected].abs() <= tiny).all(), f"{name} moves at {budget}"
            assert gradient[expected].any() == expected.any(), f"{name} stands at {budget}"
            share = (gradient[expected] != 0).float().mean() if expected.any() else 1
            least = 0.5 if case.cls is SiT and "write.layers" in name else 0.98
            assert share > least, (
                f"{name} has a gradient in {share:.0%} of its elements at {budget}"
            )


@ALL
def test_gradient_checkpointing_changes_nothing(case: Case) -> None:
    model = case.build().train()
    inputs = make_inputs(model)
    squared_error(model, inputs).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss = squared_error(model, inputs).item()
    model.zero_grad()

    model.enable_gradient_checkpointing()
    calls = []
    checkpoint = model._gradient_checkpointing_func
    model._gradient_checkpointing_func = lambda *args: calls.append(args) or checkpoint(*args)
    checkpointed = squared_error(model, inputs)
    checkpointed.backward()
    assert len(calls) == case.config["depth"]
    assert checkpointed.item() == loss
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
    calls.clear()
    run(model, inputs)
    assert not calls  # nothing to save without gradients


# ---- settings ----


def fingerprint(model: nn.Module) -> Tensor:
    """What a pipeline would see of a model: its own size, its lowest budget, its null label."""
    inputs = make_inputs(model)
    lowest = {} if not model.is_elastic else {"num_latents": model.min_latents}
    return torch.stack([run(model, inputs), run(model, inputs, **lowest)])


@ALL
def test_every_setting_changes_the_output(case: Case) -> None:
    settings = inspect.signature(case.cls.__init__).parameters.keys() - {"self", "pooled_dim"}
    settings -= {name for name in ("text_dim", "vocab_size") if not case.config.get(name)}
    if not case.is_elastic:
        settings -= {"min_latents", *case.plain_settings}
    assert settings <= case.changes.keys(), "give every setting another value in CASES"
    model = case.build()
    before = fingerprint(model)
    for name in sorted(settings):
        value = case.changes[name]
        assert model.config.get(name, "velocity") != value
        changed = case.build(**{name: value})
        after = fingerprint(changed)
        shown = after.shape != before.shape or distance(after, before) > 1e-3
        assert shown, f"{name}={value!r} changes nothing"


# ---- budgets ----


@rows(elastic=True, slow=())
def test_flops_fall_strictly_with_the_budget(case: Case) -> None:
    """By formulas, which test_presets.py holds against what is counted."""
    model, plain = case.cls(**case.config), case.cls(**case.config | case.plain_settings)
    flops = [forward_flops(model, **budget) for budget in budgets(model)]
    assert flops == sorted(set(flops))
    assert flops[0] < forward_flops(plain) < flops[-1] == forward_flops(model)


@ELASTIC
def test_the_first_latents_by_index_are_the_first_latents(case: Case) -> None:
    model = case.build()
    inputs = make_inputs(model)
    for budget in budgets(model)[::3]:
        n = budget["num_latents"]
        expected = run(model, inputs, **budget)
        assert torch.equal(run(model, inputs, **budget, latent_indices=torch.arange(n)), expected)
        for indices in (torch.arange(n, dtype=torch.int32), torch.arange(n) - model.max_latents):
            named = run(model, inputs, **budget, latent_indices=indices)
            assert torch.equal(named, expected), indices
        if 1 < n <= model.max_latents // 2:
            last = torch.arange(model.max_latents - n, model.max_latents)
            assert distance(run(model, inputs, **budget, latent_indices=last), expected) > 1e-3
            # The order of the latents is none: they are a set.
            back = run(model, inputs, **budget, latent_indices=torch.arange(n).flip(0))
            torch.testing.assert_close(back, expected)


@ELASTIC
def test_samples_of_different_budgets_in_one_batch(case: Case) -> None:
    """Each is what it is alone; neighbours of one budget, and those apart."""
    model = case.build()
    inputs = make_inputs(model, batch=5)
    most = model.max_latents
    kept = [most, 1, max(1, most // 2), 1, most]
    mixed = run(model, inputs, num_latents=kept)
    for row, n in enumerate(kept):
        alone = tuple(x if x is None else x[row : row + 1] for x in inputs)
        assert distance(mixed[row : row + 1], run(model, alone, num_latents=n)) < 1e-5
    assert torch.equal(run(model, inputs, num_latents=[1] * 5), run(model, inputs, num_latents=1))
    for wrong, message in (
        ({"num_latents": [1, 1]}, "2 num_latents for 5 samples"),
        ({"num_latents": [1, 1, 1, 1, most + 1]}, "is outside 1"),
        ({"num_latents": kept, "latent_indices": torch.arange(1)}, "of one budget"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, inputs, **wrong)


def test_budgets_of_plain_and_elastic_models(dit: DiT) -> None:
    for n in range(1, 17):
        assert dit.resolve_budget(n / 16) == n
        assert dit.budget_of(n) == n / 16
    assert dit.budget_of(None) == 1
    model = CASES["dit"].build()
    assert model.resolve_budget(1) is None
    assert model.budget_of(None) == 1
    with pytest.raises(ValueError, match=r"budget 0\.5 asked of a model that is not elastic"):
        model.resolve_budget(0.5)
    for wrong in ({"num_latents": 1}, {"latent_indices": torch.arange(1)}):
        with pytest.raises(ValueError, match=r"num_latents .* of a model that is not elastic"):
            run(model, make_inputs(model), **wrong)


# Ten seconds each: one per backbone, and one in three dimensions. By default the one of most parts;
# that a DiT is one graph, `test_looking_for_latents_named_twice_cuts_no_graph` shows.
@pytest.mark.parametrize(
    "name",
    [
        "elit-mmdit",
        pytest.param("elit-dit", marks=pytest.mark.slow),
        pytest.param("elit-dit-3d", marks=pytest.mark.slow),
        pytest.param("elit-uvit", marks=pytest.mark.slow),
        pytest.param("elit-hdit", marks=pytest.mark.slow),
        pytest.param("elit-sit", marks=pytest.mark.slow),
    ],
)
def test_at_most_three_graphs_serve_all_budgets(name: str) -> None:
    case = CASES[name]
    model = case.build(head=1, depth=2, tail=0)  # blocks are alike: more only take longer
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    inputs = make_inputs(model)
    for budget in budgets(model):
        torch.testing.assert_close(run(compiled, inputs, **budget), run(model, inputs, **budget))
    assert counter.frame_count <= 3
    torch._dynamo.reset()


# ---- number formats, devices, processes ----


@ALL
def test_bfloat16_is_close_to_float32(case: Case) -> None:
    model = case.build()
    samples, *rest = make_inputs(model)
    for budget in budgets(model)[::4]:
        expected = run(model, (samples, *rest), **budget)
        half = case.build().to(torch.bfloat16)
        out = run(half, (samples.bfloat16(), *rest), **budget)
        assert out.dtype == torch.bfloat16
        assert distance(out, expected) < 0.03


def test_bfloat16_tells_neighbouring_noise_levels_apart() -> None:
    model = CASES["dit"].build().to(torch.bfloat16)
    levels = torch.tensor([0.999, 1.0])  # one number in bfloat16
    embedded = model.time_embed(levels)
    assert distance(embedded[0], embedded[1]) > 0.1


@ALL
def test_autocast_computes_and_learns(case: Case) -> None:
    model = case.build().train()
    inputs = make_inputs(model)
    expected = run(model, inputs)
    squared_error(model, inputs).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(run(model, inputs), expected) < 0.03
        squared_error(model, inputs).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert distance(torch.cat([p.grad.flatten() for p in model.parameters()]), gradients) < 0.1


@ALL
def test_builds_on_the_meta_device(case: Case) -> None:
    with torch.device("meta"):
        model = case.cls(**case.config)
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())  # nothing that `to_empty` would leave unset
    inputs = to_meta(make_inputs(model))
    assert run(model, inputs).shape == inputs[0].shape
    real = randomise(model.to_empty(device="cpu"))
    assert torch.equal(run(real, make_inputs(real)), run(case.build(), make_inputs(real)))


# ---- bad input: each forward checks; what it checks is its base class's, and asked of one ----


def refuses(message: str, model: nn.Module, *inputs, **given) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, inputs, **given)


@ALL
def test_every_forward_checks_its_inputs(case: Case) -> None:
    model = case.build()
    samples, levels, *condition = make_inputs(model)
    refuses("input of shape .* with 2 channels", model, samples[:, :1], levels, *condition)
    message = f"of torch.float64, but this {case.cls.__name__} is of torch.float32"
    refuses(message, model, samples.double(), levels, *condition)
    refuses("timestep 500 is outside 0 ... .* 1000 times", model, samples, 500.0, *condition)
    both = (torch.zeros(2, dtype=torch.long), torch.zeros(2, 1, 8))
    name = "encoder_hidden_states, not class_l" if model.takes_text else "class_labels, not encoder"
    refuses(f"takes {name}", model, samples, levels, *both)
    if not model.takes_text:
        refuses("class_labels of torch.float32", model, samples, levels, condition[0].float())
    if case.is_elastic:
        for wrong in (0, 99):
            message = rf"num_latents {wrong} .*1\.\.{model.max_latents}"
            refuses(message, model, samples, levels, *condition, num_latents=wrong)
        twice = {"num_latents": 2, "latent_indices": torch.tensor([1, 1])}
        refuses("name a latent twice", model, samples, levels, *condition, **twice)


@pytest.fixture(scope="module")
def dit() -> DiT:
    return CASES["elit-dit"].build()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("hidden_states", lambda x: x[..., 0], r"\(batch, channels, height, width\) with 2"),
        ("hidden_states", lambda x: x[:0], "a batch of no samples"),
        ("hidden_states", Tensor.bfloat16, r"hidden_states of torch\.bfloat16, but this DiT"),
        ("hidden_states", Tensor.long, r"hidden_states of torch\.int64, but this DiT"),
        ("hidden_states", lambda x: x.to("meta"), "on meta, but .* is on cpu; move one"),
        ("hidden_states", Tensor.tolist, "are no tensor"),
        ("timestep", torch.tensor([0.5, math.nan]), "timestep nan is outside"),
        ("timestep", -0.1, "timestep -0.1 is outside"),
        ("timestep", True, "timestep of torch.bool"),
        ("timestep", "0.5", "timestep '0.5' is no number"),
        ("timestep", None, "timestep is None; give one number for each sample"),
        ("timestep", torch.zeros(3), r"timestep of shape \(3,\) does not fit a batch of 2"),
        ("class_labels", torch.tensor([0, -1]), r"label -1 is outside 0 \.\.\. 3; 3 means no"),
        ("class_labels", torch.tensor([0, 4]), r"label 4 is outside 0 \.\.\. 3; 3 means no"),
        ("num_latents", -1, r"num_latents -1 .*1\.\.16"),
        ("num_latents", 0.25, r"num_latents 0\.25 .*1\.\.16"),
        ("num_latents", 2.0, r"num_latents 2\.0 .*1\.\.16"),
        ("num_latents", True, r"num_latents True .*1\.\.16"),
        ("latent_indices", torch.arange(2), r"of shape \(2,\).*num_latents = 1"),
        ("latent_indices", torch.tensor([99]), r"latent_indices \[99\] are outside 0 \.\.\. 15"),
        ("latent_indices", torch.tensor([-99]), r"latent_indices \[-99\] are outside"),
        ("latent_indices", [0], "are no tensor of whole numbers"),
        ("latent_indices", torch.tensor([0.0]), "are no tensor of whole numbers"),
        ("latent_indices", torch.tensor([True]), "are no tensor of whole numbers"),
    ],
)
def test_inputs_that_are_none(dit: DiT, name: str, given, message: str) -> None:
    arguments = dict(
        zip(("hidden_states", "timestep", "class_labels"), make_inputs(dit), strict=True)
    )
    arguments["num_latents"] = 1
    arguments[name] = given(arguments[name]) if callable(given) else given
    refuses(message, dit, **arguments)


def test_autocast_takes_what_it_can_cast_and_a_label_stands_for_all(dit: DiT) -> None:
    samples, levels, _ = inputs = make_inputs(dit)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(dit, (samples.bfloat16(), *inputs[1:])).isfinite().all()
        refuses(r"of torch\.float64", dit, samples.double(), *inputs[1:])
    one = run(dit, (samples, levels, torch.tensor([1, 1])))
    torch.testing.assert_close(run(dit, (samples, levels, 1)), one)
    model = CASES["mmdit-words"].build()
    samples, levels, _, text = make_inputs(model)
    refuses("word -1 is outside", model, samples, levels, None, text * 0 - 1)


def test_latent_indices_from_the_end_name_a_latent_once(dit: DiT) -> None:
    inputs, twice = make_inputs(dit), torch.tensor([15, -1])
    refuses("name a latent twice; give", dit, *inputs, num_latents=2, latent_indices=twice)
    run(dit, inputs, num_latents=2, latent_indices=torch.tensor([-1, 0]))


def test_looking_for_latents_named_twice_cuts_no_graph() -> None:
    model = CASES["elit-dit"].build(head=1, depth=2, tail=0)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    inputs = make_inputs(model)
    for first in (0, 1):
        chosen = {"num_latents": 2, "latent_indices": torch.tensor([first, 3])}
        expected = run(model, inputs, **chosen)
        torch.testing.assert_close(run(compiled, inputs, **chosen), expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": 2, "tail": 1}, "head=2 and tail=1 leave no core of 3 blocks"),
        ({"head": -1}, "head of -1"),
        ({"group": (2, 2, 2)}, r"group=\(2, 2, 2\) does not fit inputs of 2 axes"),
        ({"group": 0}, "group=0 does not fit"),
        ({"patch_size": (1, 1, 1)}, r"patch_size=\(1, 1, 1\) does not fit"),
        ({"sample_size": (8,)}, r"sample_size=\(8,\) has 1 axes"),
        ({"min_latents": 0}, r"min_latents 0 is outside 1\.\.16"),
        ({"min_latents": 17}, r"min_latents 17 is outside 1\.\.16"),
        ({"num_heads": 5}, "width 32 cannot be divided into 5 heads"),
        ({"num_heads": 16}, "heads of width 2 cannot carry rotary positions of 2 axes"),
        ({"num_heads": True}, "width 32 cannot be divided into True heads"),
        ({"head": 1.0}, r"a head of 1\.0 and a tail of 1 blocks are not allowed"),
        ({"mlp_ratio": "4"}, "mlp_ratio='4' is not allowed"),
        ({"mlp_ratio": 1e300}, r"mlp_ratio=1e\+300 is not allowed"),
        ({"rope_theta": None}, "rope_theta=None is not allowed"),
        ({"num_classes": "a"}, "num_classes='a' is not allowed"),
        # These say so of an input, as the model takes other sizes than its own.
        ({"group": 3}, "8x8 tokens cannot be cut into groups of 3x3: 8 is not a multiple of 3"),
        ({"patch_size": 3}, "8x8 cannot be cut into patches of 3x3; resize or pad it to 12x12"),
    ],
)
def test_settings_that_do_not_fit(dit: DiT, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**FLAT | settings)(*make_inputs(dit))


@pytest.mark.parametrize("setting", [{"head": 1}, {"tail": 1}, {"min_latents": 2}])
def test_a_plain_model_refuses_settings_of_the_interface(setting: dict) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}.*without groups"):
        DiT(**TINY | setting)
