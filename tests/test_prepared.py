"""Training on prepared folders: what is read, in which order, what is refused, what comes out."""

import dataclasses
import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refuses
from prepared_data import write_prepared
from retrofit_models import make
from runs import assert_same_run, tiny_config
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from elit import load_elastic, load_pipeline
from elit.cli.main import main
from elit.data import Prepared, WholeBatches, load_dataset
from elit.data.manifest import Autoencoder
from elit.data.order import Bucket, StepBatches
from elit.preparation.autoencoder import weights_sha256
from elit.training.config import RetrofitConfig, TextConfig, TrainConfig
from elit.training.finetune import fetch_base, load_base
from elit.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ASPECTS = ((32, 32), (24, 40), (40, 24))
TEXTS = {"encoder_hidden_states": (5, 12), "pooled_projections": (8,)}


def rows_of(batch: dict[str, Any]) -> list[int]:
    """Which samples these are: the helper wrote it into their first number."""
    return batch["images"].flatten(1)[:, 0].int().tolist()


def every(dataset: Prepared) -> list[int]:
    return [row for bucket in dataset.buckets for row in rows_of(dataset.batch(bucket.indices()))]


# ---- what is read ----


@pytest.mark.parametrize("kind", ["moments", "latents", "images"])
def test_a_batch_is_what_was_written(kind: str, tmp_path: Path) -> None:
    write_prepared(tmp_path, kind=kind, validation=7)
    dataset = load_dataset("prepared", path=tmp_path)
    stored = [load_file(file) for file in sorted(tmp_path.glob("train*.safetensors"))]
    wanted = torch.cat([tensors[kind] for tensors in stored])
    indices = torch.randperm(80)[:50].tolist()
    batch = dataset.batch(indices)
    assert torch.equal(batch["images"], wanted[indices])
    labels = torch.cat([tensors["class_labels"] for tensors in stored])
    assert torch.equal(batch["class_labels"], labels[indices])
    assert torch.equal(dataset.labels[indices], batch["class_labels"])
    assert (len(dataset), dataset.num_classes, dataset.has_captions) == (80, 3, False)
    side = 32 if kind == "images" else 8
    assert dataset.image_shape == dataset.seen_shape(batch["images"]) == (4, side, side)
    assert len(load_dataset("prepared", "validation", path=tmp_path)) == 7
    seen = dataset.on_device(batch["images"])
    if kind == "images":
        torch.testing.assert_close(seen * 127.5 + 127.5, wanted[indices].float())
    else:
        torch.testing.assert_close(seen, (wanted[indices, :4].float() - 0.25) * 0.5)


def test_a_draw_is_the_posteriors(tmp_path: Path) -> None:
    write_prepared(tmp_path, (4, 4))
    dataset = load_dataset("prepared", path=tmp_path)
    moments = torch.zeros(20_000, 8, 1, 1)
    moments[:, :4] = 3.0
    moments[:, 4], moments[:, 5], moments[:, 6], moments[:, 7] = 0.0, 1.0, -100.0, 100.0
    noise = torch.randn(20_000, 4, 1, 1, generator=torch.Generator().manual_seed(1))
    draw = dataset.on_device(moments.half(), noise)[..., 0, 0]
    wanted = torch.tensor([1, np.e**0.5, np.e**-15, np.e**10]) * 0.5
    torch.testing.assert_close(draw.std(0), wanted.float(), rtol=0.02, atol=0)
    torch.testing.assert_close(
        draw[:, :3].mean(0), torch.full((3,), (3 - 0.25) * 0.5), rtol=0.02, atol=0
    )
    assert torch.equal(draw, dataset.on_device(moments.half(), noise)[..., 0, 0])


def test_mirrored_samples_come_behind_the_others(tmp_path: Path) -> None:
    write_prepared(tmp_path, flips=True)
    dataset = load_dataset("prepared", path=tmp_path)
    n = len(dataset) // 2
    indices = [0, 5, n - 1]
    plain, both = dataset.batch(indices), dataset.batch([i + n for i in indices] + indices)
    assert torch.equal(both["images"][:3], plain["images"].flip(-1))
    assert torch.equal(both["images"][3:], plain["images"])
    assert torch.equal(both["class_labels"][:3], plain["class_labels"])
    (bucket,) = dataset.buckets
    assert sorted(bucket.indices().tolist()) == list(range(2 * n))
    assert len(load_dataset("prepared", "validation", path=tmp_path)) == 80 - n  # not mirrored


