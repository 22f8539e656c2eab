"""Random calls of models, pipelines and `elasticize`: each is right, or an error of ours.

A case is its kind and its seed. It passes if what comes back is finite and of the right shape, or
if a ValueError or TypeError is raised by this library, in one line. `FAILED_FIRST` keeps the seeds
that once failed.
"""

import random
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import run_cases
from helpers import make_inputs, randomise, tiny_dit, tiny_elastic
from torch import Tensor, nn

import elit
from elit import (
    CFG,
    AutoGuidance,
    CheapCFG,
    ElitPipeline,
    ElitTextPipeline,
    create_model,
    elasticize,
    make_scheduler,
)
from elit.flow.schedulers import SAMPLERS
from elit.models.sit import SiT
from elit.retrofit.layout import Layout, PerToken

FAILED_FIRST: dict[str, list[int]] = {"model": [], "pipeline": [18], "elasticize": []}

# What a person gives by mistake, or to see what happens.
ODD = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 2**31, 10**80, 10**400, -3, 0.0, 0.5, 1.0, 2.5, -0.1,
    1e-30, 1e30, float("nan"), float("inf"), float("-inf"), 1j, "", "1", "0.5", "auto", b"x",
    [], [0], [1], [0.5], [None], ["a"], [[1]], [1, 0.5], [1, 2, 3], (), (1,), (0.2, 0.8), {},
    {"a": 1}, "all", object(), len, int, torch.float32, torch.float64, torch.tensor(1),
    torch.tensor(0.5),
    torch.tensor([]), torch.tensor([1, 2]), torch.tensor([0.1, 0.9]), torch.tensor([True]),
    torch.zeros(1, 3), torch.Generator(),
]  # fmt: skip
DTYPES = [
    torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool,
    torch.complex64,
]  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """Something else than a value that is right: of another kind, dtype, device or shape."""
    if not isinstance(value, Tensor) or rng.random() < 0.4:
        return rng.choice(ODD)
    changes: list[Callable[[], Any]] = [
        lambda: value.to(rng.choice(DTYPES)),
        lambda: value.to("meta"),
        lambda: value[None],
        lambda: value[:0],
        lambda: value.movedim(-1, 0),
        lambda: torch.cat((value, value), dim=rng.randrange(value.ndim)),
        value.tolist,
        lambda: value * rng.choice((-1, 1000)),
    ]
    change = rng.randrange(8)
    return value if change in (3, 4, 5) and not value.ndim else changes[change]()


# ---- models ----


@cache
def model_of(name: str) -> nn.Module:
    return {
        "dit": tiny_dit,
        "elit-dit": tiny_elastic,
        "clips": lambda: tiny_elastic(sample_size=(2, 4, 4), group=(1, 2, 2)),
        "sit": lambda: randomise(
            SiT(
                sample_size=8, in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=3,
                num_classes=3, group=2, head=1, tail=1,
            )
        ),
    }.get(name, lambda: create_model(name).eval())()  # fmt: skip


MODELS = (
    "dit", "elit-dit", "clips", "sit", "elit-uvit-tiny/2", "elit-hdit-tiny/2", "elit-mmdit-tiny/2",
)  # fmt: skip


def model_case(rng: random.Random) -> None:
    """A forward with one or two arguments that may not fit."""
    model = model_of(rng.choice(MODELS))
    samples, levels, *condition = make_inputs(model)
    given: dict[str, Any] = {"hidden_states": samples, "timestep": levels}
    given |= dict(zip(("class_labels", "encoder_hidden_states"), condition, strict=False))
    given |= {"num_latents": model.max_latents or None, "latent_indices": None}
    if model.takes_text:
        given |= {"encoder_attention_mask": torch.ones(condition[1].shape[:2], dtype=torch.bool)}
        given |= {"pooled_projections": None}
    for name in rng.sample(list(given), rng.randint(0, 2)):
        given[name] = mutated(given[name], rng)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=rng.random() < 0.2):
        out = model(**given).sample
    assert out.shape == given["hidden_states"].shape
    assert out.is_meta or out.isfinite().all()


# ---- pipelines ----


