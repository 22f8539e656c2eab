"""`elit finetune` of diffusers' transformers, on latents and texts encoded beforehand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from retrofit_models import inputs, make, some
from safetensors.torch import load_file, save_file
from test_finetune import run as run  # a fixture

from elit import load_elastic, load_interface
from elit.data import load_dataset
from elit.training.finetune import TensorConditioning

SIZES = {"sd3": (4, 16, 16), "flux": (4, 16, 16), "qwen": (4, 16, 16), "wan": (4, 4, 16, 16)}


def write_data(name: str, folder: Path, count: int = 40, null: bool = True) -> Path:
    """A file of random latents and texts that the tiny transformer takes."""
    path = folder / ("data.safetensors" if null else "nonull.safetensors")
    given = inputs(name, count)
    tensors = {"latents": torch.randn(count, *SIZES[name])}
    for key in ("encoder_hidden_states", "pooled_projections", "encoder_hidden_states_mask"):
        if key in given:
            tensors[key] = given[key].contiguous()
            if null:
                tensors[f"null.{key}"] = given[key][:1].clone()
    save_file(tensors, path)
    return path


def settings(folder: Path, steps: int = 2, more: str = "") -> list[str]:
    group = "[2,4,4]" if "wan" in folder.name else "[4,4]"
    line = (
        f"--data.name tensors --data.options.path {folder}/data.safetensors --data.batch_size 4 "
        f"--output_dir {folder}/out --train.steps {steps} --train.validate_every {steps} "
        f"--retrofit.tail 1 --retrofit.rank 2 --retrofit.group {group} "
    )
    return (line + more).split()


@pytest.mark.parametrize("name", some(SIZES, ("wan",)))
def test_finetune(name: str, run: Any, tmp_path: Path) -> None:
    """Trains, resumes, leaves the base alone, and its interface fits the base."""
    folder = tmp_path / name
    make(name).save_pretrained(folder / "base")
    write_data(name, folder)
    for steps in (1, 2):
        code, out, err = run("finetune", f"{folder}/base", *settings(folder, steps))
        assert code == 0, err
    assert "load_interface(pipe, " in out
    whole = load_elastic(folder / "out" / "transformer").eval()
    joined = load_interface(make(name), folder / "out" / "interface.safetensors").eval()
    given = inputs(name)
    wanted = make(name)(**given).sample
    torch.testing.assert_close(whole(**given).sample, wanted, rtol=1e-4, atol=1e-5)
    low = whole(**given, num_latents=1).sample
    assert torch.equal(joined(**given, num_latents=1).sample, low)
    assert not torch.allclose(low, wanted)


def test_velocity_is_the_pipelines() -> None:
    """Packing is diffusers' own: Flux's tokens of VAE latents, and back."""
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 16, 8)
    seen = {}

    def model(**given: Any) -> tuple[torch.Tensor]:
        seen.update(given)
        return (given["hidden_states"],)

    model.config = type("Config", (), {"guidance_embeds": True})
    conditioning = TensorConditioning.__new__(TensorConditioning)
    conditioning.model, conditioning.time_scale, conditioning.packing = model, 1.0, "flux"
    conditioning._ids = {}
    text = {"encoder_hidden_states": torch.zeros(2, 5, 12)}
    velocity = conditioning.velocity(model, x, torch.tensor([0.25, 0.5]), text, {})
    assert torch.equal(velocity, x)
    assert torch.equal(seen["hidden_states"], FluxPipeline._pack_latents(x, 2, 4, 16, 8))
    ids = FluxPipeline._prepare_latent_image_ids(2, 8, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(seen["img_ids"], ids)
    assert torch.equal(seen["timestep"], torch.tensor([0.25, 0.5]))


def test_data_that_was_replaced_is_other_data(tmp_path: Path) -> None:
    path = write_data("sd3", tmp_path)
    before, content = load_dataset("tensors", path=path), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    after = load_dataset("tensors", path=path)
    assert before.fingerprint != after.fingerprint


def test_dropped_texts_are_the_empty_one(tmp_path: Path) -> None:
    path = write_data("sd3", tmp_path)
    dataset = load_dataset("tensors", path=path)
    assert (len(dataset), len(load_dataset("tensors", "validation", path=path))) == (38, 2)
    conditioning = TensorConditioning(make("sd3"), torch.device("cpu"), dataset)
    batch = dataset.batch([0, 1, 2])
    told = conditioning(batch, torch.tensor([False, True, False]))
    assert told.keys() == {"encoder_hidden_states", "pooled_projections"}
    for key, value in told.items():
        assert torch.equal(value[1], dataset.null[key][0])
        assert torch.equal(value[::2], batch[key][::2])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--retrofit.group [3,3]", "cannot be cut into groups of 3x3"),
        ("--data.name digits", "diffusers' transformers take data.name=tensors"),
        ("--data.options.path nothing", "is no file; give a safetensors file"),
        ("--text.max_length 3", "text.* have no effect"),
        ("--data.options.path {folder}/nonull.safetensors", "needs the tensors of the empty text"),
        ("--data.options.path {folder}/flux.safetensors --retrofit.group [2,2]", "doesn't fit"),
        ("", "which elit finetune can't train"),
    ],
)
def test_mistakes(more: str, message: str, run: Any, tmp_path: Path) -> None:
    make("sd3" if more else "pixart").save_pretrained(tmp_path / "base")
    write_data("sd3", tmp_path)
    write_data("sd3", tmp_path, null=False)
    tensors = {"latents": torch.randn(4, 3, 16, 16), "encoder_hidden_states": torch.randn(4, 5, 12)}
    save_file(
        tensors | {"null.encoder_hidden_states": torch.randn(1, 5, 12)},
        tmp_path / "flux.safetensors",
    )
    words = settings(tmp_path, 1, more.format(folder=tmp_path))
    if "data.name digits" in more:
        words = [w for w in words if "path" not in w and "data.safetensors" not in w]
    code, _, err = run("finetune", f"{tmp_path}/base", *words)
    assert code == 2
    assert message in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.zeros(40, 4, 16)}, "it needs two or more of floats"),
        ({"latents": torch.zeros(1, 4, 16, 16)}, "it needs two or more of floats"),
        ({"latents": torch.zeros(40, 4, 16, 16, dtype=torch.int32)}, "of torch.int32"),
        ({"latents": torch.tensor(1.0)}, "it needs two or more"),
        ({"pooled_projections": torch.zeros(39, 8)}, "but 40 latents; give one for each"),
        ({"pooled_projections": torch.tensor(1.0)}, "but 40 latents; give one for each"),
        ({"timestep": torch.zeros(40)}, "has timestep, which training makes itself"),
        ({"hidden_states": torch.zeros(40, 1)}, "which training makes itself"),
        ({"null.pooled_projections": torch.zeros(1, 9)}, "belongs to its pooled_projections"),
        ({"null.pooled_projections": torch.zeros(2, 8)}, "belongs to its pooled_projections"),
        ({"null.other": torch.zeros(1, 8)}, "has null.other, but no other"),
    ],
)
def test_tensors_that_do_not_belong_together(
    changes: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    tensors = load_file(write_data("sd3", tmp_path)) | changes
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=message):
        load_dataset("tensors", path=tmp_path / "odd.safetensors")


def test_a_number_that_is_not_finite_is_named_by_its_row(tmp_path: Path) -> None:
    latents = torch.zeros(10, 4, 8, 8)
    latents[7, 0, 0, 0] = torch.nan
    save_file({"latents": latents}, tmp_path / "odd.safetensors")
    dataset = load_dataset("tensors", path=tmp_path / "odd.safetensors")
    dataset.batch([0, 1])
    with pytest.raises(ValueError, match="not finite in row 7: images"):
        dataset.batch(range(9))


def test_texts_in_half_precision_are_cast(tmp_path: Path) -> None:
    tensors = {"latents": torch.zeros(4, 4, 8, 8), "encoder_hidden_states": torch.ones(4, 5, 12)}
    save_file({k: v.bfloat16() for k, v in tensors.items()}, tmp_path / "half.safetensors")
    batch = load_dataset("tensors", path=tmp_path / "half.safetensors").batch([0, 1])
    assert {value.dtype for value in batch.values()} == {torch.float32}