@pytest.mark.parametrize("sizes", [ASPECTS[:1], ASPECTS])
@pytest.mark.parametrize("parts", [(30, 30, 20), (3,) * 30, (1, 1)])
def test_held_out_samples_are_in_no_other_split(parts: Any, sizes: Any, tmp_path: Path) -> None:
    write_prepared(tmp_path, parts, sizes=sizes)
    train_set, held = (
        load_dataset("prepared", split, path=tmp_path) for split in ("train", "validation")
    )
    total = sum(parts) * len(sizes)
    assert sorted(every(train_set) + every(held)) == list(range(total))
    assert len(held) == max(1, total // 20) == len(set(every(held)))
    if len(parts) < 30:
        return
    gone = next(tmp_path.glob("train-00001*"))
    gone.unlink()  # what is held out of the others stays the same
    fewer = load_dataset("prepared", "validation", path=tmp_path, damaged="skip")
    assert set(every(fewer)) <= set(every(held))


def test_one_of_several_resolutions_is_chosen(tmp_path: Path) -> None:
    write_prepared(tmp_path, sizes=((32, 32), (36, 36), (28, 44)))
    assert load_dataset("prepared", path=tmp_path, resolution=32).sizes == ["32x32"]
    assert load_dataset("prepared", path=tmp_path, resolution=36).sizes == ["36x36", "28x44"]
    for resolution in (None, 34):
        with pytest.raises(ValueError, match="sizes 32x32, 36x36, 28x44: give one of 32, 36"):
            load_dataset("prepared", path=tmp_path, resolution=resolution)


def test_texts_and_captions_are_read_where_they_are_wanted(tmp_path: Path) -> None:
    write_prepared(tmp_path, captions=True, texts=TEXTS)
    dataset = load_dataset("prepared", path=tmp_path)
    batch = dataset.batch([0, 40, 3])
    assert batch["captions"] == [f"číslo {row}" for row in rows_of(batch)]
    assert set(dataset.encodings) == set(dataset.null) == set(TEXTS)
    second = load_file(tmp_path / "train-00001-32x32.safetensors")
    row = rows_of(batch)[1] - 30
    assert torch.equal(batch["pooled_projections"][1], second["pooled_projections"][row])
    dataset.left_out = frozenset(("captions", *TEXTS))
    assert dataset.batch([0]).keys() == {"images", "class_labels"}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same(method: str, tmp_path: Path) -> None:
    write_prepared(tmp_path, flips=True, captions=True)
    dataset = load_dataset("prepared", path=tmp_path)
    dataset.batch([0])  # open here too
    batches = StepBatches(len(dataset), 16, range(1), 1, range(3), 0, dataset.buckets)
    loader = DataLoader(
        WholeBatches(dataset), sampler=batches, batch_size=None, num_workers=1,
        multiprocessing_context=method,
    )  # fmt: skip
    for wanted, batch in zip(batches, loader, strict=True):
        assert batch["captions"] == dataset.batch(wanted)["captions"]
        assert torch.equal(batch["images"], dataset.batch(wanted)["images"])
    assert len(pickle.dumps(dataset)) < 20_000


# ---- the order ----


def bucket(count: int, runs: int, first: int = 0, **more: Any) -> Bucket:
    starts = first + count // runs * np.arange(runs)
    return Bucket((1,), np.stack([starts, np.full(runs, count // runs)], axis=1), **more)


def test_a_small_set_is_shuffled_as_data_in_memory_is() -> None:
    given = 50, 8, range(1), 1, range(20), 3
    assert list(StepBatches(*given)) == list(StepBatches(*given, [bucket(50, 5)]))


def test_a_window_reads_few_runs_and_an_epoch_reads_each_sample_once() -> None:
    one = bucket(1200, 60, window=200)  # runs of 20: windows of ten
    batches = list(StepBatches(1200, 50, range(1), 1, range(48), 3, [one]))
    epochs = [[i for batch in batches[at : at + 24] for i in batch] for at in (0, 24)]
    assert all(sorted(epoch) == list(range(1200)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    for at in range(0, 48, 4):  # 200 samples
        window = [i for batch in batches[at : at + 4] for i in batch]
        assert len({i // 20 for i in window}) == 10
        assert window != sorted(window)
    mirrored = bucket(40, 4, window=40, offsets=(0, 40))
    epoch = [
        i for batch in StepBatches(80, 8, range(1), 1, range(10), 3, [mirrored]) for i in batch
    ]
    assert sorted(epoch) == list(range(80))


def test_buckets_take_turns_by_their_share() -> None:
    """Each step is of one bucket, and each bucket has epochs of its own."""
    buckets = [bucket(300, 3), bucket(100, 5, first=300, window=20), bucket(8, 1, first=400)]
    batches = list(StepBatches(408, 4, range(1), 1, range(5000), 3, buckets))
    which = [0 if b[0] < 300 else 1 if b[0] < 400 else 2 for b in batches]
    for batch, number in zip(batches, which, strict=True):
        one = buckets[number]
        first, last = one.runs[0, 0], one.runs[-1].sum()
        assert all(first <= i < last for i in batch)
    shares = np.array([Counter(which)[n] for n in range(3)]) / 5000
    assert np.allclose(shares, np.array([300, 100, 8]) / 408, atol=0.02)
    for number, one in enumerate(buckets):
        stream = [i for b, n in zip(batches, which, strict=True) if n == number for i in b]
        for at in range(0, len(stream) - len(one), len(one)):
            assert len(set(stream[at : at + len(one)])) == len(one)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_step_and_a_resume_goes_on(processes: int) -> None:
    buckets = [bucket(300, 30, window=100), bucket(100, 5, first=300)]
    given = {"seed": 3, "buckets": buckets}
    whole = list(StepBatches(400, 8, range(1), 1, range(60), **given))
    parts = [
        list(StepBatches(400, 8, range(rank, rank + 1), processes, range(60), **given))
        for rank in range(processes)
    ]
    assert [[i for part in step for i in part] for step in zip(*parts, strict=True)] == whole
    for start in (1, 17, 59):
        assert list(StepBatches(400, 8, range(1), 1, range(start, 60), **given)) == whole[start:]
    late = range(5000, 5010)  # beyond the buckets that are drawn at once
    later = list(StepBatches(400, 8, range(1), 1, range(5005, 5010), **given))
    assert list(StepBatches(400, 8, range(1), 1, late, **given))[5:] == later


# ---- faults ----


def damage(path: Path, how: str) -> str:
    """Damage a shard; part of the message that names it."""
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return "it is missing"
    if how == "truncated":
        path.write_bytes(content[:-9])
        return f"it has {len(content) - 9} bytes instead of {len(content)}"
    if how == "header":
        content[8:12] = b"\xff\xff\xff\xff"
    else:
        content[-1] ^= 1
    path.write_bytes(content)
    return "its header is broken" if how == "header" else "its checksum is wrong"


@pytest.mark.parametrize("how", ["missing", "truncated", "header", "checksum"])
def test_a_damaged_shard_is_named_or_left_out(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_prepared(tmp_path)
    message = damage(tmp_path / "train-00001-32x32.safetensors", how)
    options = {"path": tmp_path, "verify": how == "checksum"}
    refuses(f"train-00001-32x32.*{message}.*damaged=skip", load_dataset, "prepared", **options)
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset("prepared", **options, damaged="skip")
    assert "left out with its 30 samples" in caplog.text
    assert not {*every(dataset)} & {*range(30, 60)}


def test_numbers_that_are_not_finite(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_prepared(tmp_path, (10, 10), validation=2)
    path = tmp_path / "train-00001-32x32.safetensors"
    tensors = load_file(path)
    tensors["moments"][4, 2, 0, 0], tensors["moments"][5, 2, 0, 0] = torch.nan, -torch.inf
    save_file({name: x.clone() for name, x in tensors.items()}, path)
    dataset = load_dataset("prepared", path=tmp_path)
    dataset.batch(range(14))
    refuses(r"train-00001.*not finite in row 4; .*--dtype fp32", dataset.batch, range(20))
    skipping = load_dataset("prepared", path=tmp_path, damaged="skip")
    for _ in range(2):
        assert rows_of(skipping.batch([13, 14, 15, 16])) == [13, 16, 16, 16]
    assert caplog.text.count("has 2 rows with numbers that are not finite") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nothing"}, "is no folder; give the output of `elit prepare`"),
        ({"path": "."}, "is no prepared folder"),
        ({"damaged": "ignore"}, "unknown data.options.damaged 'ignore'"),
        ({"window": 0}, "window=0: give a whole number of samples"),
        ({"vae": "x", "path": "pixels"}, "vae='x' has no effect on pixels"),
        ({"path": "one"}, "has 1 training samples of 32x32; training takes two"),
    ],
)
def test_options_that_are_wrong(
    options: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_prepared(tmp_path / "good", (2, 2))
    write_prepared(tmp_path / "pixels", (2, 2), kind="images")
    write_prepared(tmp_path / "one", (1,))
    refuses(message, load_dataset, "prepared", **{"path": "good", **options})


# ---- runs ----


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Autoencoder]:
    """A tiny autoencoder of four pixels a side, and what a manifest says of it."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4), latent_channels=4, norm_num_groups=2, layers_per_block=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    digest = weights_sha256(model)
    return folder, Autoencoder(str(folder), "AutoencoderKL", digest, (0.18215,), (0.0,))


def config_of(folder: Path, data: Path, steps: int = 4, **changes: Any) -> TrainConfig:
    """A tiny run on a prepared folder."""
    overrides = {"hidden_size": 32, "num_heads": 2, "depth": 3, "head": 1, "tail": 1, "group": 2}
    config = tiny_config(
        folder, steps, model_overrides=overrides, data_name="prepared",
        data_options={"path": str(data)}, **changes,
    )  # fmt: skip
    config.model.preset = "elit-dit-tiny/2"
    return config


def test_train_resume_and_draw(vae: Any, tmp_path: Path) -> None:
    """Aspect buckets: a resume ends as the whole run does, and its pipeline draws pictures."""
    data = tmp_path / "data"
    write_prepared(data, (20, 20), sizes=((32, 32), (16, 48)), autoencoder=vae[1])
    shown = {"train_validate_every": 4, "train_sample_every": 4}
    train(config_of(tmp_path / "whole", data, **shown), progress=False)
    for steps in (2, 4):
        parts = config_of(tmp_path / "parts", data, steps, data_num_workers=steps // 4)
        train(parts, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 4)
    assert (tmp_path / "whole" / "samples" / "step-00000004.png").exists()
    assert "validation/loss_1" in (tmp_path / "whole" / "metrics.jsonl").read_text()
    pipeline = load_pipeline(tmp_path / "whole")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline([0, 1], num_inference_steps=1).images[0].size == (32, 32)
    wide = pipeline(1, num_inference_steps=1, height=16, width=48, budget=0.5).images[0]
    assert wide.size == (48, 16)

    moved = data.rename(tmp_path / "moved")  # the same data elsewhere
    train(config_of(tmp_path / "parts", moved, 5), progress=False)
    write_prepared(tmp_path / "other", (20, 21), sizes=((32, 32), (16, 48)), autoencoder=vae[1])
    with pytest.raises(ValueError, match="holds a run on other data than"):
        train(config_of(tmp_path / "parts", tmp_path / "other", 6), progress=False)


def test_the_autoencoder_is_the_one_that_encoded(
    vae: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_prepared(tmp_path / "gone", (20, 20))
    missing = config_of(tmp_path / "out", tmp_path / "gone", 1)
    train(missing, progress=False)
    assert caplog.text.count("the saved pipeline has no autoencoder") == 1
    assert load_pipeline(tmp_path / "out").vae is None
    missing.train.sample_every = 1
    refuses(r"data.options.vae, or set train.sample_every=0", train, missing, progress=False)
    missing.data.options["vae"] = str(vae[0])
    with pytest.raises(ValueError, match=f"SHA-256 {vae[1].sha256}, the data was .* of {'0' * 64}"):
        train(missing, progress=False)
    scaled = dataclasses.replace(vae[1], scale=(0.5,))
    write_prepared(tmp_path / "scaled", (20, 20), autoencoder=scaled)
    with pytest.raises(ValueError, match=r"not scale latents as the .* did when the data was"):
        train(config_of(tmp_path / "out2", tmp_path / "scaled", 1), progress=False)


def test_sizes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_prepared(tmp_path / "data", sizes=((32, 32), (24, 40)))
    with pytest.raises(ValueError, match=r"pictures of 24x40, 4x6x10 .* multiples of 16 pixels"):
        train(config_of(tmp_path / "out", tmp_path / "data"), progress=False)


def test_a_dry_run_checks_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prepared(tmp_path / "data")
    words = f"--data.name prepared --output_dir {tmp_path}/out --data.options.path".split()
    assert main(["train", "--dry-run", *words, str(tmp_path / "data")]) == 2
    assert "train.sample_every=0" in capsys.readouterr().err
    (tmp_path / "data" / "train-00000-32x32.safetensors").unlink()
    assert main(["train", "--dry-run", *words, str(tmp_path / "data")]) == 2
    assert (
        "it is missing; run its `elit prepare SOURCE OUT` again with --verify"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("encoder", ["words", "prepared"])
def test_texts(encoder: str, vae: Any, tmp_path: Path) -> None:
    """Our MM-DiT reads captions, or what was encoded of them; its sheet shows them."""
    texts = {"encoder_hidden_states": (5, 12), "encoder_attention_mask": (5,)}
    write_prepared(
        tmp_path / "data", captions=True, texts=texts, autoencoder=vae[1], classes=()
    )  # fmt: skip
    config = config_of(tmp_path / "out", tmp_path / "data", 2, train_sample_every=2)
    config.model.preset = "elit-mmdit-tiny/2"
    config.text = TextConfig(encoder=encoder)
    train(config, progress=False)
    assert (tmp_path / "out" / "samples" / "step-00000002.png").exists()
    model = load_pipeline(tmp_path / "out").transformer
    assert (model.config.vocab_size is None) == (encoder == "prepared")
    if encoder == "prepared":
        assert (model.config.text_dim, model.config.max_text_length) == (12, 5)
        with pytest.raises(ValueError, match=r"text.max_length=3 has no effect"):
            dataclasses.replace(config, text=TextConfig("prepared", 3))


def test_what_a_data_set_lacks(tmp_path: Path) -> None:
    write_prepared(tmp_path / "data", classes=())
    config = config_of(tmp_path / "out", tmp_path / "data")
    refuses("draws classes, but the data set 'prepared' has none", train, config, progress=False)
    config.model.preset, config.text = "elit-mmdit-tiny/2", TextConfig(encoder="prepared")
    refuses("the data set has none; run `elit prepare` with", train, config, progress=False)


def test_a_foreign_transformer_is_fine_tuned(tmp_path: Path) -> None:
    make("sd3").save_pretrained(tmp_path / "base" / "transformer")
    (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    write_prepared(tmp_path / "data", sizes=((64, 64), (48, 80)), texts=TEXTS)
    config = tiny_config(
        tmp_path / "out", 2, data_name="prepared", data_options={"path": str(tmp_path / "data")}
    )
    config.model = type(config.model)()
    config.retrofit = RetrofitConfig(base=str(tmp_path / "base"), tail=1, rank=2, group=[2, 2])
    train(config, progress=False)
    model = load_elastic(tmp_path / "out" / "transformer")
    given = {name: torch.randn(1, *shape) for name, shape in TEXTS.items()}
    given |= {"hidden_states": torch.randn(1, 4, 12, 20), "timestep": torch.ones(1)}
    assert model(**given, num_latents=1).sample.shape == (1, 4, 12, 20)

    bare = tmp_path / "bare"
    write_prepared(bare, sizes=((64, 64),))
    config.data.options, config.output_dir = {"path": str(bare)}, str(tmp_path / "out2")
    refuses("or prepared with encoded texts", train, config, progress=False)


def test_a_base_on_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, as the tests are, it comes from the cache, or an error says that it is not there."""
    assert fetch_base(str(tmp_path)) == str(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some--sd3"
    make("sd3").save_pretrained(cached / "snapshots" / "0123" / "transformer")
    (cached / "snapshots" / "0123" / "model_index.json").write_text('{"_class_name": "Other"}')
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    assert type(load_base("some/sd3")) is type(make("sd3"))
    refuses("neither a folder nor can it be fetched", fetch_base, "nobody/has-this-model")
