"""The bundled data sets: what they promise about every index, split and size."""

import gzip
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import refuses
from idx_files import idx, idx_folder, noise, write_idx
from torch.utils.data import DataLoader

import elit.data
from elit.data import DATASETS, SPLITS, load_dataset
from elit.data.digits import Digits
from elit.data.fashion_mnist import CLASS_NAMES, FashionMNIST
from elit.data.shapes import OUTLINES, Shapes


def whole(dataset):
    return dataset.batch(range(len(dataset)))


def bytes_of(images):
    return {image.numpy().tobytes() for image in images}


@pytest.fixture(
    params=[(n, s) for n in DATASETS if n not in ("tensors", "prepared") for s in SPLITS], ids=str
)
def dataset(request, tmp_path):
    name, split = request.param
    options = {} if name == "digits" else {"count": 60}
    if name == "fashion-mnist":
        options = {"path": idx_folder(tmp_path)}
    return load_dataset(name, split, **options)


class TestEveryDataset:
    def test_an_item_is_an_image_and_its_label(self, dataset):
        item = dataset[3]
        captions = {"captions"} if dataset.has_captions else set()
        assert set(item) == {"images", "class_labels"} | captions
        for batch, shape in ((item, ()), (dataset.batch([]), (0,))):
            assert batch["images"].dtype == torch.float32
            assert tuple(batch["images"].shape) == (*shape, *dataset.image_shape)
            assert batch["class_labels"].dtype == torch.int64
            assert batch["class_labels"].shape == shape
        assert dataset.__getitems__([]) == []
        assert re.search(rf"{dataset.split}.*{len(dataset)} (images|clips)", repr(dataset))

    def test_values_and_labels_use_all_of_their_range(self, dataset):
        batch = whole(dataset)
        images = batch["images"]
        assert images.isfinite().all()
        assert images.min() >= -1
        assert images.max() <= 1
        assert images.max() - images.min() > 1.5
        assert dataset.labels.dtype == torch.int64
        assert torch.equal(batch["class_labels"], dataset.labels)
        assert dataset.labels.unique().tolist() == list(range(dataset.num_classes))
        assert len(set(dataset.class_names)) == dataset.num_classes

    def test_the_batched_path_equals_the_single_one_and_a_worker_s(self, dataset):
        indices = [5, 0, len(dataset) - 1, 5, -1]
        batch, items = dataset.batch(indices), dataset.__getitems__(indices)
        sent = pickle.loads(pickle.dumps(dataset)).batch(indices)
        for key in ("images", "class_labels"):
            assert torch.equal(batch[key], sent[key])
            assert torch.equal(batch[key], torch.stack([dataset[index][key] for index in indices]))
            assert torch.equal(batch[key], torch.stack([item[key] for item in items]))

    def test_an_index_beyond_the_end_is_an_index_error(self, dataset):
        for index in (len(dataset), -len(dataset) - 1):
            with pytest.raises(IndexError, match=f"index {index} is outside .* use 0 to"):
                dataset[index]

    def test_a_batch_is_nobody_elses_memory(self, dataset):
        before = dataset[0]["images"].clone()
        dataset.batch([0, 1])["images"].zero_()
        dataset[0]["images"].zero_()
        assert torch.equal(dataset[0]["images"], before)

    def test_torch_loads_batches_of_it(self, dataset):
        batches = list(DataLoader(dataset, batch_size=16, shuffle=True))
        assert sum(len(batch["class_labels"]) for batch in batches) == len(dataset)
        assert tuple(batches[0]["images"].shape) == (16, *dataset.image_shape)

    def test_no_image_is_in_both_splits(self, dataset, tmp_path):
        other = SPLITS[1 - SPLITS.index(dataset.split)]
        options = {"count": 60} if isinstance(dataset, Shapes) else {}
        if isinstance(dataset, FashionMNIST):
            options = {"path": tmp_path}
        theirs = whole(type(dataset)(other, **options))["images"]
        assert not bytes_of(whole(dataset)["images"]) & bytes_of(theirs)


