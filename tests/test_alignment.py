"""Representation alignment: what is compared where, and that it is of training alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ELASTIC, make_inputs, randomise
from prepare_sources import class_folder, shard
from prepare_sources import run as prepare
from runs import CPU, assert_same_run, files_of, metrics, run_ranks, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from elit import ElitPipeline, create_model
from elit.data import load_dataset
from elit.networks.feature_maps import load_feature_maps
from elit.preparation.records import verify
from elit.training.alignment import Alignment, aligned_depth, check_alignment
from elit.training.config import AlignmentConfig, TrainConfig
from elit.training.loop import train
from elit.training.run import Run

ON = {"alignment_weight": 0.5, "alignment_encoder": "classifier"}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 whose processor cuts 28x28 pixels, four patches of 7 across."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = Dinov2Config(**sizes, image_size=14, patch_size=7)
    Dinov2Model(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    colours = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    BitImageProcessor(**size, **colours).save_pretrained(folder)
    return folder


def exported(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def alignment_of(model: Any, **options: Any) -> Alignment:
    """An alignment with the digits' classifier, on a model of one's own."""
    config = tiny_config(Path("unused"))
    options = {"weight": 1.0, "encoder": "classifier"} | options
    config.alignment = AlignmentConfig(**options)
    return Alignment(model, load_dataset("digits"), config, CPU)


# ---- off ----


def test_off_nothing_of_it_is_there(tmp_path: Path) -> None:
    """And on, the run draws the same numbers, starts as it and is saved with the same names."""
    first = {}
    for name, changes in (("off", {}), ("on", ON | {"alignment_weight": 1e-9})):
        train(tiny_config(tmp_path / name, 2, **changes), progress=False)
        first[name] = metrics(tmp_path / name)[0]
    assert first["on"]["loss"] == pytest.approx(first["off"]["loss"], abs=1e-6)
    assert [name for name in first if "alignment" in first[name]] == ["on"]
    assert not files_of(tmp_path / "off", 2)["projector"]
    assert "alignment" not in json.dumps(sorted(files_of(tmp_path / "off", 2)["optimizer"]))
    for file in ("model_index.json", "transformer/config.json"):
        assert (tmp_path / "on" / file).read_text() == (tmp_path / "off" / file).read_text()
    off, on = (exported(tmp_path / name) for name in ("off", "on"))
    assert off.keys() == on.keys()
    for name, tensor in off.items():
        torch.testing.assert_close(on[name], tensor, rtol=0, atol=1e-5)
    ElitPipeline.from_pretrained(tmp_path / "on")


# ---- places ----


@pytest.mark.parametrize("kind", ["repa", "irepa"])
@pytest.mark.parametrize("where", ["tokens", "latents"])
@pytest.mark.parametrize("name", ["dit", "sit", "uvit", "hdit", "mmdit"])
def test_the_loss_is_what_it_says(name: str, where: str, kind: str) -> None:
    """By loops over the cells, of hidden states that were taken from the block's own call."""
    model = ELASTIC[name]().train()
    if name == "hdit" and where == "tokens":
        with pytest.raises(ValueError, match=r"only sees neighbours.*use alignment.where=latents"):
            aligned_depth(model, AlignmentConfig(where=where))
        return
    alignment = alignment_of(model, where=where, kind=kind)
    block = model.blocks[aligned_depth(model, alignment.options) - 1]
    seen: list[Any] = []
    block.register_forward_hook(lambda _, __, output: seen.append(output))
    x, sigma, *told = make_inputs(model)
    names = ("class_labels", "encoder_hidden_states")
    model(x, sigma, **dict(zip(names, told, strict=False)), num_latents=3)
    grid, features = model.token_grid(x), torch.randn(2, 48, 3, 3)
    loss = alignment.loss(x, features)

    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    size, group = np.array(grid.size), np.array(grid.group)
    if where == "tokens":  # from the order of groups to rows and columns
        places = grid.token_places().long()
        maps = torch.empty(2, 1, *grid.size, hidden.shape[2])
        maps[:, 0, places[:, 0], places[:, 1]] = hidden
    else:
        size = size // group
        maps = hidden.unflatten(1, (*size, 3)).permute(0, 3, 1, 2, 4)  # (B, n, *groups, D)
    layers = alignment.parallel.model.layers
    wanted = []
    for pictures, target in zip(maps, features, strict=True):
        target = F.interpolate(target[None], tuple(size), mode="bilinear", antialias=True)[0]
        if kind == "irepa":
            flat = target.flatten(1)
            target = (target - flat.mean(1)[:, None, None]) / flat.std(1)[:, None, None]
            given = layers(pictures.movedim(-1, 1)).movedim(1, -1)
        else:
            given = layers(pictures)
        cosines = [
            F.cosine_similarity(given[:, i, j].mean(0), target[:, i, j], dim=0)
            for i in range(size[0])
            for j in range(size[1])
        ]
        wanted.append(1 - sum(cosines) / len(cosines))
    torch.testing.assert_close(loss, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    loss.mean().backward()
    assert getattr(block, "image", block).mlp[0].weight.grad.any()


@pytest.mark.parametrize(
    ("preset", "changes", "where", "depth", "place"),
    [
        ("elit-dit-xl/2", {}, "tokens", None, 4),
        ("elit-dit-xl/2", {}, "tokens", 2, 2),
        ("elit-dit-xl/2", {}, "latents", None, 8),
        ("dit-xl/2", {}, "tokens", None, 8),
        ("elit-dit-tiny/2", {"depth": 6, "head": 1, "tail": 1}, "latents", None, 2),
        ("hdit-tiny/2", {}, "tokens", None, 2),
        ("dit-xl/2", {}, "latents", None, "has no place in the plain model DiT; use tokens"),
        ("elit-dit-xl/2", {}, "tokens", 9, r"depth=9 is no place of tokens .* block 1 to 4"),
        ("elit-dit-xl/2", {}, "latents", 1, r"depth=1 is no place of latents .* block 5 to 24"),
        ("elit-dit-tiny/2", {"head": 0}, "tokens", None, "this DiT has no head; use .*=latents"),
    ],
)
def test_places(preset: str, changes: dict, where: Any, depth: Any, place: Any) -> None:
    with torch.device("meta"):
        model = create_model(preset, **changes)
    options = AlignmentConfig(where=where, depth=depth)
    if isinstance(place, int):
        assert aligned_depth(model, options) == place
        return
    with pytest.raises(ValueError, match=place):
        aligned_depth(model, options)


def test_latents_of_a_group_may_differ() -> None:
    """Only the mean of what they are projected to is compared, at any number of them."""
    model = ELASTIC["dit"]()
    alignment = alignment_of(model, where="latents")
    alignment.parallel.module = lambda hidden, _: hidden
    x, features = torch.zeros(1, 2, 8, 8), torch.randn(1, 32, 2, 2)
    cells = features.flatten(2).transpose(1, 2)  # (1, groups, D)
    apart = torch.randn(1, 4, 5, 32)
    apart = apart - apart.mean(2, keepdim=True) + cells[:, :, None]
    alignment._hidden = apart.flatten(1, 2)
    assert float(alignment.loss(x, features)) == pytest.approx(0, abs=1e-5)
    alignment._hidden = -cells
    assert float(alignment.loss(x, features)) == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("preset", ["elit-dit-tiny/2", "dit-tiny/2"])
@pytest.mark.parametrize("how", ["compile", "checkpointing", "both"])
def test_compiled_and_checkpointed_blocks_are_seen(preset: str, how: str) -> None:
    found = {}
    for changed in (False, True):
        model = randomise(create_model(preset, hidden_size=32, num_heads=2)).train()
        alignment = alignment_of(model)
        if changed and how in ("compile", "both"):
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        if changed and how in ("checkpointing", "both"):
            model.enable_gradient_checkpointing()
        x, sigma, labels = make_inputs(model)
        velocity = model(x, sigma, labels).sample
        loss = alignment.loss(x, torch.ones(2, 48, 4, 4))
        (velocity.square().mean() + alignment.weighted(loss)).backward()
        assert float(alignment.of_step()) == pytest.approx(loss.mean().item())
        found[changed] = [loss, *(p.grad for p in model.parameters())]
    for given, wanted in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)


