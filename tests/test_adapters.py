"""LoRA on our models and pipelines by diffusers' own methods, and the backends that they lack."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from helpers import ELASTIC, make_inputs, refuses, tiny_elastic
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from retrofit_models import relative_error

from elit import ElitPipeline, make_scheduler
from elit.models.base import LORA


def test_all_of_diffusers_mixin_is_there() -> None:
    names = {name for name in vars(PeftAdapterMixin) if not name.startswith("__")}
    assert names == LORA
    assert not hasattr(tiny_elastic(), "add_adaptor")


def trained(model: Any, layers: list[str], **inputs: Any) -> list[str]:
    """Train LoRA for a step; names of the parameters that got a gradient."""
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=layers))
    model.train()
    model(*make_inputs(model), **inputs)[0].square().mean().backward()
    found = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            found.append(name)
            parameter.data -= parameter.grad / parameter.grad.norm()
            parameter.grad = None
    model.eval()
    return found


@pytest.fixture(params=["dit", "mmdit", "uvit"])
def model(request: pytest.FixtureRequest) -> Any:
    return ELASTIC[request.param]()


def test_an_adapter_starts_at_nothing_and_learns(model: Any) -> None:
    names, inputs = ["to_qkv", "to_out"], make_inputs(model)
    with torch.no_grad():
        before = model(*inputs)[0]
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names), "zero")
        assert torch.equal(model(*inputs)[0], before)
    assert model.active_adapters() == ["zero"]
    model.unload_lora()
    found = trained(model, names, num_latents=2)
    assert found
    assert all(".lora_B." in name for name in found)  # A learns once B is not 0
    with torch.no_grad():
        assert relative_error(model(*inputs)[0], before) > 1e-3
        model.disable_lora()
        assert torch.equal(model(*inputs)[0], before)


def test_loaded_into_a_pipeline(tmp_path: Path) -> None:
    model, pipeline = (tiny_elastic(in_channels=1) for _ in range(2))
    pipeline = ElitPipeline(pipeline, make_scheduler("euler"))
    inputs = make_inputs(model)

    def found() -> torch.Tensor:
        with torch.no_grad():
            return pipeline.transformer(*inputs)[0]

    plain = found()
    trained(model, ["to_qkv"])
    wanted = model(*inputs)[0].detach()
    ElitPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(model))
    model.save_lora_adapter(tmp_path / "bare")
    refuses("tensors are named transformer", pipeline.load_lora_weights, tmp_path / "bare")
    pipeline.load_lora_weights(tmp_path / "lora", adapter_name="mine")
    assert relative_error(found(), wanted) < 1e-5
    pipeline.set_adapters("mine", 0.0)
    assert relative_error(found(), plain) < 1e-6
    pipeline.set_adapters("mine", 1.0)
    refuses("has LoRA around its layers", pipeline.save_pretrained, tmp_path / "run")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "run")
    pipeline = ElitPipeline.from_pretrained(tmp_path / "run")
    assert relative_error(found(), wanted) < 1e-5


def test_attention_backends_of_diffusers_are_refused() -> None:
    message = r"set_attention_backend\('flash'\) has no effect on a DiT.*sdpa_kernel"
    refuses(message, tiny_elastic().set_attention_backend, "flash")
