"""The interface alone in a file, and elastic transformers whole."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from retrofit_models import FOREIGN, inputs, make
from safetensors import safe_open
from safetensors.torch import save_file
from stock_pipelines import STOCK
from test_retrofit import HEAD, OWN, TAIL, Own, elastic, randomise

import elit
from elit import elasticize, load_elastic, load_interface, save_interface, unelasticize


def filled(name: str, init: str = "identity", **options: Any) -> Any:
    model = elasticize(make(name), HEAD, TAIL, FOREIGN[name].group, init, **options)
    randomise(model.elit)
    return model


@pytest.mark.parametrize("name", ["qwen", "flux", "sd3", "wan", "ours"])
@pytest.mark.parametrize("init", ["identity", "learned"])
def test_there_and_back(name: str, init: str, tmp_path: Path) -> None:
    model, given, path = filled(name, init), inputs(name), tmp_path / "deep" / "a.safetensors"
    save_interface(model, path)
    other = make(name)
    assert load_interface(other, path) is other
    assert other.elastic_settings == model.elastic_settings
    for n in (16, 3):
        assert torch.equal(
            other(**given, num_latents=n).sample, model(**given, num_latents=n).sample
        )
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_an_interface_that_was_compiled_in_parts_is_read(tmp_path: Path) -> None:
    model, given, path = filled("qwen"), inputs("qwen"), tmp_path / "a.safetensors"
    wanted = model(**given, num_latents=3).sample
    name, part = next(iter(model.elit.named_children()))
    setattr(model.elit, name, torch.compile(part))
    save_interface(model, path)
    with safe_open(path, "pt") as file:
        assert any("_orig_mod" in key for key in file.keys())  # noqa: SIM118
    other = load_interface(make("qwen"), path)
    assert torch.equal(other(**given, num_latents=3).sample, wanted)


def test_the_fewest_latents_travel_along(tmp_path: Path) -> None:
    for model, other in ((filled("sd3"), make("sd3")), (None, Own())):
        layout = OWN if model is None else None
        model = model or elasticize(Own(), 1, 1, 3, layout=OWN)
        model.set_min_latents(4)
        save_interface(model, tmp_path / "a.safetensors")
        loaded = load_interface(other, tmp_path / "a.safetensors", layout=layout)
        assert loaded.min_latents == loaded.elastic_settings.min_latents == 4


def test_what_is_in_the_file(tmp_path: Path) -> None:
    model, path = filled("qwen", rank=2), tmp_path / "a.safetensors"
    save_interface(model, path)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        about = json.loads(file.metadata()["elit_interface"])
    assert names == {key for key in model.state_dict() if key.startswith("elit.")}
    assert about["settings"] == model.config["elastic"]
    kind = "QwenImageTransformer2DModel"
    assert about["base"].items() >= {"class": kind, "blocks": 6, "width": 32, "heads": 2}.items()
    other = load_interface(make("qwen"), path)
    given = inputs("qwen")
    assert torch.equal(other(**given, num_latents=3).sample, model(**given, num_latents=3).sample)


def test_from_a_folder_in_another_number_format(tmp_path: Path) -> None:
    save_interface(filled("sd3"), tmp_path / "interface.safetensors")
    model = load_interface(make("sd3").bfloat16(), tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.elit.read.mlp[0].weight.device.type == "cpu"
    model = load_interface(make("sd3"), str(tmp_path))
    save_interface(model, tmp_path / "other.safetensors")
    load_interface(make("sd3"), tmp_path, weight_name="other.safetensors")


def test_saving_replaces_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_interface(filled("sd3"), path)
    save_interface(filled("qwen"), path)
    load_interface(make("qwen"), path)


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = elasticize(Own(), 1, 1, 3, layout=OWN), torch.randn(2, 36, 8)
    randomise(model.elit)
    save_interface(model, tmp_path / "own.safetensors")
    wanted = model(x, num_latents=2)
    unelasticize(model)
    with pytest.raises(ValueError, match="layout=Layout"):
        load_interface(model, tmp_path / "own.safetensors")
    load_interface(model, tmp_path / "own.safetensors", layout=OWN)
    assert torch.equal(model(x, num_latents=2), wanted)


# ---- mistakes ----


def test_an_interface_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_interface(filled("qwen"), path)
    model = make("sd3")
    message = (
        "a.safetensors is the interface of another model: class QwenImageTransformer2DModel there, "
        "but class SD3Transformer2DModel here; give the model that it was made for"
    )
    with pytest.raises(ValueError, match=message):
        load_interface(model, path)
    kind = type(make("qwen"))
    config = dict(make("qwen").config) | {"num_layers": 5, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="blocks 6, width 32, heads 2 there, but blocks 5, width"):
        load_interface(kind.from_config(config), path)
    assert type(model).__name__ == "SD3Transformer2DModel"
    assert not hasattr(model, "elit")


def test_tensors_that_are_not_those_of_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_interface(filled("sd3"), path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["elit.read.latent_index"] = tensors["elit.read.latent_index"][1:]
    tensors["elit.unknown"] = tensors.pop("elit.write.token_place")
    save_file(tensors, path, metadata)
    model = make("sd3")
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=r"3 tensors are missing, unknown or of other shapes"):
        load_interface(model, path)
    assert list(model.state_dict()) == names
    assert "elastic" not in model.config


def test_files_that_are_no_interface(tmp_path: Path) -> None:
    model = make("sd3")
    with pytest.raises(ValueError, match="there is no file"):
        load_interface(model, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="there is no file"):
        load_interface(model, tmp_path)  # a folder without one
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(ValueError, match="can't be read"):
        load_interface(model, tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is not an interface of an elastic transformer; give a"):
        load_interface(model, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="be fetched from the Hugging Face hub"):
        load_interface(model, "somebody/something")
    assert not hasattr(model, "elit")


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="is not elastic: it has no interface to save"):
        save_interface(make("sd3"), path)
    save_interface(elastic("sd3"), path)
    with pytest.raises(ValueError, match="has an interface already; unelasticize it first"):
        load_interface(elastic("sd3"), path)
    with pytest.raises(ValueError, match=r"give a file that ends in \.safetensors"):
        save_interface(elastic("sd3"), tmp_path / "a.bin")


# ---- whole ----


@pytest.mark.parametrize("name", ["qwen", "wan", "ours"])
def test_load_elastic(name: str, tmp_path: Path) -> None:
    model, given = filled(name), inputs(name)
    model.save_pretrained(tmp_path / "transformer")
    for loaded in (
        load_elastic(tmp_path / "transformer"),
        load_elastic(str(tmp_path), subfolder="transformer"),
    ):
        assert type(loaded) is type(model)
        output = loaded.eval()(**given, num_latents=3).sample
        torch.testing.assert_close(output, model(**given, num_latents=3).sample)
    half = load_elastic(tmp_path, subfolder="transformer", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_load_elastic_of_something_else(tmp_path: Path) -> None:
    make("sd3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is SD3Transformer2DModel, not an elastic transformer"):
        load_elastic(tmp_path)
    with pytest.raises(ValueError, match="holds no transformer"):
        load_elastic(tmp_path / "none")
    elit.DiT(sample_size=8, in_channels=3, patch_size=2, hidden_size=32, num_heads=2, depth=3,
             num_classes=5, group=2, head=1, tail=1).save_pretrained(tmp_path / "dit")  # fmt: skip
    with pytest.raises(ValueError, match="is DiT, not an elastic transformer"):
        load_elastic(tmp_path / "dit")


def test_a_pipeline_knows_what_its_transformer_became(tmp_path: Path) -> None:
    """A stock pipeline writes the class of each part when it is made: it has to be told."""
    pipe = STOCK["dit"].build(make("dit"))
    assert elasticize(pipe, HEAD, TAIL, 4) is pipe
    save_interface(pipe.transformer, tmp_path / "interface.safetensors")
    pipe.save_pretrained(tmp_path / "elastic")
    loaded = type(pipe).from_pretrained(tmp_path / "elastic")
    assert type(loaded.transformer) is type(pipe.transformer)
    unelasticize(pipe).save_pretrained(tmp_path / "plain")
    plain = type(pipe).from_pretrained(tmp_path / "plain")
    assert type(plain.transformer) is type(make("dit"))
    load_interface(plain, tmp_path / "interface.safetensors").save_pretrained(tmp_path / "again")
    again = type(pipe).from_pretrained(tmp_path / "again")
    assert type(again.transformer) is type(loaded.transformer)
    with pytest.raises(ValueError, match="has no transformer"):
        elasticize(diffusers.DDPMPipeline(None, diffusers.DDPMScheduler()), 1, 1, 4)


@pytest.mark.parametrize("broken", ["nan", "int"])
def test_numbers_that_are_none(broken: str, tmp_path: Path) -> None:
    model, path = filled("sd3"), tmp_path / "a.safetensors"
    save_interface(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    key = "elit.read.token_place"
    tensors[key] = tensors[key] * torch.nan if broken == "nan" else tensors[key].to(torch.int8)
    save_file(tensors, path, metadata)
    other = make("sd3")
    with pytest.raises(ValueError, match="not finite or not floats"):
        load_interface(other, path)
    assert type(other) is type(make("sd3"))


def test_a_pipeline_of_two_transformers_is_refused() -> None:
    pipe = STOCK["wan"].build(make("wan"))
    pipe.transformer_2 = make("wan")
    with pytest.raises(ValueError, match="has two transformers"):
        elasticize(pipe, HEAD, TAIL, (2, 4, 2))