class TestDigits:
    def test_each_class_is_held_out_alike(self):
        train, validation = (torch.bincount(Digits(split).labels) for split in SPLITS)
        share = validation / (train + validation)
        assert share.min() > 0.19
        assert share.max() < 0.215

    def test_ink_is_white_on_black_with_a_margin(self):
        images = Digits().images
        border = torch.ones(16, 16, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        assert (images[..., border] == -1).all()
        assert (images == -1).float().mean() > 0.5
        assert (images.flatten(1).max(dim=1).values > 0.8).all()

    def test_the_enlargement_keeps_the_original_picture(self):
        from sklearn.datasets import load_digits

        data = load_digits()
        first = torch.from_numpy(data.images[data.target == 3][1]).float()  # trains: index 0 is out
        ours = Digits("train")
        image = ours.images[ours.labels == 3][0]
        small = F.adaptive_avg_pool2d(image[:, 1:-1, 1:-1], 8)[0]
        both = torch.stack([first.flatten(), small.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.95


class TestShapes:
    def test_an_image_depends_on_split_and_index_alone(self):
        few, many = Shapes(count=30), Shapes(count=100_000)
        assert torch.equal(few[17]["images"], many[17]["images"])
        assert torch.equal(few.batch([17])["images"][0], few.batch(range(30))["images"][17])
        assert not torch.equal(few[17]["images"], Shapes("validation", count=30)[17]["images"])

    def test_no_image_comes_twice(self):
        images = [whole(Shapes(split, count=3000, size=8))["images"] for split in SPLITS]
        assert len(bytes_of(torch.cat(images))) == 6000

    def test_the_random_numbers_stay_the_same_for_good(self):
        """A changed hash or order of draws would silently change every published number."""
        means = whole(Shapes(count=10))["images"].mean(dim=(2, 3))
        torch.testing.assert_close(means, torch.tensor(GOLDEN), atol=1e-3, rtol=0)

    def test_another_size_is_the_same_picture(self):
        small = whole(Shapes(count=50, size=32))["images"]
        large = whole(Shapes(count=50, size=96))["images"]
        error = (F.avg_pool2d(large, 3) - small).abs()
        assert error.mean() < 0.01
        assert (error > 0.3).float().mean() < 0.001  # only at the sharpest corners

    def test_a_huge_count_costs_nothing_until_it_is_used(self):
        dataset = Shapes(count=10**15)
        assert torch.equal(dataset[-1]["images"], dataset[10**15 - 1]["images"])
        assert dataset[-1]["class_labels"] == (10**15 - 1) % 10

    def test_outlines_have_an_even_rim_and_stay_in_reach(self):
        line = torch.linspace(-1.6, 1.6, 641, dtype=torch.float64).numpy()
        x, y = line[None, :] + 0 * line[:, None], line[:, None] + 0 * line[None, :]
        for name, outline in OUTLINES.items():
            distance = torch.from_numpy(outline(x, y))
            inside = distance < 0
            assert torch.from_numpy(abs(x))[inside].max() < 1.1, name
            assert torch.from_numpy(abs(y))[inside].max() < 1.1, name
            assert 0.15 < inside.double().mean() * 3.2**2 / 4 < 0.8, name
            down, across = torch.gradient(distance, spacing=3.2 / 640)
            slope = (down**2 + across**2).sqrt()[distance.abs() < 0.02]
            assert abs(slope.median() - 1) < 0.02, name

    @pytest.mark.parametrize(
        ("option", "values", "message"),
        [
            ("count", [0, -1, 2.0, "10", None, True, float("nan")], "images, at least 1"),
            ("size", [0, 7, -32, 32.0, (32, 32), False], "pixels a side, at least 8"),
        ],
    )
    def test_a_bad_count_or_size_is_named(self, option, values, message):
        for value in values:
            refuses(f"{option}=.*whole number of {message}", Shapes, **{option: value})


class TestFashionMNIST:
    @pytest.mark.parametrize("end", ["", ".gz"])
    def test_pixels_and_labels_are_those_of_the_files(self, tmp_path, end):
        folder = idx_folder(tmp_path, 25, end)
        for number, split in enumerate(SPLITS):
            dataset = FashionMNIST(split, str(folder))
            batch = dataset.batch([24, 3, -2])
            wanted = np.full((3, 1, 32, 32), -1, np.float32)
            pixels = noise(25, seed=number)[[24, 3, 23]].astype(np.float32)
            wanted[:, 0, 2:30, 2:30] = pixels / np.float32(127.5) - 1
            assert np.array_equal(batch["images"].numpy(), wanted)
            assert batch["class_labels"].tolist() == [(row + number) % 10 for row in (24, 3, 23)]
            assert dataset.pixels.dtype == torch.uint8
        assert dataset.class_names == CLASS_NAMES
        assert (dataset.class_names[0], dataset.class_names[9]) == ("t-shirt", "ankle boot")

    def test_a_count_takes_the_first_ones_at_most(self, tmp_path):
        folder = idx_folder(tmp_path, 30)
        few = FashionMNIST(path=folder, count=12)
        assert len(few) == len(whole(few)["images"]) == 12
        assert torch.equal(few[11]["images"], FashionMNIST(path=folder)[11]["images"])
        assert len(FashionMNIST("validation", folder, count=31)) == 30
        with pytest.raises(ValueError, match="count=0: use a whole number of images, at least 1"):
            FashionMNIST(path=folder, count=0)

    def test_its_fingerprint_tells_other_data_and_not_other_folders(self, tmp_path):
        folders = [
            idx_folder(tmp_path / "plain"),
            idx_folder(tmp_path / "packed", end=".gz"),
            idx_folder(tmp_path / "other", seed=5),
            idx_folder(tmp_path / "labels"),
        ]
        write_idx(folders[3], "train", noise(60), np.arange(60)[::-1] % 10)
        found = [FashionMNIST(path=folder).fingerprint for folder in folders]
        assert found[0] == found[1]
        assert len(set(found)) == 3
        assert FashionMNIST(path=folders[0], count=5).fingerprint == found[0]

    @pytest.mark.parametrize("path", [None, "", "nowhere", 3, "empty"])
    def test_without_its_folder_it_says_what_to_do(self, tmp_path, monkeypatch, path):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        message = (
            rf"data.options.path={None if path is None else repr(str(path))} is no folder of "
            rf"Fashion-MNIST's files; give data.options.path=FOLDER with train-images-idx3-ubyte, "
            rf"train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte in it, "
            rf"plain or as .gz, .*package dataset-fashion-mnist; .*`elit prepare "
            rf"zalando-datasets/fashion_mnist prepared --pixels --resolution 32`"
        )
        refuses(message, load_dataset, "fashion-mnist", path=path)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            (
                0,
                lambda b: b"P5 " + b,
                r"no idx file of bytes with 3 axes: .* 50 35 20 00, not with",
            ),
            (0, lambda _: idx(np.zeros(9)), r"begins with 00 00 08 01, not with 00 00 08 03; give"),
            (1, lambda _: b"", r"with 1 axes: it begins with nothing, not with 00 00 08 01; give"),
            (0, lambda b: b[:9], r"ends within its header of 16 bytes; copy it again"),
            (0, lambda b: b[:-1], r"has 15695 bytes, but its header of 20x28x28 makes 15696; copy"),
            (0, lambda b: b + b"x", r"has 15697 bytes, but its header of 20x28x28 makes 15696"),
            (1, lambda b: b[:-1], r"has 27 bytes, but its header of 20 makes 28"),
            (1, lambda _: idx(np.zeros(19)), r"ubyte\S* has 20 images, but .* has 19 labels; give"),
            (1, lambda _: idx(np.arange(20)), r"has the label 10 in row 10; labels are 0 to 9"),
            (0, lambda _: idx(np.zeros((20, 8, 9))), r"8x9 pixels, Fashion-MNIST's have 28x28; "),
            (0, lambda _: idx(np.zeros((20, 0, 9))), r"no pixels, its shape is \(20, 0, 9\)"),
        ],
    )
    @pytest.mark.parametrize("end", ["", ".gz"])
    def test_a_wrong_file_is_named(self, tmp_path, name, change, message, end):
        folder = idx_folder(tmp_path, 20, end)
        path = folder / (("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")[name] + end)
        content = path.read_bytes()
        changed = change(gzip.decompress(content) if end else content)
        path.write_bytes(gzip.compress(changed) if end else changed)
        with pytest.raises(ValueError, match=message) as error:
            FashionMNIST("validation", folder)
        assert str(tmp_path) in str(error.value)
        FashionMNIST("train", folder)  # the other split's files are whole

    def test_a_file_that_is_missing_or_badly_packed_is_named(self, tmp_path):
        folder = idx_folder(tmp_path, 20, ".gz")
        path = folder / "train-labels-idx1-ubyte.gz"
        content = path.read_bytes()
        for damaged in (content[:-9], b"no gzip", content[:12] + b"xxxx" + content[16:]):
            path.write_bytes(damaged)
            refuses(r"ubyte.gz is no whole gzip file .*copy it again", FashionMNIST, path=folder)
        path.unlink()
        message = "has neither train-labels-idx1-ubyte nor train-labels-idx1-ubyte.gz; put one"
        refuses(message, FashionMNIST, path=folder)


class TestLoadDataset:
    def test_the_table_names_every_class(self):
        assert elit.data.Digits is Digits
        assert elit.data.Shapes is Shapes
        assert elit.data.FashionMNIST is FashionMNIST
        assert elit.data.dataset_options("shapes") == ("count", "size")
        assert elit.data.dataset_options("digits") == ()

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            (("digit",), {}, r"unknown data set 'digit'.*'digits', 'shapes'.*mean 'digits'\?"),
            (
                ("imagenet",),
                {},
                r"unknown data set 'imagenet': use one of 'digits', 'shapes', 'captioned-shapes', "
                r"'moving-shapes', 'fashion-mnist', 'tensors', 'prepared'$",
            ),
            ((None,), {}, r"unknown data set None: use one of"),
            (("digits", "valid"), {}, r"unknown split 'valid'.*mean 'validation'\?"),
            (("shapes", "test"), {}, r"unknown split 'test': use one of 'train', 'validation'"),
            (("shapes",), {"coutn": 3}, r"option 'coutn' of data set 'shapes'.*mean 'count'\?"),
            (
                ("digits",),
                {"size": 32},
                r"option 'size' of data set 'digits': no option is allowed",
            ),
        ],
    )
    def test_a_mistake_is_named_with_what_is_allowed(self, arguments, options, message):
        refuses(message, load_dataset, *arguments, **options)

    def test_an_unknown_attribute_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="CIFAR"):
            _ = elit.data.CIFAR

    def test_importing_the_package_loads_neither_torch_nor_sklearn(self):
        code = "import sys, elit.data; print([m for m in ('torch', 'sklearn') if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "[]", done.stderr


