"""`elit.train` and `elit.finetune`: any data set, any model in memory, equal training FLOPs."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from retrofit_models import inputs, make
from runs import TINY, metrics, tiny_config
from test_finetune_foreign import SIZES
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import elit
from elit.cli.main import main
from elit.data import load_dataset
from elit.data.given import Given, split_given
from elit.evaluation.images import open_images
from elit.training.config_files import load_config
from elit.training.estimate import estimate, match_flops

LABELS = torch.arange(40) % 3
IMAGES = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Pairs:
    """Pictures as `make` gives them, with labels."""

    def __init__(self, make: Any = lambda x: x, count: int = 40, classes: Any = None):
        self.make, self.count = make, count
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        return self.make(IMAGES[row]), int(LABELS[row])


class Streamed(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Pairs())

    def __len__(self) -> int:
        return 40


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return ((x + 1) * 127.5).round().to(torch.uint8)


def as_pil(x: torch.Tensor) -> Image.Image:
    return Image.fromarray(as_bytes(x)[0].numpy())


@pytest.mark.parametrize(
    "make", [as_bytes, as_pil, lambda x: as_bytes(x)[0].numpy(), lambda x: np.asarray(as_pil(x))]
)
def test_images_of_any_kind_are_read_alike(make):
    batch = Given(Pairs(make), "train", range(40)).batch([5, 0])
    torch.testing.assert_close(batch["images"], IMAGES[[5, 0]], atol=0.004, rtol=0)
    assert batch["class_labels"].tolist() == [2, 0]


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(IMAGES, LABELS),
        Subset(Pairs(), range(40)),
        [{"image": x, "label": y} for x, y in zip(IMAGES, LABELS.tolist(), strict=True)],
        [{"pixel_values": x, "class_labels": y} for x, y in zip(IMAGES, LABELS, strict=True)],
    ],
    ids=["tensors", "subset", "dicts", "other names"],
)
def test_data_sets_of_any_kind(dataset):
    train, validation = split_given(dataset)
    assert (len(train), len(validation), train.num_classes) == (38, 2, 3)
    assert torch.equal(train.batch([0])["images"], IMAGES[1:2])
    assert torch.equal(validation.batch([1])["images"], IMAGES[20:21])


def test_captions_and_latents():
    train, _ = split_given([(IMAGES[0], f"picture {i}") for i in range(4)])
    assert train.batch([0])["captions"] == ["picture 1"]
    item = {"latents": torch.zeros(4, 8, 8), "encoder_hidden_states": torch.ones(5, 12)}
    train, _ = split_given([item] * 4, null={"encoder_hidden_states": torch.zeros(1, 5, 12)})
    assert (train.for_diffusers, train.encodings) == (True, ("encoder_hidden_states",))
    with pytest.raises(ValueError, match=r"null has text .*no such argument"):
        split_given([item] * 4, null={"text": torch.zeros(1, 5, 12)})


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            Pairs(lambda x: as_bytes(x).float()),
            r"from 1 to 255; give uint8, or floats in \[-1, 1\]",
        ),
        (Pairs(lambda x: as_bytes(x).int()), r"image of torch.int32"),
        (Pairs(lambda x: x.repeat(4, 1, 1).long()), r"image of torch.int64"),
        (Pairs(lambda x: as_bytes(x)[0].numpy().astype(np.uint16)), r"image of torch.uint16"),
        (Pairs(lambda x: x * torch.nan), "not finite: image"),
        (Pairs(lambda _: "a.png"), "item 1 has an image str"),
        ([IMAGES[0]] * 4, "item 1 is Tensor; give an image with a label or a caption"),
        ([{"picture": 1}] * 4, r"item 1 is \['picture'\]; give an image"),
        ([()] * 4, "item 1 is tuple; give an image"),
        ([{"latents": IMAGES[0], "timestep": 1}] * 4, "item 1 has timestep, which training makes"),
        ([(IMAGES[0], 1.5)] * 4, "label 1.5; give a whole number from 0, or a caption"),
        ([(IMAGES[0], 10**9)] * 4, "label 1000000000, as if there were as many classes"),
        ([(IMAGES[0, :, :0], 0)] * 4, r"an image \(1, 0, 16\) of torch.float32; give PIL"),
        ([(IMAGES[0] * 1j, 0)] * 4, r"an image \(1, 16, 16\) of torch.complex64; give PIL"),
        ([(IMAGES[0], 0)], "1 items is too small"),
        (iter([(IMAGES[0], 0)]), "has no length; give a map-style data set"),
        (Streamed(), "a Streamed has no items by number; give a map-style data set"),
        (DataLoader(Pairs()), "a DataLoader has no items by number"),
        ({"train": Pairs(), "test": Pairs()}, "a dict of train, test is no data set; give one of"),
        (Pairs(lambda x: x.expand(4, -1, -1).numpy()), r"\(4, 16, 16\), \(C, H, W\) as it seems"),
        (Pairs(lambda _: Image.new("I;16", (16, 16))), "PIL image of mode I;16, whose range is"),
        (Pairs(lambda _: Image.new("F", (16, 16))), "PIL image of mode F, whose range is unknown"),
    ],
)
def test_what_is_no_data_set_is_refused(dataset, message):
    with pytest.raises(ValueError, match=message):
        split_given(dataset)


def test_what_is_transparent_is_white_and_grey_stays_grey():
    def values(image: Image.Image) -> tuple[int, set[float]]:
        train, _ = split_given([(image, np.asarray(0))] * 2)  # a label of no axis
        images = train.batch([0])["images"]
        return images.shape[1], set(images.unique().tolist())

    assert values(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) == (3, {1.0})
    assert values(Image.new("LA", (4, 4), (0, 0))) == (1, {1.0})
    assert values(Image.new("RGBA", (4, 4), "black")) == (3, {-1.0})
    assert values(Image.new("1", (4, 4))) == (1, {-1.0})


def test_whole_numbers_of_numpy_are_settings():
    config = load_config("digits", {"train.steps": np.int64(7), "optimizer.lr": np.float32(0.5)})
    assert (config.train.steps, config.optimizer.lr) == (7, 0.5)
    assert type(config.train.steps) is int
    with pytest.raises(ValueError, match="give a whole number"):
        load_config("digits", {"train.steps": np.bool_(True)})


def test_a_run_on_what_was_given_has_no_reference_elsewhere():
    for read in (lambda: load_dataset("memory", count=3),
                 lambda: open_images("memory", trained_on={"count": 3})):  # fmt: skip
        with pytest.raises(ValueError, match="given from Python, which nothing else knows"):
            read()


def test_names_of_classes_are_found_below_a_subset():
    train, held_out = split_given(Subset(Pairs(classes=["a", "b", "c"]), range(40)))
    assert train.class_names == held_out.class_names == ("a", "b", "c")
    counted, _ = split_given(Pairs(classes=3))
    assert counted.class_names == ("0", "1", "2")


@pytest.mark.parametrize("names", ["abc", 3, [], {"a", "b"}, {0: "a"}])
def test_names_of_classes_are_a_list(names):
    with pytest.raises(ValueError, match="give a list, a name for each label"):
        split_given(Pairs(), class_names=names)


def test_names_of_classes_without_labels_are_refused():
    with pytest.raises(ValueError, match="class_names are of items with labels"):
        split_given([(IMAGES[0], "a text")] * 4, class_names=["a"])


def test_classes_are_counted_over_all_items():
    """The first of twenty items is held out, and here alone of its class."""
    items = [(IMAGES[0], 5), *[(IMAGES[0], 0)] * 19]
    assert [one.num_classes for one in split_given(items)] == [6, 6]
    other = [(IMAGES[0], 3)]
    assert [one.num_classes for one in split_given(items[1:], other)] == [4, 4]


@pytest.mark.parametrize("row", [0, 30, 39])
def test_labels_without_a_name_are_told_at_once_where_all_lie_in_memory(row: int):
    """Held out or not; names may be more than there are labels."""
    labels = torch.zeros(40, dtype=torch.long)
    labels[row] = 2
    images = IMAGES[:1].expand(40, -1, -1, -1)
    for dataset in (TensorDataset(images, labels), list(zip(images, labels, strict=True))):
        with pytest.raises(ValueError, match=f"item {row} has label 2, but the classes are 0 to 1"):
            split_given(dataset, class_names=["a", "b"])
        assert split_given(dataset, class_names=list("abcd"))[0].num_classes == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": 5}, "config 5 is no config; give a TrainConfig"),
        ({"config": {"train.steps": 5}}, "is no config"),
        ({"overrides": ["train.steps"]}, "are no settings; give a dict"),
        ({"match_flops": 7}, "match_flops 7 is no config"),
        ({"validation": []}, "validation has no items"),
        ({"dataset": None, "class_names": ["a"]}, "class_names without a dataset; give both"),
        ({"dataset": None, "validation": Pairs()}, "validation without a dataset; give both"),
    ],
)
def test_wrong_types_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        elit.train(**{"config": "digits", "dataset": Pairs(), **arguments})


def test_what_is_held_out_is_like_the_rest():
    with pytest.raises(ValueError, match=r"held-out items have images \(1, 8, 16\)"):
        split_given(Pairs(), [(IMAGES[0, :, :8], 0)])


def test_images_of_0_to_1_are_told(caplog):
    """As torchvision's ToTensor makes them: nothing tells them from bright ones but a guess."""
    split_given(Pairs(lambda x: (x + 1) / 2))
    assert "no value below 0" in caplog.text
    caplog.clear()
    split_given(Pairs())
    assert not caplog.text


