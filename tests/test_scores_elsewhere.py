"""The scores beside other people's implementations, torchmetrics and prdc, on the same features.

torchmetrics gets an identity for its feature network, so that its images are our features.
"""

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from elit.evaluation.frechet import Moments, frechet_distance
from elit.evaluation.scores import inception_score, kernel_distance, precision_recall

WIDTH = 48
pytestmark = [
    pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features"),
    pytest.mark.filterwarnings("ignore:std.*degrees of freedom"),  # of a single split
]


class Identity(nn.Module):
    num_features = WIDTH

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def as_images(features):
    return features[:, :, None, None]


@pytest.fixture(scope="module")
def sets():
    """Real and generated features, float32, skewed and of different spread, as networks' are."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    real = (torch.randn(700, WIDTH, generator=generator) @ mix).relu()
    generated = (torch.randn(600, WIDTH, generator=generator) @ mix * 1.2 + 0.1).relu()
    return real, generated


def test_frechet_distance_is_that_of_torchmetrics(sets):
    metric = FrechetInceptionDistance(feature=Identity(), input_img_size=(WIDTH, 1, 1))
    metric.set_dtype(torch.float64)
    moments = []
    for features, is_real in zip(sets, (True, False), strict=True):
        moments.append(Moments())
        for batch in features.split(90):
            metric.update(as_images(batch), real=is_real)
            moments[-1].update(batch)
    a, b = moments
    found = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert found == pytest.approx(metric.compute().item(), rel=1e-6)


def test_kernel_distance_is_that_of_torchmetrics(sets):
    real, generated = sets[0][:600], sets[1]
    metric = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=600)
    metric.update(as_images(real.double()), real=True)
    metric.update(as_images(generated.double()), real=False)
    expected, _ = metric.compute()  # the only subset is the set
    assert kernel_distance(real, generated).value == pytest.approx(expected.item(), rel=1e-4)


def test_the_spread_over_subsets_is_that_of_torchmetrics(sets):
    metric = KernelInceptionDistance(feature=Identity(), subsets=400, subset_size=100)
    metric.update(as_images(sets[0]), real=True)
    metric.update(as_images(sets[1]), real=False)
    expected, spread = (x.item() for x in metric.compute())
    value, std = kernel_distance(*sets, subsets=400, subset_size=100)
    assert abs(value - expected) < 4 * spread * (2 / 400) ** 0.5  # other draws
    assert std == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("splits", [1, 5])
def test_inception_score_is_that_of_torchmetrics(splits):
    logits = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(1)) * 4
    metric = InceptionScore(feature=Identity(), splits=splits)
    metric.update(as_images(logits))
    torch.manual_seed(3)
    mean, std = (x.item() for x in metric.compute())
    torch.manual_seed(3)
    shuffled = logits[torch.randperm(500)]  # it shuffles, with the global generator
    found = inception_score(shuffled, split_size=500 // splits)
    assert found.mean == pytest.approx(mean, rel=1e-4)
    if splits > 1:  # theirs is over splits - 1
        assert found.std * (splits / (splits - 1)) ** 0.5 == pytest.approx(std, rel=1e-4)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_and_coverage_are_those_of_prdc(sets, k):
    expected = compute_prdc(*(x.numpy().astype(np.float64) for x in sets), nearest_k=k)
    found = precision_recall(*sets, k=k)
    assert found._asdict() == pytest.approx({key: float(x) for key, x in expected.items()}, 1e-4)
