"""`elasticize` on tiny random transformers of diffusers, on ours, and on a module of one's own."""

import copy
import dataclasses
import gc
import itertools
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import TINY, TINY_ELASTIC, refuses
from retrofit_models import (
    FOREIGN,
    HEAD,
    TAIL,
    double,
    elastic,
    inputs,
    make,
    randomise,
    relative_error,
    some,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import elit
from elit import Layout, PerToken, elasticize, load_elastic, unelasticize
from elit.interface.grid import TokenGrid
from elit.interface.raster import from_groups, to_groups
from elit.retrofit.known import find_layout
from elit.retrofit.places import latent_places

NAMES = list(FOREIGN)


def seeded(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """Its output; diffusers' DiT drops labels at random in training."""
    torch.manual_seed(2)
    return model(**given).sample


# ---- lossless at full budget ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_full_budget_is_the_original(name: str, training: bool) -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model, given = make(name).to(dtype).train(training), inputs(name)
        given = double(given) if dtype == torch.float64 else given
        wanted = seeded(model, given)
        elasticize(model, HEAD, TAIL, FOREIGN[name].group, rank=2)
        assert model.elit.training == training
        assert relative_error(seeded(model, given), wanted) <= bound
        randomise(model.elit)  # whatever it learns, it is nothing at full budget
        assert relative_error(seeded(model, given), wanted) <= bound


@pytest.mark.parametrize("name", some(NAMES))
def test_full_budget_in_bfloat16(name: str) -> None:
    """The error of bfloat16 itself, against float32, and not more than half as much again."""
    exact = make(name)
    given = inputs(name)
    with torch.no_grad():
        wanted = exact(**given).sample
        half = make(name).to(torch.bfloat16)
        low = {k: v.bfloat16() if _is_float(v) and k != "timestep" else v for k, v in given.items()}
        error = (half(**low).sample - wanted).square().mean()
        elasticize(half, HEAD, TAIL, FOREIGN[name].group)
        assert (half(**low).sample - wanted).square().mean() <= 1.5 * error


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("name", some(NAMES))
@pytest.mark.parametrize("init", ["identity", "learned"])
def test_lower_budgets(name: str, init: str) -> None:
    """All are finite, differ, and work on the number of latents that was asked for."""
    model, given = elastic(name, init), inputs(name)
    randomise(model.elit)
    seen: list[int] = []
    core = model._elit_session.layout.find_blocks(model)[HEAD]
    core.register_forward_hook(
        lambda block, args, result: seen.append(model._elit_session.call.latents.shape[1])
    )
    groups = torch.Size(FOREIGN[name].grid).numel() // 16
    outputs = [model(**given, num_latents=n).sample for n in (16, 8, 5, 1)]
    assert seen == [groups * n for n in (16, 8, 5, 1)]
    for output in outputs:
        assert output.isfinite().all()
    for larger, smaller in itertools.pairwise(outputs):
        assert not torch.allclose(larger, smaller)


@pytest.mark.parametrize("name", some(NAMES))
def test_gradient_checkpointing(name: str) -> None:
    """Same gradients, also when three calls at three budgets come before their backward passes."""
    gradients = []
    ways = [(False, False), (True, False), *([(True, True)] if name == "ours" else [])]
    for checkpointing, compiled in ways:
        model, given = elastic(name, std=0.2).double().train(), double(inputs(name))
        if checkpointing:
            model.enable_gradient_checkpointing()
        if compiled:
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.manual_seed(2)
        outputs = [model(**given, num_latents=n).sample for n in (16, 5, 4)]
        sum(output.square().mean() for output in outputs).backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert any(key.startswith("elit.read") for key in gradients[0])
    for others in gradients[1:]:
        assert gradients[0].keys() == others.keys()
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(others[key], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", some(NAMES))
def test_every_parameter_of_the_interface_learns(name: str) -> None:
    for init in ("identity", "learned"):
        model = elastic(name, init).train()
        randomise(model.elit)
        model(**inputs(name), num_latents=5).sample.square().mean().backward()
        for key, parameter in model.elit.named_parameters():
            if key.startswith("adapters.") and not reaches_output(model, key):
                continue
            assert parameter.grad is not None, key
            if key == "read.latents" or "index" in key:
                assert parameter.grad[:5].abs().sum() > 0, key
            elif "to_kv.bias" not in key:  # a key's bias moves all scores alike
                assert parameter.grad.abs().sum() > 0, key


def reaches_output(model: Any, key: str) -> bool:
    """Whether the layer of an adapter matters: the last block's text goes nowhere."""
    _, block, layer, _ = key.split(".")
    blocks = model._elit_session.layout.find_blocks(model)
    gradient = blocks[int(block)].get_submodule(layer.replace("-", ".")).weight.grad
    return gradient is not None and gradient.abs().sum() > 0


# ---- there and back ----


@pytest.mark.parametrize("name", some(NAMES))
def test_unelasticize_gives_the_original(name: str) -> None:
    model, given = make(name), inputs(name)
    kind, names, config = type(model), list(model.state_dict()), dict(model.config)
    wanted = model(**given).sample
    elasticize(model, HEAD, TAIL, FOREIGN[name].group)
    assert [key for key in model.state_dict() if not key.startswith("elit.")] == names
    unelasticize(model)
    assert type(model) is kind
    assert list(model.state_dict()) == names
    assert dict(model.config) == config
    assert torch.equal(model(**given).sample, wanted)
    with pytest.raises((TypeError, ValueError), match="num_latents"):
        model(**given, num_latents=4)


@pytest.mark.parametrize("name", some(NAMES))
@pytest.mark.parametrize("init", ["identity", "learned"])
def test_save_and_load(name: str, init: str, tmp_path: Path) -> None:
    model, given = elastic(name, init, std=0.2), inputs(name)
    model.save_pretrained(tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert config["elastic"]["head"] == HEAD
    for loaded in (
        load_elastic(tmp_path / "transformer"),
        load_elastic(str(tmp_path), subfolder="transformer"),
    ):
        assert type(loaded) is type(model)
        assert loaded.elastic_settings == model.elastic_settings
        for num_latents in (16, 3):
            wanted = model(**given, num_latents=num_latents).sample
            assert torch.equal(loaded.eval()(**given, num_latents=num_latents).sample, wanted)


def test_loading_weights_without_the_interface_is_an_error(tmp_path: Path) -> None:
    model = elastic("sd3")
    model.save_pretrained(tmp_path)
    kind = type(model)
    unelasticize(model).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no 'elastic' settings"):
        kind.from_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"the weights of this ElasticSD3.*missing keys \(elit\."):
        kind.from_pretrained(tmp_path / "plain")


def test_a_layout_of_ones_own_is_not_saved(tmp_path: Path) -> None:
    layout = dataclasses.replace(find_layout(make("sd3")), num_heads=4)
    model = elasticize(make("sd3"), HEAD, TAIL, 4, layout=layout)
    with pytest.raises(ValueError, match="use save_interface"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", some(NAMES))
def test_half_precision_as_diffusers_loads_it(name: str, tmp_path: Path) -> None:
    """`from_pretrained` keeps some parameters in float32: the interface follows the others."""
    make(name).save_pretrained(tmp_path)
    model = type(make(name)).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    given = {k: v.bfloat16() if _is_float(v) and k != "timestep" else v
             for k, v in inputs(name).items()}  # fmt: skip
    elasticize(model, HEAD, TAIL, FOREIGN[name].group, rank=2)
    assert model(**given, num_latents=3).sample.isfinite().all()
    model.save_pretrained(tmp_path / "elastic")
    loaded = type(model).from_pretrained(tmp_path / "elastic", torch_dtype=torch.bfloat16)
    assert loaded(**given, num_latents=3).sample.isfinite().all()


def test_nothing_keeps_a_call_alive() -> None:
    """Without a backward pass a call is gone with its output."""
    model, seen = elastic("sd3").train(), []
    model.transformer_blocks[HEAD].register_forward_hook(
        lambda *given: seen.append(weakref.ref(model._elit_session.call))
    )
    output = model(**inputs("sd3"), num_latents=4).sample
    assert output.requires_grad
    del output
    gc.collect()
    assert [call() for call in seen] == [None]


def test_a_copy_has_hooks_of_its_own() -> None:
    model, given = elastic("flux"), inputs("flux")
    copied = copy.deepcopy(model)
    wanted = model(**given, num_latents=3).sample
    assert torch.equal(copied(**given, num_latents=3).sample, wanted)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(copied(**given, num_latents=3).sample, wanted)
    copied.set_budget(0.5)
    assert model._elit_session.branches.budget == 1
    assert torch.equal(unelasticize(copied)(**given).sample, make("flux")(**given).sample)


# ---- a module of one's own ----


class Block(nn.Module):
    """A block with rotations that multiply, and its own idea of names and order."""

    def __init__(self, dim: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.mlp = nn.Linear(dim, dim)

    def forward(self, scale: Tensor, tokens: Tensor, extra: Tensor | None = None) -> tuple:
        x = tokens * scale
        tokens = tokens + self.attention(x, x, x, need_weights=False)[0]
        return extra, tokens + self.mlp(tokens).tanh()


class Own(nn.Module):
    """A transformer that has never heard of diffusers, with checkpointing of its own."""

    def __init__(self, dim: int = 8, depth: int = 5):
        super().__init__()
        self.layers = nn.ModuleList(Block(dim) for _ in range(depth))
        self.scale = nn.Parameter(torch.rand(36, dim) + 0.5)
        self.checkpointing: bool | None = None  # reentrant, or not

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointing is None:
                _, x = layer(self.scale, x)
            else:
                _, x = checkpoint(layer, self.scale, x, use_reentrant=self.checkpointing)
        return x


OWN = Layout(
    blocks="layers", hidden_size=8, num_heads=2, hidden_states="tokens", output=1,
    per_token={"scale": PerToken(0)},
)  # fmt: skip


def test_own_module() -> None:
    torch.manual_seed(0)
    model, x = Own().double(), torch.randn(2, 36, 8).double()
    wanted = model(x)
    elasticize(model, 1, 1, 3, layout=OWN)
    assert relative_error(model(x), wanted) < 1e-10
    assert model(x, num_latents=2).isfinite().all()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x, num_latents=2), model(x, num_latents=2))
    unelasticize(model)
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("rank", [0, 2])
def test_own_checkpointing(rank: int) -> None:
    torch.manual_seed(0)
    model = elasticize(Own().double(), 1, 1, 3, rank=rank, layout=OWN)
    x = torch.randn(2, 36, 8).double()
    randomise(model.elit)
    gradients = []
    for checkpointing in (None, False):
        model.checkpointing = checkpointing
        model.zero_grad()
        sum(model(x, num_latents=n).square().sum() for n in (5, 5, 2)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)
    model.checkpointing = True
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(x.requires_grad_())


# ---- places ----


@pytest.mark.parametrize("group", [(1, 1), (4, 4), (3, 5), (2, 4, 4), (1, 2, 7)])
def test_places_and_cells(group: tuple[int, ...]) -> None:
    """Any first latents keep their places; cells part the group evenly, each with its place."""
    grid, count = TokenGrid(group, group), torch.Size(group).numel()
    places = [latent_places(grid, n, torch.device("cpu")) for n in range(1, count + 1)]
    for n, at in enumerate(places, 1):
        assert torch.equal(at.index, places[-1].index[:n])
        assert torch.equal(at.cell[at.index], torch.arange(n))
        sizes = at.cell.bincount(minlength=n)
        assert sizes.min() >= 1
        assert sizes.max() <= 3 * sizes.min()
    assert sorted(places[-1].index.tolist()) == list(range(count))


@pytest.mark.parametrize(("size", "group"), [((8, 4), (4, 2)), ((2, 6, 4), (2, 3, 2))])
def test_groups_of_raster_tokens(size: tuple[int, ...], group: tuple[int, ...]) -> None:
    grid = TokenGrid(size, group)
    tokens = torch.arange(grid.num_tokens)[None, :, None]
    groups = to_groups(grid, tokens)
    assert torch.equal(from_groups(grid, groups), tokens)
    places = torch.stack(torch.unravel_index(groups[0, :, :, 0], size), dim=-1)  # (G, P, axes)
    assert torch.equal(places.flatten(0, 1).float(), grid.token_places())


# ---- mistakes ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": 4, "tail": 2}, "leave no core of 6 blocks; choose head \\+ tail < 6"),
        ({"head": 0}, "at least one block on either side"),
        ({"tail": 1.0}, "tail=1.0 are not allowed"),
        ({"group": 0}, "group=0 does not fit .* give one positive integer, or 2 of them"),
        ({"group": (2, 2, 2, 2)}, "does not fit inputs of 2 axes"),
        ({"init": "identiy"}, "did you mean 'identity'"),
        ({"rank": -1}, "rank=-1 is not allowed"),
        ({"layout": Layout(blocks="transformer_block")}, "did you mean 'transformer_blocks'"),
        ({"layout": Layout(blocks="proj_out")}, "not a ModuleList"),
        ({"layout": Layout(hidden_states="hidden_state")}, "did you mean 'hidden_states'"),
        ({"layout": Layout(per_token={"rope": PerToken(0)})}, "take no argument 'rope'"),
    ],
)
def test_a_wrong_split_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    model = make("sd3")
    kind, names = type(model), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        elasticize(model, **({"head": 2, "tail": 1, "group": 4} | arguments))
    assert type(model) is kind
    assert list(model.state_dict()) == names
    assert "forward" not in vars(model)


def shared() -> nn.Module:
    model = Own()
    model.layers[3] = model.layers[1]
    return model


UVIT = "this UViT cannot be elasticized: of elit's models a DiT or a"  # by its class it is a DiT


@pytest.mark.parametrize(
    ("make_model", "layout", "message"),
    [
        (lambda: nn.Linear(2, 2), None, "Say how it is laid out: layout=Layout"),
        (dict, None, "a torch module, not dict"),
        (lambda: elastic("dit"), None, "is elastic already; unelasticize it first"),
        (lambda: torch.compile(nn.Linear(2, 2)), None, "is compiled; elasticize it first, then"),
        (shared, OWN, "comes twice"),
        (Own, Layout(blocks="layers", hidden_states="tokens"), "doesn't say its hidden_size"),
        (lambda: elit.UViT(**TINY), None, UVIT),
        (lambda: elit.HDiT(**TINY | {"head": 1, "tail": 1}), None, "HDiT cannot be elasticized"),
        (lambda: elit.DiT(**TINY_ELASTIC), None, "this DiT is elastic already"),
        (lambda: elit.DiT(**TINY_ELASTIC), Layout(blocks="blocks"), "this DiT is elastic already"),
        (lambda: make("wan"), None, "one positive integer, or 3 of them"),
    ],
)
def test_models_that_cannot_be_patched(make_model: Any, layout: Any, message: str) -> None:
    model = make_model()
    kind = type(model)
    refuses(message, elasticize, model, 1, 1, (3, 3), layout=layout)
    assert type(model) is kind
    refuses("is not elastic", unelasticize, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2}, "rank=2 asks for .* these are linear layers themselves; leave rank at 0"),
        ({"group": 10**6}, r"the interface would take .* GiB.*group=\(1000000, 1000000\)"),
        ({"rank": 10**12}, "rank=1000000000000 is not allowed"),
        ({"layout": "blocks"}, "layout='blocks' is no Layout"),
    ],
)
def test_what_cannot_be_attached_changes_nothing(arguments: dict, message: str) -> None:
    model, x = nn.Module(), torch.randn(1, 4, 8)
    model.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    layout = Layout(blocks="blocks", hidden_size=8, num_heads=2)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        elasticize(model, **{"head": 1, "tail": 1, "group": 2, "layout": layout} | arguments)
    assert type(model) is nn.Module
    assert list(model.state_dict()) == names
    assert "forward" not in vars(model.blocks[1])
    assert torch.equal(model.blocks[1](x), x @ model.blocks[1].weight.T + model.blocks[1].bias)
    with pytest.raises(ValueError, match="hidden_size='8' is not allowed; give a positive"):
        Layout(hidden_size="8")


