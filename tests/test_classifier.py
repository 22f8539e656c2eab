"""The classifier of generated images: right on real ones, fair to soft ones, honest on bad ones."""

import pytest
import torch
import torch.nn.functional as F
from helpers import refuses

from elit.data import load_dataset
from elit.networks.classifier import fit_classifier

# Data set, options, accuracy; `shapes` of their usual 32 px take thrice as long as those of 20.
FITTED = [
    pytest.param(("digits", {}, {}, 0.985), id="digits"),
    pytest.param(
        ("shapes", {"size": 20, "count": 2000}, {"size": 20, "count": 500}, 0.97), id="shapes"
    ),
    pytest.param(
        ("shapes", {"count": 2000}, {"count": 500}, 0.97), id="shapes-32", marks=pytest.mark.slow
    ),
]


@pytest.fixture(scope="module", params=FITTED)
def fitted(request):
    """A classifier with held-out images, labels and the accuracy promised for them."""
    name, train_options, held_out_options, promised = request.param
    classifier = fit_classifier(load_dataset(name, "train", **train_options))
    held_out = load_dataset(name, "validation", **held_out_options)
    batch = held_out.batch(range(len(held_out)))
    return classifier, batch["images"], batch["class_labels"], promised


def blur(images, factor):
    small = F.avg_pool2d(images, factor)
    return F.interpolate(small, size=images.shape[-2:], mode="bilinear")


def noise(images):
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


class TestAccuracy:
    def test_held_out_images_are_told_apart(self, fitted):
        classifier, images, labels, promised = fitted
        assert classifier.accuracy(images, labels) >= promised

    def test_every_class_is_told_apart(self, fitted):
        classifier, images, labels, _ = fitted
        for label in labels.unique():
            rows = labels == label
            assert classifier.accuracy(images[rows], labels[rows]) >= 0.9

    def test_slight_blur_and_noise_are_forgiven(self, fitted):
        classifier, images, labels, promised = fitted
        assert classifier.accuracy(blur(images, 2), labels) >= promised - 0.03
        assert classifier.accuracy(images + 0.15 * noise(images), labels) >= promised - 0.03

    def test_values_beyond_the_range_are_clipped_as_a_display_does(self, fitted):
        classifier, images, _, _ = fitted
        wide = 1.2 * images
        assert torch.equal(classifier.predict(wide), classifier.predict(wide.clamp(-1, 1)))

    def test_wrong_labels_and_ruined_images_are_not_forgiven(self, fitted):
        classifier, images, labels, _ = fitted
        assert classifier.accuracy(images, (labels + 1) % 10) < 0.02
        assert classifier.accuracy(noise(images), labels) < 0.25
        empty = images.mean(dim=0, keepdim=True).expand_as(images)
        assert classifier.accuracy(empty, labels) < 0.2


class TestPredict:
    def test_labels_are_int64_and_one_per_image(self, fitted):
        classifier, images, _, _ = fitted
        labels = classifier.predict(images[:7])
        assert labels.dtype == torch.int64
        assert labels.shape == (7,)
        assert classifier.predict(images[:0]).shape == (0,)

    def test_a_label_does_not_depend_on_the_batch(self, fitted):
        classifier, images, _, _ = fitted
        together = classifier.predict(images[:20])
        assert torch.equal(classifier.predict(images[:20].double().requires_grad_()), together)
        alone = torch.cat([classifier.predict(image[None]) for image in images[:20]])
        assert torch.equal(together, alone)


def test_mistakes(fitted):
    classifier, images, labels, _ = fitted
    diverged = images[:2].clone()
    diverged[1, 0, 3, 3] = float("nan")
    refuses(r"images of shape .* was fitted on \(B, ", classifier.predict, images[..., 1:])
    refuses("images of shape", classifier.accuracy, images[0], labels[:1])
    bytes_ = (images * 127 + 128).to(torch.uint8)
    refuses(r"torch.uint8: use floating point values in \[-1, 1\]", classifier.predict, bytes_)
    refuses("NaN or infinity", classifier.predict, diverged)
    refuses("NaN or infinity", classifier.predict, images[:2] + float("inf"))
    for wrong in (labels[:-1], labels[:, None]):
        refuses("use one label per image", classifier.accuracy, images, wrong)
    refuses("at least one image", classifier.accuracy, images[:0], labels[:0])


class TestFit:
    def test_the_seed_alone_decides(self):
        train = load_dataset("digits")
        images = load_dataset("digits", "validation").images
        images = images + 0.5 * noise(images)  # hard enough that fits differ
        first = fit_classifier(train, seed=1).predict(images)
        torch.manual_seed(99)
        assert torch.equal(fit_classifier(train, seed=1).predict(images), first)
        assert not torch.equal(fit_classifier(train, seed=2).predict(images), first)

    @pytest.mark.parametrize("name", ["digits", "shapes"])
    def test_the_global_random_state_is_left_alone(self, name, monkeypatch):
        monkeypatch.setattr("elit.networks.classifier._STEPS", 2)
        options = {"count": 20} if name == "shapes" else {}
        before = torch.get_rng_state()
        with torch.no_grad():  # as an evaluation might call it
            fit_classifier(load_dataset(name, **options))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("size", [9, 33, 64])
    def test_other_sizes_fit_too(self, size, monkeypatch):
        monkeypatch.setattr("elit.networks.classifier._STEPS", 2)
        dataset = load_dataset("shapes", count=30, size=size)
        images = dataset.batch(range(30))["images"]
        labels = fit_classifier(dataset).predict(images)
        assert labels.min() >= 0
        assert labels.max() < 10