# ---- runs ----


def aligned_config(folder: Path, steps: int = 4, **changes: Any) -> TrainConfig:
    return tiny_config(folder, steps, **{"data_batch_size": 8} | ON | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("aligned") / "whole"
    train(aligned_config(folder, train_validate_every=4), progress=False)
    return folder


def test_resume_is_bit_equal(whole: Path, tmp_path: Path) -> None:
    for steps in (2, 4):
        train(aligned_config(tmp_path / "parts", steps, train_validate_every=4), progress=False)
    assert_same_run(whole, tmp_path / "parts", 4)
    projector = files_of(whole, 4)["projector"]
    assert projector.keys() == {f"layers.{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias")}
    assert {"projector.layers.0.weight/exp_avg"} <= files_of(whole, 4)["optimizer"].keys()
    before = Run(aligned_config(tmp_path / "new"), CPU).alignment.parallel.model.state_dict()
    assert all((projector[name] != tensor).any() for name, tensor in before.items())
    with pytest.raises(ValueError, match=r"holds another run .*alignment: "):
        train(aligned_config(tmp_path / "parts", 6, alignment_kind="irepa"), progress=False)


def assert_close_runs(one: Path, other: Path) -> None:
    for line, same in zip(metrics(one), metrics(other), strict=True):
        for key in {"loss", "alignment", "grad_norm"} & line.keys():
            assert same[key] == pytest.approx(line[key], rel=2e-5), key
        for key in line:
            if key.startswith("validation/loss"):
                assert same[key] == pytest.approx(line[key], rel=1e-4)
    for name, tensor in exported(one).items():
        torch.testing.assert_close(exported(other)[name], tensor, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_processes_and_micro_batches_are_the_same_run(
    whole: Path, tmp_path: Path, parallel: str
) -> None:
    changes = {"train_parallel": parallel, "train_accumulation": 2, "train_validate_every": 4}
    run_ranks(aligned_config(tmp_path / "run", **changes), 2)
    assert_close_runs(whole, tmp_path / "run")
    if parallel == "fsdp":  # one process goes on with its shards
        folder = tmp_path / "run"
        shutil.rmtree(folder / "checkpoints/step-00000004")
        train(aligned_config(folder, train_validate_every=4), progress=False)
        assert_close_runs(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"train_compile": True},
        {"train_compile": True, "model_preset": "dit-tiny/2"},
        {"latents_draws": 2, "alignment_where": "latents", "alignment_kind": "irepa"},
        {"train_gradient_checkpointing": True, "train_precision": "bf16"},
    ],
)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_in_any_combination(tmp_path: Path, changes: dict, parallel: str) -> None:
    run_ranks(aligned_config(tmp_path / "two", train_parallel=parallel, **changes), 2)
    train(aligned_config(tmp_path / "one", train_accumulation=2, **changes), progress=False)
    if "train_precision" not in changes:
        assert_close_runs(tmp_path / "one", tmp_path / "two")