def test_an_item_that_is_unlike_the_others_is_named():
    odd = [(IMAGES[0], 0)] * 4 + [(IMAGES[0, :, :8], 0)]
    with pytest.raises(ValueError, match=r"item 4 has images \(1, 8, 16\).*first has images"):
        Given(odd, "train", range(5)).batch([0, 4])
    with pytest.raises(ValueError, match="item 2 has label 2, but the classes are 0 to 1"):
        Given(Pairs(), "train", range(1, 40), class_names=["a", "b"]).batch([1, 2])


def test_train_on_a_data_set_in_memory(tmp_path: Path) -> None:
    """It goes on where it stopped, and keeps the names of the classes."""
    config = tiny_config(tmp_path / "run", steps=2, train_validate_every=50)
    data = Pairs(as_pil, classes=["shirt", "bag", "boot"])
    assert elit.train(config, data, progress=False).step == 2
    result = elit.train(config, data, overrides={"train.steps": 4}, progress=False)
    assert (result.step, result.finished) == (4, True)
    losses = [row["step"] for row in metrics(result.folder) if "validation/loss" in str(row)]
    assert losses == [2, 4]  # a last one always
    pipe = elit.ElitPipeline.from_pretrained(result.folder)
    assert pipe.labels == {"shirt": 0, "bag": 1, "boot": 2}
    assert pipe.transformer.config.num_classes == 3
    whole = elit.train(
        tiny_config(tmp_path / "whole", steps=4), data, overrides={"train.steps": "4"},
        progress=False,
    )  # fmt: skip
    again = elit.ElitPipeline.from_pretrained(whole.folder).transformer
    assert all(map(torch.equal, again.parameters(), pipe.transformer.parameters()))
    for other in (Pairs(as_pil, 39, data.classes), Pairs(as_pil, classes=["shirt", "bag"] * 2)):
        with pytest.raises(ValueError, match=r"another run .*'name': 'memory'.*there"):
            elit.train(config, other, overrides={"train.steps": 4}, progress=False)
    with pytest.raises(ValueError, match="a data set given from Python, which nothing else knows"):
        elit.train(str(result.folder / "config.yaml"), progress=False)