def test_an_interface_that_fails_half_way_is_taken_out_again() -> None:
    class Fussy(Block):
        """A block that refuses a second hook."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "forward":
                raise TypeError("no hooks here")
            super().__setattr__(name, value)

    model, x = Own(), torch.randn(1, 36, 8)
    model.layers[2] = Fussy(8)
    wanted, names = model(x), list(model.state_dict())
    with pytest.raises(TypeError, match="no hooks here"):
        elasticize(model, 1, 1, 3, layout=OWN)
    assert type(model) is Own
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize(("skipped", "edge"), [(1, "first"), (3, "last")])
def test_skipping_read_or_write_is_an_error(skipped: int, edge: str) -> None:
    model = elasticize(Own(), 1, 1, 3, layout=OWN)
    model.layers[skipped].forward = lambda scale, tokens: (scale, tokens)  # as other code's hook
    with pytest.raises(ValueError, match=f"the {edge} block of the core did not run"):
        model(torch.randn(1, 36, 8), num_latents=2)


def test_tokens_of_another_width_are_named() -> None:
    model = elasticize(Own(), 1, 1, 3, layout=replace(OWN, hidden_size=16))
    with pytest.raises(ValueError, match=r"width 8, but .* 16; give layout=Layout\(hidden_size=8"):
        model(torch.randn(1, 36, 8))


CONTROL = {"block_controlnet_hidden_states": [torch.zeros(1)]}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sd3", {"hidden_states": torch.randn(2, 4, 16, 12)},
         r"8x6 tokens cannot be cut into groups of 4x4.*8x8 tokens"),
        ("sd3", {"num_latents": 17}, "is outside 1"),
        ("sd3", {"num_latents": 0}, "outside 1"),
        ("sd3", CONTROL, "block_controlnet_hidden_states act on the tokens"),
        ("sd3", {"skip_layers": [4]}, "would leave out Read or Write"),
        ("sd3", {"skip_layers": [3]}, None),
        ("qwen", {"img_shapes": [[(1, 8, 4), (1, 8, 4)]] * 2}, "not one image of one size"),
        ("flux", {"img_ids": inputs("flux")["img_ids"].flip(0)}, "not one image row by row"),
    ],
)  # fmt: skip
def test_inputs_that_an_interface_cannot_take(name: str, changes: dict, message: Any) -> None:
    model, given = elastic(name), inputs(name) | changes
    if message is None:
        model(**given)
    else:
        refuses(message, model, **given)


def test_what_else_is_refused() -> None:
    model = elastic("sd3")
    with pytest.raises(RuntimeError, match="called by itself"):
        model.transformer_blocks[2](torch.zeros(1, 32, 32), None, None)
    refuses("outside \\(0, 1\\]", model.set_budget, 0)


def test_a_class_for_every_model_of_diffusers() -> None:
    from elit.retrofit import elastic as module

    kind = module.ElasticQwenImageTransformer2DModel
    assert issubclass(kind, diffusers.QwenImageTransformer2DModel)
    assert kind is type(elastic("qwen"))
    with pytest.raises(AttributeError):
        _ = module.ElasticNothing