def test_it_pulls_the_hidden_states(tmp_path: Path) -> None:
    train(aligned_config(tmp_path / "run", 30, train_checkpoint_every=0), progress=False)
    values = [line["alignment"] for line in metrics(tmp_path / "run")]
    assert values[-1] < 0.7 * values[0]


# ---- features made beforehand ----


def test_a_vision_model_of_transformers(dinov2: Path) -> None:
    """Patches in their places, of pictures as its own processor prepares them."""
    from transformers import AutoImageProcessor, Dinov2Model

    maps = load_feature_maps(str(dinov2), torch.device("cpu"))
    assert (maps.about.class_name, maps.about.shape) == ("Dinov2Model", (24, 4, 4))
    pictures = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    model, processor = Dinov2Model.from_pretrained(dinov2).eval(), AutoImageProcessor
    prepared = processor.from_pretrained(dinov2)(
        list(pictures), do_resize=False, input_data_format="channels_first", return_tensors="pt"
    )
    with torch.no_grad():
        wanted = model(**prepared).last_hidden_state[:, 1:]
    found = maps(pictures / 127.5 - 1)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), wanted, rtol=1e-4, atol=1e-4)
    assert maps(torch.zeros(1, 1, 9, 13)).shape == (1, 24, 4, 4)  # grey, of another size


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"patch_size": [7, 7]}, r"its patch_size is \[7, 7\], but only whole"),
        ("preprocessor_config.json", {"image_mean": None}, "image_mean is None, not 3 numbers"),
        ("preprocessor_config.json", {"image_std": [0.5]}, "image_std is .*0.5.*, not 3 numbers"),
    ],
)
def test_a_vision_model_that_is_not_understood(
    dinov2: Path, tmp_path: Path, file: str, changes: dict, message: str
) -> None:
    folder = shutil.copytree(dinov2, tmp_path / "model")
    settings = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"vision model cannot be loaded from .*{message}"):
        load_feature_maps(str(folder), torch.device("cpu"))


def test_a_processor_that_does_not_normalise(dinov2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dinov2, tmp_path / "model")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_normalize": False}))
    module: Any = load_feature_maps(str(folder), torch.device("cpu")).module
    assert (module.mean == 0).all()
    assert (module.std == 1).all()