def test_latents_without_an_autoencoder(tmp_path: Path) -> None:
    data = [(torch.randn(4, 16, 16), i % 2) for i in range(40)]
    with pytest.raises(ValueError, match=r"4 channels are no image.*set train.sample_every=0"):
        elit.train(tiny_config(tmp_path / "run", train_sample_every=2), data)
    config = tiny_config(tmp_path / "run", steps=1)
    assert elit.train(config, data, progress=False).step == 1


def test_built_in_configs_and_overrides(tmp_path: Path) -> None:
    over = {
        "output_dir": str(tmp_path / "run"), "train.steps": 1, "data.batch_size": 4,
        "train.device": "cpu", "train.sample_every": 0, "train.validate_every": 0,
        **{f"model.overrides.{name}": value for name, value in TINY.items()},
    }  # fmt: skip
    assert elit.train("digits", Pairs(), overrides=over, progress=False).step == 1
    with pytest.raises(ValueError, match=r"unknown key train.step: did you mean train.steps\?"):
        elit.train("digits", Pairs(), overrides={"train.step": 1})


FINETUNE = {
    "data.batch_size": 4, "train.steps": 2, "train.device": "cpu", "retrofit.rank": 2,
    "retrofit.tail": 1, "train.validate_every": 2,
}  # fmt: skip


