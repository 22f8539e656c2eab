"""The bundled data sets: what they promise about every index, split and size."""

import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import elit.data
from elit.data import DATASETS, SPLITS, load_dataset
from elit.data.digits import Digits
from elit.data.shapes import OUTLINES, Shapes


def whole(dataset):
    return dataset.batch(range(len(dataset)))


def bytes_of(images):
    return {image.numpy().tobytes() for image in images}


@pytest.fixture(
    params=[(n, s) for n in DATASETS if n not in ("tensors", "prepared") for s in SPLITS], ids=str
)
def dataset(request):
    name, split = request.param
    options = {} if name == "digits" else {"count": 60}
    return load_dataset(name, split, **options)


class TestEveryDataset:
    def test_an_item_is_an_image_and_its_label(self, dataset):
        item = dataset[3]
        captions = {"captions"} if dataset.has_captions else set()
        assert set(item) == {"images", "class_labels"} | captions
        assert item["images"].dtype == torch.float32
        assert tuple(item["images"].shape) == dataset.image_shape
        assert item["class_labels"].dtype == torch.int64
        assert item["class_labels"].shape == ()

    def test_values_are_finite_and_within_minus_one_and_one(self, dataset):
        images = whole(dataset)["images"]
        assert images.isfinite().all()
        assert images.min() >= -1
        assert images.max() <= 1
        assert images.max() - images.min() > 1.5  # and use that range

    def test_labels_are_those_of_the_items_and_name_every_class(self, dataset):
        assert dataset.labels.dtype == torch.int64
        assert torch.equal(whole(dataset)["class_labels"], dataset.labels)
        assert dataset.labels.unique().tolist() == list(range(dataset.num_classes))
        assert len(set(dataset.class_names)) == dataset.num_classes

    def test_the_batched_path_equals_the_single_one(self, dataset):
        indices = [5, 0, len(dataset) - 1, 5, -1]
        batch = dataset.batch(indices)
        items = dataset.__getitems__(indices)
        for row, (index, item) in enumerate(zip(indices, items, strict=True)):
            single = dataset[index]
            for key in ("images", "class_labels"):
                assert torch.equal(single[key], batch[key][row])
                assert torch.equal(single[key], item[key])

    def test_an_empty_batch_keeps_its_shape(self, dataset):
        batch = dataset.batch([])
        assert tuple(batch["images"].shape) == (0, *dataset.image_shape)
        assert batch["class_labels"].shape == (0,)
        assert dataset.__getitems__([]) == []

    def test_tensors_and_ranges_are_indices_too(self, dataset):
        wanted = dataset.batch([2, 3])["images"]
        assert torch.equal(dataset.batch(torch.tensor([2, 3]))["images"], wanted)
        assert torch.equal(dataset.batch(range(2, 4))["images"], wanted)

    def test_an_index_beyond_the_end_is_an_index_error(self, dataset):
        for index in (len(dataset), -len(dataset) - 1):
            with pytest.raises(IndexError, match=f"index {index} is outside .* use 0 to"):
                dataset[index]

    def test_a_fractional_index_is_a_type_error(self, dataset):
        with pytest.raises(TypeError):
            dataset[0.5]

    def test_iteration_ends(self, dataset):
        assert sum(1 for _ in dataset) == len(dataset)

    def test_a_batch_is_nobody_elses_memory(self, dataset):
        before = dataset[0]["images"].clone()
        dataset.batch([0, 1])["images"].zero_()
        dataset[0]["images"].zero_()
        assert torch.equal(dataset[0]["images"], before)

    def test_torch_loads_batches_of_it(self, dataset):
        loader = DataLoader(dataset, batch_size=16, shuffle=True)
        assert sum(len(batch["class_labels"]) for batch in loader) == len(dataset)
        batch = next(iter(loader))
        assert tuple(batch["images"].shape) == (16, *dataset.image_shape)

    def test_workers_can_receive_it(self, dataset):
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy.batch([1, 7])["images"], dataset.batch([1, 7])["images"])

    def test_no_image_is_in_both_splits(self, dataset):
        other = SPLITS[1 - SPLITS.index(dataset.split)]
        options = {"count": 60} if isinstance(dataset, Shapes) else {}
        theirs = whole(type(dataset)(other, **options))["images"]
        assert not bytes_of(whole(dataset)["images"]) & bytes_of(theirs)

    def test_its_description_tells_size_and_split(self, dataset):
        assert dataset.split in repr(dataset)
        assert re.search(rf"{len(dataset)} (images|clips)", repr(dataset))


