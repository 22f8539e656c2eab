"""The interface alone in a file, and elastic transformers whole."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import refuses
from retrofit_models import HEAD, TAIL, elastic, inputs, make, randomise
from safetensors import safe_open
from safetensors.torch import save_file
from stock_pipelines import STOCK
from test_retrofit import OWN, Own

import elit
from elit import elasticize, load_elastic, load_interface, save_interface, unelasticize


@pytest.mark.parametrize("name", ["qwen", "flux", "sd3", "wan", "ours"])
@pytest.mark.parametrize("init", ["identity", "learned"])
def test_there_and_back(name: str, init: str, tmp_path: Path) -> None:
    model, given, path = (
        elastic(name, init, std=0.2),
        inputs(name),
        tmp_path / "deep" / "a.safetensors",
    )
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
    model, given, path = elastic("qwen", std=0.2), inputs("qwen"), tmp_path / "a.safetensors"
    wanted = model(**given, num_latents=3).sample
    name, part = next(iter(model.elit.named_children()))
    setattr(model.elit, name, torch.compile(part))
    save_interface(model, path)
    with safe_open(path, "pt") as file:
        assert any("_orig_mod" in key for key in file.keys())  # noqa: SIM118
    other = load_interface(make("qwen"), path)
    assert torch.equal(other(**given, num_latents=3).sample, wanted)


def test_the_fewest_latents_travel_along(tmp_path: Path) -> None:
    for model, other in ((elastic("sd3", std=0.2), make("sd3")), (None, Own())):
        layout = OWN if model is None else None
        model = model or elasticize(Own(), 1, 1, 3, layout=OWN)
        model.set_min_latents(4)
        save_interface(model, tmp_path / "a.safetensors")
        loaded = load_interface(other, tmp_path / "a.safetensors", layout=layout)
        assert loaded.min_latents == loaded.elastic_settings.min_latents == 4


def test_what_is_in_the_file(tmp_path: Path) -> None:
    model, path = elastic("qwen", std=0.2), tmp_path / "a.safetensors"
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
    save_interface(elastic("sd3", std=0.2), tmp_path / "interface.safetensors")
    model = load_interface(make("sd3").bfloat16(), tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.elit.read.mlp[0].weight.device.type == "cpu"
    model = load_interface(make("sd3"), str(tmp_path))
    save_interface(model, tmp_path / "other.safetensors")
    load_interface(make("sd3"), tmp_path, weight_name="other.safetensors")


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


def change_file(path: Path, change: Any) -> None:
    """Change the tensors of an interface's file."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata)


def shorten_and_rename(tensors: dict) -> None:
    tensors["elit.read.latent_index"] = tensors["elit.read.latent_index"][1:]
    tensors["elit.unknown"] = tensors.pop("elit.write.token_place")


PLACE = "elit.read.token_place"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorten_and_rename, r"(?s)does not hold the interface of its settings.*write.token_place"
         r".*unknown.*size mismatch for read.latent_index"),
        (lambda x: x.update({PLACE: x[PLACE] * torch.nan}), "not finite or not floats"),
        (lambda x: x.update({PLACE: x[PLACE].to(torch.int8)}), "not finite or not floats"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_those_of_the_settings(change, message, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_interface(elastic("sd3", std=0.2), path)
    change_file(path, change)
    model = make("sd3")
    kind, names = type(model), list(model.state_dict())
    refuses(message, load_interface, model, path)
    assert (type(model), list(model.state_dict())) == (kind, names)
    assert "elastic" not in model.config


def test_an_interface_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_interface(elastic("sd3"), path)
    save_interface(elastic("qwen"), path)  # replaces the file
    model = make("sd3")
    message = (
        "a.safetensors is the interface of another model: class QwenImageTransformer2DModel there, "
        "but class SD3Transformer2DModel here; give the model that it was made for"
    )
    refuses(message, load_interface, model, path)
    config = dict(make("qwen").config) | {"num_layers": 5, "num_attention_heads": 4}
    other = type(make("qwen")).from_config(config)
    message = "blocks 6, width 32, heads 2 there, but blocks 5, width"
    refuses(message, load_interface, other, path)
    assert type(model).__name__ == "SD3Transformer2DModel"
    assert not hasattr(model, "elit")


def test_files_that_are_no_interface(tmp_path: Path) -> None:
    model = make("sd3")
    (tmp_path / "text.safetensors").write_text("not weights")
    save_file({"a": torch.zeros(1)}, tmp_path / "lora.safetensors")
    for name, message in (
        (tmp_path / "none.safetensors", "there is no file"),
        (tmp_path, "there is no file"),  # a folder without one
        (tmp_path / "text.safetensors", "can't be read"),
        (tmp_path / "lora.safetensors", "is not an interface of an elastic transformer; give a"),
        ("somebody/something", "be fetched from the Hugging Face hub"),
    ):
        refuses(message, load_interface, model, name)
    assert not hasattr(model, "elit")


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", elastic("sd3")
    refuses("is not elastic: it has no interface to save", save_interface, make("sd3"), path)
    save_interface(model, path)
    refuses("has an interface already; unelasticize it first", load_interface, model, path)
    message = r"give a file that ends in \.safetensors"
    refuses(message, save_interface, model, tmp_path / "a.bin")


# ---- whole ----


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


def test_a_pipeline_of_two_transformers_is_refused() -> None:
    pipe = STOCK["wan"].build(make("wan"))
    pipe.transformer_2 = make("wan")
    with pytest.raises(ValueError, match="has two transformers"):
        elasticize(pipe, HEAD, TAIL, (2, 4, 2))