@cache
def pipeline_of(kind: str) -> Any:
    if kind == "texts":
        pipeline: Any = ElitTextPipeline(model_of("elit-mmdit-tiny/2"), make_scheduler("euler"))
    else:
        build = tiny_dit if kind == "dit" else tiny_elastic
        clips = {"sample_size": (2, 4, 4), "group": (1, 2, 2)} if kind == "clips" else {}
        pipeline = ElitPipeline(build(in_channels=3, **clips), make_scheduler("euler"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def a_guidance(rng: random.Random) -> Any:
    """A guidance whose own settings may be odd."""
    make = rng.choice((CFG, AutoGuidance, CheapCFG))
    odd: dict[str, Any] = {"scale": rng.choice((0.0, 1, 2.5))}
    if rng.random() < 0.5:
        name = rng.choice(("scale", "interval") if make is CFG else ("scale", "interval", "budget"))
        odd[name] = rng.choice(ODD)
    return make(**odd)


def pipeline_case(rng: random.Random) -> None:
    """A run of at most four steps whose arguments may not fit."""
    kind = rng.choice(("dit", "elit-dit", "clips", "texts"))
    pipeline, count = pipeline_of(kind), rng.randint(1, 2)
    pipeline.scheduler = make_scheduler(rng.choice(SAMPLERS))
    main = "prompt" if kind == "texts" else "class_labels"
    given: dict[str, Any] = {main: (["a"] if kind == "texts" else [1]) * count}
    given |= {"num_inference_steps": rng.choice((1, 2, 4)), "output_type": "latent"}
    usual: dict[str, Callable[[], Any]] = {
        "budget": lambda: rng.choice((1, 1.0, [1.0])),
        "guidance": lambda: a_guidance(rng),
        "generator": lambda: [torch.Generator().manual_seed(1)] * rng.randint(0, 3),
        "height": lambda: rng.choice((4, 8, 12, 7, 2**31 - 1, 2**20)),
        "width": lambda: rng.choice((4, 8, 6)),
        "num_frames": lambda: rng.choice((1, 2, 4)),
        "sigmas": lambda: rng.choice(([1.0, 0.5], [0.9], [0.5, 0.7], [1, 1e-9], [float("nan")])),
        "noise": lambda: torch.randn(count, *rng.choice(((3, 8, 8), (3, 2, 4, 4), (1, 16, 16)))),
        "output_type": lambda: rng.choice(("pil", "np", "pt")),
        "callback_on_step_end": lambda: lambda *_: rng.choice((None, {}, *ODD)),
        "callback_on_step_end_tensor_inputs": lambda: ["samples"],
        "negative_prompt" if kind == "texts" else "dtype": lambda: rng.choice(("b", torch.float64)),
    }
    for name in rng.sample([*given, *usual], rng.randint(0, 3)):
        odd = name not in usual or rng.random() < 0.5
        given[name] = rng.choice(ODD) if odd else usual[name]()
    images = pipeline(**given).images
    is_text = isinstance(given[main], str)
    assert len(images) == (1 if is_text else np.asarray(given[main]).size)
    if isinstance(images, Tensor):
        assert images.isfinite().all()


# ---- elasticize ----


class PlainBlock(nn.Module):
    """A block as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Tensor | None = None, **kwargs: Any) -> Tensor:
        del kwargs
        return x + self.linear(x if scale is None else x * scale).tanh()


class NamedBlock(PlainBlock):
    """A block that takes its tokens by keyword alone."""

    def forward(self, *, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.linear(x).tanh()


class NamelessBlock(PlainBlock):
    """A block whose tokens can't be found."""

    def forward(self, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return kwargs["x"] + self.linear(kwargs["x"])


class Own(nn.Module):
    """A transformer of one's own, on a square of 4x4 tokens, that may skip blocks."""

    def __init__(self, block: Callable[[], nn.Module], by_name: bool):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(5))
        self.by_name, self.skipped = by_name, ()

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if number not in self.skipped:
                x = block(x=x) if self.by_name else block(x)
        return x


def elasticize_case(rng: random.Random) -> None:
    """A model that is elastic afterwards, and right, or that is as it was."""
    torch.manual_seed(rng.randrange(1000))
    kind = rng.choice(("own", "own", "dit", "sit"))
    options: dict[str, Any] = {"head": 1, "tail": 1, "group": 2}
    if kind == "own":
        block = rng.choice((PlainBlock, NamedBlock, NamelessBlock, lambda: nn.Linear(8, 8)))
        named = isinstance(block, type) and (block is not PlainBlock or rng.random() < 0.5)
        model: Any = Own(block, named)
        given: tuple = (torch.randn(2, 16, 8),)
        settings: dict[str, Any] = {"blocks": "blocks", "hidden_size": 8, "num_heads": 2}
        usual = {"hidden_states": "x", "per_token": {"scale": PerToken(0)}, "output": 0}
        for name in rng.sample([*settings, *usual, "num_axes", "time_scale"], rng.randint(0, 2)):
            settings[name] = usual.get(name, rng.choice(ODD))
        options["layout"] = Layout(**settings)
    else:
        model = tiny_dit(depth=4) if kind == "dit" else SiT(8, 2, 2, 32, 2, 4, 3)
        given = make_inputs(model)
    usual = {"rank": 2, "group": rng.choice((1, 4, (2, 4), (2, 2, 2), 10**5, 10**9))}
    usual |= {"init": "learned", "head": 2}
    for name in rng.sample(("head", "tail", "group", "init", "rank", "layout"), rng.randint(0, 2)):
        is_usual = name in usual and rng.random() < 0.5
        options[name] = usual[name] if is_usual else rng.choice(ODD)
    with torch.no_grad():
        result = model(*given)
        before = result if isinstance(result, Tensor) else result.sample
        cls, names = type(model), list(model.state_dict())
        try:
            elasticize(model, **options)
        except Exception:
            assert (type(model), list(model.state_dict())) == (cls, names)
            result = model(*given)
            assert torch.equal(result if isinstance(result, Tensor) else result.sample, before)
            raise
        if kind == "own" and rng.random() < 0.3:
            model.skipped = (rng.randrange(5),)
        for num_latents in (model.max_latents, 1):
            result = model(*given, num_latents=num_latents)
            out = result if isinstance(result, Tensor) else result.sample
            assert out.shape == before.shape
            assert out.isfinite().all()
            is_whole = num_latents == model.max_latents and not getattr(model, "skipped", ())
            if is_whole and options.get("init", "identity") == "identity":
                torch.testing.assert_close(out, before, atol=1e-4, rtol=1e-4)


CASES = {"model": model_case, "pipeline": pipeline_case, "elasticize": elasticize_case}


def judged(case: Callable[[random.Random], None], rng: random.Random) -> str | None:
    """What is wrong with a case, if anything: an error that is not one line of ours."""
    try:
        case(rng)
    except (ValueError, TypeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if elit.__path__[0] not in last.filename or "\n" in str(error):
            raise
    return None


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("count", [40, pytest.param(700, marks=pytest.mark.slow)])
def test_random_calls_are_right_or_errors_of_ours(kind: str, count: int, tmp_path) -> None:
    seeds = dict.fromkeys([*FAILED_FIRST[kind], *range(count)])
    wrong = run_cases(lambda rng, folder: judged(CASES[kind], rng), seeds, tmp_path)
    assert not wrong, "\n".join(wrong)