@pytest.mark.parametrize("store", ["fp16", "bf16"])
def test_features_in_the_shards(dinov2: Path, tmp_path: Path, store: str) -> None:
    """Of mirrored pictures too; the manifest says whose; training reads those of each sample."""
    source, out = class_folder(tmp_path / "source", 8), tmp_path / "out"
    settings = {"features": str(dinov2), "flips": True, "batch_size": 3, "store_dtype": store}
    prepare(source, out, **settings)
    assert verify(out) == {}
    about = json.loads((out / "manifest.json").read_text())["features"]
    assert (about["name"], about["shape"]) == (str(dinov2), [24, 4, 4])
    tensors, maps = shard(out), load_feature_maps(str(dinov2), torch.device("cpu"))
    for end in ("", "_flipped"):
        stored = tensors[f"features{end}"]
        assert stored.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[store]
        wanted = maps(tensors[f"images{end}"].float() / 127.5 - 1)
        torch.testing.assert_close(stored.float(), wanted, rtol=2e-2, atol=2e-2)
    assert not torch.allclose(tensors["features"], tensors["features_flipped"], atol=0.1)

    dataset = load_dataset("prepared", "train", path=str(out))
    assert "features" not in dataset.batch([0])
    dataset.with_features = True
    half = len(dataset) // 2
    for index in (1, 1 + half):
        batch = dataset.batch([index])
        wanted = maps(dataset.on_device(batch["images"]))
        torch.testing.assert_close(batch["features"].float(), wanted, rtol=2e-2, atol=2e-2)
    config = tiny_config(
        tmp_path / "run", 4, data_name="prepared", data_options={"path": str(out)},
        alignment_weight=0.5, alignment_encoder="prepared",
    )  # fmt: skip
    train(config, progress=False)
    assert 0 < metrics(tmp_path / "run")[-1]["alignment"] < 2
    prepare(source, out, **settings)  # nothing is left to do, and nothing differs
    other = shutil.copytree(dinov2, tmp_path / "other")
    change_weights(other)
    with pytest.raises(ValueError, match=r"was begun with features.sha256="):
        prepare(source, out, **settings | {"features": str(other)})


def test_an_encoder_looks_at_pixels_as_they_come(dinov2: Path, tmp_path: Path) -> None:
    """A run doesn't go on with another one of that name."""
    encoder = shutil.copytree(dinov2, tmp_path / "encoder")
    train(aligned_config(tmp_path / "run", 2, alignment_encoder=str(encoder)), progress=False)
    assert "alignment" in metrics(tmp_path / "run")[-1]
    change_weights(encoder)
    with pytest.raises(ValueError, match=r"features of another model: .*have changed since"):
        train(aligned_config(tmp_path / "run", 4, alignment_encoder=str(encoder)), progress=False)


def change_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["layernorm.bias"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_data_without_features_have_the_fingerprint_that_they_had(tmp_path: Path) -> None:
    from prepared_data import write_prepared

    write_prepared(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    before = load_dataset("prepared", path=str(tmp_path)).fingerprint
    assert manifest.pop("features") is None
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))  # of an elit that knew none
    assert load_dataset("prepared", path=str(tmp_path)).fingerprint == before


# ---- mistakes ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment_encoder": "classifier"}, "no effect without alignment.weight; give it"),
        (ON | {"alignment_encoder": "prepared"}, "run `elit prepare` with --features"),
        (ON | {"data_name": "moving-shapes", "model_preset": "elit-video-dit-tiny/2"},
         "compares models of ours with features of pictures"),
        (ON | {"alignment_encoder": "no/such folder"}, "vision model cannot be loaded from"),
        (ON | {"retrofit_base": "x", "model_preset": "elit-dit-tiny/2", "model_overrides": {}},
         "no effect on a retrofit"),
        (ON | {"alignment_kind": "irepa", "alignment_where": "latents",
               "model_overrides": {"group": 8}}, "irepa .* has one place on a grid of"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(tiny_config(tmp_path, **changes), CPU)


def test_latents_of_an_autoencoder_are_no_pictures(tmp_path: Path) -> None:
    from prepared_data import write_prepared

    write_prepared(tmp_path / "latents")
    dataset = load_dataset("prepared", path=str(tmp_path / "latents"))
    model = create_model("elit-dit-tiny/2")
    with pytest.raises(
        ValueError, match="data are VAE latents; run `elit prepare` with --features"
    ):
        check_alignment(model, dataset, AlignmentConfig(weight=0.5))
    write_prepared(tmp_path / "pixels", kind="images", classes=())
    dataset = load_dataset("prepared", path=str(tmp_path / "pixels"))
    with pytest.raises(ValueError, match=r"is fitted on two classes.* name a vision model"):
        check_alignment(model, dataset, AlignmentConfig(weight=0.5, encoder="classifier"))


def test_the_classifier_is_not_made_beforehand(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set alignment.encoder=classifier in training, or name"):
        prepare(class_folder(tmp_path / "source", 2), tmp_path / "out", features="classifier")


def test_clips_have_no_features(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="features are of pictures, not of clips"):
        prepare(tmp_path, tmp_path / "out", features="x", frames=4)
