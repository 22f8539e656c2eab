"""Elastic transformers as they are served: compiled, with LoRA, quantised, offloaded, exported."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from retrofit_models import HEAD, TAIL, elastic, inputs, make, relative_error
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from elit import elasticize, load_elastic, load_interface, save_interface, unelasticize


def filled(name: str, rank: int = 0) -> Any:
    return elastic(name, rank=rank, std=0.05).requires_grad_(False)


# ---- compiled ----


def long_inputs(name: str) -> dict[str, Any]:
    """Sizes that are all different: equal ones would be one size to the compiler."""
    given = inputs(name)
    if name == "qwen":
        return given | {"hidden_states": torch.randn(2, 48, 16), "img_shapes": [[(1, 12, 4)]] * 2}
    if name == "flux":
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(12.0), torch.arange(4.0))
        return given | {"hidden_states": torch.randn(2, 48, 16), "img_ids": ids}
    shape = {"sd3": (2, 4, 24, 8), "dit": (2, 4, 24, 24), "wan": (2, 4, 2, 24, 8)}[name]
    return given | {"hidden_states": torch.randn(shape)}


SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("dit", 2),
        pytest.param("qwen", 3, **SLOW),
        pytest.param("sd3", 4, **SLOW),
        pytest.param("flux", 4, **SLOW),
        pytest.param("wan", 2, **SLOW),
    ],
)
def test_few_graphs_serve_all_budgets(name: str, most: int) -> None:
    """SD3 here has blocks of three kinds, Flux of two."""
    torch._dynamo.reset()
    model, given, counter = filled(name), long_inputs(name), CompileCounter()
    budgets = (16, 8, 1, 4, 2, 13)
    with torch.no_grad():
        wanted = [model(**given, num_latents=n).sample for n in budgets]
        model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=counter)
        for n, output in zip(budgets, wanted, strict=True):
            assert relative_error(model(**given, num_latents=n).sample, output) < 1e-5
    assert counter.frame_count <= most
    torch._dynamo.reset()


def test_taken_out_of_a_compiled_model() -> None:
    model, given = make("dit"), inputs("dit")
    wanted = model(**given).sample
    elasticize(model, HEAD, TAIL, 4).compile_repeated_blocks(backend="eager")
    model(**given, num_latents=4)
    unelasticize(model)
    assert relative_error(model(**given).sample, wanted) < 1e-5
    torch._dynamo.reset()


# ---- LoRA ----


LORA_FILE = {"prefix": None, "weight_name": "pytorch_lora_weights.safetensors"}


def lora(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    return peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)


def only_lora(model: Any) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if ".lora_" in key}


@pytest.mark.parametrize("name", ["qwen", "sd3"])
def test_lora_from_the_original_and_back(name: str, tmp_path: Path) -> None:
    """Adapters trained on either load on the other: at full budget they do the same."""
    original, given = make(name), inputs(name)
    plain = original(**given).sample
    torch.manual_seed(3)
    original.add_adapter(lora())
    original.save_lora_adapter(tmp_path / "original")
    wanted = original(**given).sample
    assert relative_error(plain, wanted) > 1e-3

    model = filled(name)
    bare = model(**given, num_latents=3).sample
    model.load_lora_adapter(str(tmp_path / "original"), **LORA_FILE)
    assert len(only_lora(model)) == len(only_lora(original))
    assert not [key for key in only_lora(model) if key.startswith("elit.")]
    assert relative_error(model(**given).sample, wanted) < 1e-5
    assert relative_error(model(**given, num_latents=3).sample, bare) > 1e-4

    model.save_lora_adapter(tmp_path / "elastic", adapter_name="default_0")
    other = make(name)
    other.load_lora_adapter(str(tmp_path / "elastic"), **LORA_FILE)
    assert relative_error(other(**given).sample, wanted) < 1e-5

    model.delete_adapters("default_0")
    assert torch.equal(model(**given, num_latents=3).sample, bare)
    assert relative_error(model(**given).sample, plain) < 1e-5


def test_lora_before_elasticize_and_fused() -> None:
    model, given = make("qwen"), inputs("qwen")
    torch.manual_seed(3)
    model.add_adapter(lora())
    wanted = model(**given).sample
    elasticize(model, HEAD, TAIL, 4)
    assert relative_error(model(**given).sample, wanted) < 1e-5
    model.disable_adapters()
    assert relative_error(model(**given).sample, make("qwen")(**given).sample) < 1e-5
    model.enable_adapters()
    low = model(**given, num_latents=3).sample
    model.fuse_lora()
    assert relative_error(model(**given, num_latents=3).sample, low) < 1e-5
    model.unfuse_lora()
    unelasticize(model)
    assert relative_error(model(**given).sample, wanted) < 1e-5


def test_an_interface_with_adapters_on_a_model_with_a_lora(tmp_path: Path) -> None:
    """Ours act below full budget on the layers that peft has wrapped, whichever came first."""
    given = inputs("qwen")
    model = filled("qwen", rank=2)
    save_interface(model, tmp_path / "interface.safetensors")
    torch.manual_seed(3)
    model.add_adapter(lora(exclude_modules=r"elit\..*"))
    other = make("qwen")
    torch.manual_seed(3)
    other.add_adapter(lora())
    wanted = other(**given).sample
    load_interface(other, tmp_path)
    other.load_state_dict(model.state_dict())
    assert relative_error(other(**given).sample, wanted) < 1e-5
    low = model(**given, num_latents=3).sample
    assert relative_error(other(**given, num_latents=3).sample, low) < 1e-5
    assert relative_error(copy.deepcopy(other)(**given, num_latents=3).sample, low) < 1e-5


def test_training_a_lora_on_an_elastic_model() -> None:
    model, given = filled("sd3"), inputs("sd3")
    model.add_adapter(lora(exclude_modules=r"elit\..*"))  # its attention has a `to_q` too
    model(**given, num_latents=3).sample.square().mean().backward()
    trained = {key for key, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all(".lora_" in key and not key.startswith("elit.") for key in trained)


# ---- stored small ----


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_int8_weights(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    model, given = filled("qwen"), inputs("qwen")
    model.save_pretrained(tmp_path)
    config = diffusers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    small = load_elastic(tmp_path, quantization_config=config, dtype=torch.float32)
    assert "Int8Tensor" in type(small.transformer_blocks[2].attn.to_q.weight).__name__
    with torch.no_grad():
        for n in (16, 5, 1):
            wanted = model(**given, num_latents=n).sample
            assert relative_error(small(**given, num_latents=n).sample, wanted) < 0.05


def test_fp8_storage() -> None:
    model, given = filled("sd3"), inputs("sd3")
    with torch.no_grad():
        wanted = [model(**given, num_latents=n).sample for n in (16, 3)]
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        assert model.transformer_blocks[2].ff.net[2].weight.dtype == torch.float8_e4m3fn
        assert {p.dtype for p in model.elit.parameters()} == {torch.float32}  # kept as they are
        for n, output in zip((16, 3), wanted, strict=True):
            got = model(**given, num_latents=n).sample
            assert (got - output).norm() / output.norm() < 0.1


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(kind: str) -> None:
    model, given = filled("qwen"), inputs("qwen")
    with torch.no_grad():
        wanted = [model(**given, num_latents=n).sample for n in (16, 3)]
        options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(
            torch.device("cpu"), torch.device("cpu"), offload_type=kind, **options
        )
        for n, output in zip((16, 3), wanted, strict=True):
            assert torch.equal(model(**given, num_latents=n).sample, output)


# ---- exported ----


@pytest.mark.parametrize("name", ["sd3", pytest.param("dit", marks=pytest.mark.slow)])
def test_export_at_a_budget(name: str) -> None:
    model, given = filled(name), inputs(name)
    with torch.no_grad():
        exported = torch.export.export(_AtBudget(model, 5), (), dict(given), strict=False).module()
        wanted = model(**given, num_latents=5).sample
        assert relative_error(exported(**given), wanted) < 1e-5


class _AtBudget(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, num_latents: int):
        super().__init__()
        self.model, self.num_latents = model, num_latents

    def forward(self, **given: Any) -> Tensor:
        return self.model(**given, num_latents=self.num_latents, return_dict=False)[0]