def test_finetune_a_model_in_memory(tmp_path: Path) -> None:
    """A copy is trained; its interface fits the original; another base is refused on resuming."""
    base = make("sd3")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    told = {k: v for k, v in inputs("sd3", 40).items() if k not in ("hidden_states", "timestep")}
    data = [
        {"latents": torch.randn(SIZES["sd3"]), **{name: x[i] for name, x in told.items()}}
        for i in range(40)
    ]
    over = FINETUNE | {"output_dir": str(tmp_path / "out")}
    null = {name: x[:1] for name, x in told.items()}
    result = elit.finetune(base, data, overrides=over, null=null, progress=False)
    assert (result.step, result.finished) == (2, True)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    model = elit.load_interface(base, result.folder / "interface.safetensors")
    assert model.is_elastic
    again = elit.finetune(
        make("sd3"), data, overrides=over | {"train.steps": 3}, null=null, progress=False
    )
    assert again.step == 3
    other = make("sd3")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match="trained on another base"):
        elit.finetune(other, data, overrides=over | {"train.steps": 4}, null=null)


def test_finetune_one_of_ours(tmp_path: Path) -> None:
    """Given as a pipeline, on images with labels."""
    base = elit.DiT(16, 1, 2, hidden_size=32, num_heads=2, depth=4, num_classes=3)
    pipe = elit.ElitPipeline(base, elit.make_scheduler("euler"))
    over = FINETUNE | {"output_dir": str(tmp_path / "out"), "train.sample_every": 0}
    with pytest.raises(ValueError, match=r"objective\.shift=2\.0, but the pipeline draws with"):
        elit.finetune(pipe, Pairs(), overrides=over | {"objective.shift": 2.0})
    result = elit.finetune(pipe, Pairs(), overrides=over | {"retrofit.head": 1}, progress=False)
    assert elit.load_pipeline(str(result.folder)).transformer.is_elastic
    assert not base.is_elastic


def test_what_cannot_be_fine_tuned() -> None:
    with pytest.raises(ValueError, match="the model holds a Linear, which elit finetune can't"):
        elit.finetune(torch.nn.Linear(1, 1), Pairs())


def test_equal_training_flops(tmp_path: Path, caplog, capsys) -> None:
    """Steps of a plain model that take what an elastic run takes, within half a step."""
    run = elit.train(tiny_config(tmp_path / "elastic", steps=3), Pairs(), progress=False)
    plain = tiny_config(tmp_path / "plain", model_preset="dit-tiny/2", data_batch_size=8)
    matched = match_flops(plain, str(run.folder))
    total = estimate(elit.TrainConfig(**vars(tiny_config(tmp_path / "e", steps=3))), gpus=1)
    own = estimate(matched, gpus=1)
    assert abs(own["total_eflops"] - total["total_eflops"]) <= own["step_tflops"] / 2e6
    with caplog.at_level(logging.INFO, "elit"):
        done = elit.train(plain, Pairs(), match_flops=run.folder, progress=False)
    assert done.step == matched.train.steps
    assert f"{done.step} steps of" in caplog.text
    assert f"as the 3 steps of {run.folder}" in caplog.text
    with pytest.raises(ValueError, match=r"match_flops sets train.steps"):
        elit.train(plain, Pairs(), match_flops=run.folder, overrides={"train.steps": 2})
    line = ["plan", "digits", "--gpus", "1", "--match-flops", "digits", "--json"]
    assert main(line) == 0
    assert main([*line, "--train.steps", "3"]) == 2
    assert "--match-flops sets --train.steps" in capsys.readouterr().err


def test_top_level_names() -> None:
    """A loop of one's own needs no deep import."""
    density = elit.SigmaDensity()
    sigma = density.sample(4, torch.Generator().manual_seed(0))
    data = torch.zeros(4, 1, 2, 2)
    loss = elit.flow_matching_loss(lambda x, _: x, data, torch.ones_like(data), sigma)
    torch.testing.assert_close(loss, (sigma - 1) ** 2)
    assert elit.load_dataset("digits").num_classes == 10