# Mean red, green and blue of the first ten training images.
GOLDEN = [
    [0.657, 0.373, 0.255],
    [0.563, 0.569, 0.701],
    [0.715, 0.456, 0.458],
    [0.641, 0.707, 0.656],
    [0.612, 0.471, 0.480],
    [0.590, 0.585, 0.817],
    [0.604, 0.610, 0.826],
    [0.667, 0.468, 0.538],
    [0.485, 0.607, 0.499],
    [0.690, 0.506, 0.554],
]


class TestMovingShapes:
    def centres(self, clips):
        """Middle of what differs from the ground, (B, T, 2) as x, y."""
        ground = clips[:, :, :, :1, :1]
        ink = (clips - ground).abs().sum(1)  # (B, T, H, W)
        grid = torch.arange(clips.shape[-1]) + 0.5
        total = ink.sum((-1, -2))
        return (
            torch.stack([(ink.sum(-2) * grid).sum(-1), (ink.sum(-1) * grid).sum(-1)], -1)
            / (total[..., None])
        )

    def test_the_object_moves_evenly_in_the_direction_of_its_class(self):
        dataset = load_dataset("moving-shapes", count=80, size=32)
        batch = dataset.batch(range(80))
        steps = self.centres(batch["images"]).diff(dim=1)[:, 2:-2]  # whole in these frames
        for label, (x, y) in enumerate(((1, 0), (-1, 0), (0, 1), (0, -1))):
            chosen = steps[batch["class_labels"] == label]
            along = chosen @ torch.tensor([x, y], dtype=torch.float32)
            across = chosen @ torch.tensor([y, x], dtype=torch.float32)
            assert along.min() > 1
            assert across.abs().max() < 0.3
            assert along.std(dim=1).max() < 0.3

    def test_more_frames_sample_the_same_motion(self):
        few = load_dataset("moving-shapes", count=8, frames=5).batch(range(8))["images"]
        many = load_dataset("moving-shapes", count=8, frames=9).batch(range(8))["images"]
        torch.testing.assert_close(many[:, :, ::2], few)

    def test_bad_options_are_named(self):
        with pytest.raises(ValueError, match="frames=1: use a whole number of frames, at least 2"):
            load_dataset("moving-shapes", frames=1)