class TestDigits:
    def test_the_splits_share_out_all_images(self):
        train, validation = Digits("train"), Digits("validation")
        assert len(train) + len(validation) == 1797
        assert 0.19 < len(validation) / 1797 < 0.21

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

    @pytest.mark.parametrize("size", [8, 17, 33, 64])
    def test_any_size_is_a_shape(self, size):
        images = whole(Shapes(count=20, size=size))["images"]
        assert tuple(images.shape) == (20, 3, size, size)
        assert images.min() >= -1
        assert images.max() <= 1

    def test_another_size_is_the_same_picture(self):
        small = whole(Shapes(count=50, size=32))["images"]
        large = whole(Shapes(count=50, size=96))["images"]
        error = (F.avg_pool2d(large, 3) - small).abs()
        assert error.mean() < 0.01
        assert (error > 0.3).float().mean() < 0.001  # only at the sharpest corners

    @pytest.mark.parametrize("count", [1, 7])
    def test_any_count_is_a_data_set(self, count):
        dataset = Shapes(count=count)
        assert len(dataset) == count
        assert dataset.labels.tolist() == list(range(count))
        assert len(whole(dataset)["images"]) == count

    def test_a_huge_count_costs_nothing_until_it_is_used(self):
        dataset = Shapes(count=10**15)
        assert torch.equal(dataset[-1]["images"], dataset[10**15 - 1]["images"])
        assert dataset[-1]["class_labels"] == (10**15 - 1) % 10

    def test_classes_are_balanced(self):
        assert torch.bincount(Shapes(count=1000).labels).tolist() == [100] * 10

    def test_every_object_is_large_and_nearly_whole(self):
        """Its visible area: a good part of the image, and most of it even where it is cut off."""
        share = object_mask(whole(Shapes(count=2000))).flatten(1).mean(dim=1)
        assert share.min() > 0.1
        assert share.max() < 0.45
        by_class = share.view(-1, 10)  # (200, class)
        # Radii differ by 1.2, so areas of one class by 1.44; the rest is what borders cut off.
        assert (by_class.max(dim=0).values / by_class.min(dim=0).values).max() < 1.9

    def test_objects_lie_everywhere_and_some_touch_the_border(self):
        mask = object_mask(whole(Shapes(count=2000)))
        assert mask[:, 1:-1, 1:-1].mean(dim=0).min() > 0  # up to the corners
        edges = [mask[:, 0, 16], mask[:, -1, 16], mask[:, 16, 0], mask[:, 16, -1]]
        assert min(edge.mean() for edge in edges) > 0.005
        touching = torch.cat([mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]], dim=1)
        assert 0.1 < (touching.amax(dim=1) > 0).float().mean() < 0.5

    def test_colours_do_not_give_the_class_away(self):
        batch = whole(Shapes(count=4000))
        mask = object_mask(batch)[:, None]
        paint = (batch["images"] * mask).sum(dim=(2, 3)) / mask.sum(dim=(2, 3))  # (B, 3)
        means = torch.stack([paint[batch["class_labels"] == label].mean(0) for label in range(10)])
        assert (means - paint.mean(dim=0)).abs().max() < 0.1

    def test_grounds_are_flat_or_graded(self):
        images = whole(Shapes(count=400))["images"]
        mask = object_mask({"images": images})[:, None]
        mask = F.max_pool2d(mask, 5, stride=1, padding=2) > 0  # and its soft rim
        level = images.masked_fill(mask, torch.nan)
        spread = (level - level.nanmean(dim=(2, 3), keepdim=True)).square().nanmean(dim=(1, 2, 3))
        flat = (spread < 1e-8).float().mean()
        assert 0.4 < flat < 0.75  # a ground graded from a colour to itself is flat as well

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

    @pytest.mark.parametrize("count", [0, -1, 2.0, "10", None, True, float("nan")])
    def test_a_bad_count_is_named(self, count):
        with pytest.raises(ValueError, match=r"count=.*whole number of images, at least 1"):
            Shapes(count=count)

    @pytest.mark.parametrize("size", [0, 7, -32, 32.0, (32, 32), False])
    def test_a_bad_size_is_named(self, size):
        with pytest.raises(ValueError, match=r"size=.*whole number of pixels a side, at least 8"):
            Shapes(size=size)


class TestLoadDataset:
    def test_options_reach_the_class(self):
        dataset = load_dataset("shapes", "validation", count=12, size=24)
        assert len(dataset) == 12
        assert dataset.image_shape == (3, 24, 24)
        assert dataset.split == "validation"

    def test_the_split_is_train_by_default(self):
        assert load_dataset("digits").split == "train"

    def test_the_table_names_every_class(self):
        assert elit.data.Digits is Digits
        assert elit.data.Shapes is Shapes
        assert elit.data.dataset_options("shapes") == ("count", "size")
        assert elit.data.dataset_options("digits") == ()

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            (("digit",), {}, r"unknown data set 'digit'.*'digits', 'shapes'.*mean 'digits'\?"),
            (("Shapes",), {}, r"unknown data set 'Shapes'.*mean 'shapes'\?"),
            (
                ("imagenet",),
                {},
                r"unknown data set 'imagenet': use one of 'digits', 'shapes', 'captioned-shapes', "
                r"'moving-shapes', 'tensors', 'prepared'$",
            ),
            ((None,), {}, r"unknown data set None: use one of"),
            ((["digits"],), {}, r"unknown data set \['digits'\]: use one of"),
            (("digits", "valid"), {}, r"unknown split 'valid'.*mean 'validation'\?"),
            (("shapes", "test"), {}, r"unknown split 'test': use one of 'train', 'validation'"),
            (("shapes", ""), {}, r"unknown split ''"),
            (("shapes",), {"coutn": 3}, r"option 'coutn' of data set 'shapes'.*mean 'count'\?"),
            (
                ("digits",),
                {"size": 32},
                r"option 'size' of data set 'digits': no option is allowed",
            ),
            (("shapes", "train"), {"count": 0}, r"count=0: use a whole number"),
        ],
    )
    def test_a_mistake_is_named_with_what_is_allowed(self, arguments, options, message):
        with pytest.raises(ValueError, match=message):
            load_dataset(*arguments, **options)

    def test_an_unknown_attribute_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="CIFAR"):
            _ = elit.data.CIFAR

    def test_importing_the_package_loads_neither_torch_nor_sklearn(self):
        code = "import sys, elit.data; print([m for m in ('torch', 'sklearn') if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "[]", done.stderr


def object_mask(batch):
    """Find the object by its strong colour on the pale ground: (B, H, W) of 0 and 1."""
    images = batch["images"]
    pale = images.amin(dim=1) > 0.2  # every ground's darkest channel
    return (~pale).float()


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
