"""Statistics and scores: closed forms, brute force, constructed answers, and what they refuse.

`tests/test_scores_elsewhere.py` compares them with other people's libraries.
"""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import refuses
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elit.evaluation import frechet, scores
from elit.evaluation.frechet import Moments, bias_warning, frechet_distance, frechet_error
from elit.evaluation.scores import clip_score, inception_score, kernel_distance, precision_recall

F64 = torch.float64


def normal(count, width, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=F64).to(dtype)


def moments_of(*batches):
    moments = Moments()
    for batch in batches:
        moments.update(batch)
    return moments


def rotation(width, seed=5):
    return torch.linalg.qr(normal(width, width, seed))[0]


def distance_of(a, b):
    a, b = moments_of(a), moments_of(b)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def distance_by_scipy(a, b):
    """The formula as it stands, with scipy's square root of a matrix."""
    root = scipy.linalg.sqrtm((np.cov(a.T) @ np.cov(b.T)).astype(np.complex128)).real
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return gap + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * np.trace(root)


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor holds that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        made = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numbers = max(self.numbers, *made, 0)
        return result


@pytest.mark.parametrize(
    "score",
    [
        lambda real, generated: moments_of(real, generated),
        precision_recall,
        lambda real, generated: kernel_distance(real, generated, subsets=0),
    ],
)
def test_memory_is_that_of_a_tile_whatever_the_number_of_samples(score, monkeypatch):
    monkeypatch.setattr(scores, "_TILE", 64)
    monkeypatch.setattr(frechet, "_ROWS", 64)
    real, generated = normal(1000, 20), normal(1100, 20)  # five tiles, and a million pairs
    with Largest() as largest:
        score(real, generated)
    assert largest.numbers <= 64 * 64


# ---- moments ----


class TestMoments:
    @given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 7))
    def test_any_batches_give_what_numpy_gives_of_all_at_once(self, sizes, width):
        features = normal(sum(sizes) + 2, width)
        moments = moments_of(*features.split([*sizes, 2]))
        assert moments.count == len(features)
        np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12, atol=1e-14)
        expected = np.cov(features.T.numpy()).reshape(width, width)
        np.testing.assert_allclose(moments.covariance, expected, rtol=1e-11, atol=1e-13)

    @pytest.mark.parametrize("offset", [1e6, -1e8])
    def test_a_big_offset_costs_no_digits_of_the_covariance(self, offset):
        features = normal(5000, 6)
        shifted = features + offset
        exact = torch.from_numpy(np.cov((shifted - offset).T.numpy()))  # the shift rounds, once
        found = moments_of(*shifted.split(2501))  # more rows than are widened at once
        assert (found.covariance - exact).abs().max() < 1e-15 * abs(offset)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_narrow_features_are_widened_before_any_sum(self, dtype):
        features = (normal(300, 4) + 100).to(dtype)
        wide = moments_of(features.double())
        assert torch.equal(moments_of(features).covariance, wide.covariance)
        assert wide.covariance.dtype == F64

    def test_what_they_tell_is_a_copy(self):
        features = normal(3, 2)
        moments = moments_of(features)
        for value in (moments.mean, moments.covariance):
            value.zero_()
        assert torch.equal(features, normal(3, 2))  # nor are these changed
        assert torch.equal(moments.covariance, moments_of(features).covariance)
        assert torch.equal(moments.mean, moments_of(features).mean)

    def test_features_with_a_gradient_leave_no_graph(self):
        features = normal(3, 2).requires_grad_()
        assert not moments_of(features).covariance.requires_grad

    def test_none_and_one_sample_have_no_covariance(self):
        with pytest.raises(ValueError, match="the mean of no samples: update"):
            _ = Moments().mean
        for count in (0, 1):
            with pytest.raises(ValueError, match=f"at least 2 samples and there are {count}: "):
                _ = moments_of(normal(count, 3)).covariance

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("row", [0, 1500])
    def test_a_diverged_sample_is_named_and_nothing_is_taken_in(self, value, row):
        features = normal(1600, 3)
        moments = moments_of(features)
        features[row:, 1] = value
        refuses(f"NaN or infinity, first in row {row}: the model", moments.update, features)
        assert torch.equal(moments.covariance, moments_of(normal(1600, 3)).covariance)


# ---- Frechet distance ----


class TestFrechetDistance:
    @given(*[st.floats(-100, 100)] * 2, *[st.floats(0, 100)] * 2)
    def test_in_one_dimension(self, mean_a, mean_b, std_a, std_b):
        means = [torch.tensor([m], dtype=F64) for m in (mean_a, mean_b)]
        covs = [torch.tensor([[s * s]], dtype=F64) for s in (std_a, std_b)]
        found = frechet_distance(means[0], covs[0], means[1], covs[1])
        expected = (mean_a - mean_b) ** 2 + (std_a - std_b) ** 2
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-14 * (std_a + std_b) ** 2)

    @pytest.mark.parametrize("width", [3, 64, pytest.param(2048, marks=pytest.mark.slow)])
    def test_commuting_covariances(self, width):
        a = torch.logspace(1, -6, width, dtype=F64)
        b = torch.logspace(-4, 0.5, width, dtype=F64)
        turn, means = rotation(width), normal(2, width) / 10
        covs = [(turn * values) @ turn.T for values in (a, b)]
        covs = [(cov + cov.T) / 2 for cov in covs]
        expected = (means[0] - means[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
        found = frechet_distance(means[0], covs[0], means[1], covs[1])
        assert found == pytest.approx(float(expected), rel=1e-10)

    @pytest.mark.parametrize("counts", [(20, 30), (20, 200), (30, 30)])
    def test_fewer_samples_than_features(self, counts):
        """Of rank r in r of the dimensions: the others are left out and nothing changes."""
        width, inner = 100, 8
        low = [normal(n, inner, seed) @ normal(inner, inner, 7) for seed, n in enumerate(counts)]
        into = normal(width, width)[:inner]  # (8, 100)
        into = torch.linalg.qr(into.T)[0].T
        expected = distance_by_scipy(*(x.numpy() for x in low))
        assert distance_of(*(x @ into for x in low)) == pytest.approx(expected, rel=1e-10)

    # As many samples as features: short of full rank by one, which a few pass for by rounding.
    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("counts", [(40, 60, 90), (6, 18, 6), (12, 36, 12), (48, 144, 48)])
    def test_singular_ones_by_their_singular_values(self, counts, seed):
        """The trace is a nuclear norm of samples, which numpy knows."""
        m, n, width = counts
        a, b = normal(m, width, seed), normal(n, width, seed + 100) * 1.5
        k, left = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
        expected = (a.mean(0) - b.mean(0)).square().sum() + k.square().sum() + left.square().sum()
        expected -= 2 * np.linalg.norm((k @ left.T).numpy(), "nuc")
        assert distance_of(a, b) == pytest.approx(float(expected), rel=1e-12)

    @pytest.mark.parametrize("count", [2, 100, 255, 256, 257, 3000])
    def test_equal_ones_are_at_zero(self, count):
        """Around full rank, over eight decades of variance, where roots lose half the digits."""
        features = normal(count, 256) * torch.logspace(0.5, -3.5, 256, dtype=F64) @ rotation(256)
        moments = moments_of(features)
        mean, cov = moments.mean, moments.covariance
        assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-13 * cov.trace()

    @pytest.mark.parametrize("count", [100, 256, 257, 3000])
    def test_nearly_equal_ones_are_told_apart(self, count):
        """Scaling samples by 1 + e moves them by e^2 of the trace: here 1e-10 of it."""
        features = normal(count, 256) * torch.logspace(0.5, -3.5, 256, dtype=F64) @ rotation(256)
        features -= features.mean(0)
        expected = 1e-10 * moments_of(features).covariance.trace()
        found = distance_of(features, features * (1 + 1e-5))
        assert found == pytest.approx(float(expected), rel=1e-3)

    @given(st.integers(2, 12), st.integers(2, 30), st.integers(2, 30))
    def test_symmetric_and_never_negative(self, width, count_a, count_b):
        a, b = normal(count_a, width), normal(count_b, width, 1) * 2
        assert distance_of(a, b) == pytest.approx(distance_of(b, a), rel=1e-10)
        assert distance_of(a, b) >= 0

    def test_rotations_and_shifts_leave_it_and_scales_square_it(self):
        a, b, turn = normal(90, 20), normal(80, 20, 1) * 2, rotation(20)
        distance = distance_of(a, b)
        assert distance_of(a @ turn, b @ turn) == pytest.approx(distance, rel=1e-10)
        assert distance_of(a + 50, b + 50) == pytest.approx(distance, rel=1e-10)
        assert distance_of(a * 100, b * 100) == pytest.approx(distance * 1e4, rel=1e-10)

    def test_float32_statistics_will_do(self):
        a, b = (moments_of(normal(50, 200, seed)) for seed in range(2))  # singular
        exact = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
        rounded = [x.float() for x in (a.mean, a.covariance, b.mean, b.covariance)]
        assert frechet_distance(*rounded) == pytest.approx(exact, rel=1e-2)


# ---- its standard error ----


def test_the_error_of_one_number_is_its_closed_form() -> None:
    """(m - n)^2 + (s - t)^2 of deviations s and t changes by 2 (m - n) d + d^2 (1 - t / s)."""
    x = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    a, n, t = moments_of(x), torch.tensor([0.5]).double(), 2.0
    d, s = x[:, 0] - x.mean(), x.std()
    change = 2 * (x.mean() - n) * d + d**2 * (1 - t / s)
    found = frechet_error(x.split(20), a.mean, a.covariance, n, torch.tensor([[t**2]]).double())
    assert found == pytest.approx(float(change.std() / 50**0.5), rel=1e-9)


def test_the_error_is_what_other_samples_change() -> None:
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 4, dtype=torch.float64, generator=draw)
    mean, cov = torch.full((4,), 0.3).double(), torch.eye(4).double() + mixing @ mixing.T / 9
    found = []
    for _ in range(200):
        x = torch.randn(300, 4, dtype=torch.float64, generator=draw) @ mixing
        a = moments_of(x)
        both = a.mean, a.covariance, mean, cov
        found.append((frechet_distance(*both), frechet_error([x], *both)))
    distances, errors = torch.tensor(found).T
    assert errors.mean() == pytest.approx(float(distances.std()), rel=0.15)


def test_the_error_of_few_samples_is_a_number() -> None:
    few = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for x in (few, few[:1].repeat(3, 1)):  # of a rank of 2, and of 0
        a = moments_of(x)
        error = frechet_error([x], a.mean, a.covariance, torch.zeros(8), torch.eye(8))
        assert 0 <= error < 10


def test_too_few_samples_are_told_with_the_number_needed():
    assert bias_warning(2049, 2048) is None
    message = bias_warning(2048, 2048, "generated images")
    assert message.startswith("2048 generated images for features of 2048 numbers: ")
    assert "use at least 2049 " in message
    # And it is true: one sample more than features is what full rank takes.
    assert torch.linalg.matrix_rank(moments_of(normal(13, 12)).covariance) == 12
    assert torch.linalg.matrix_rank(moments_of(normal(12, 12)).covariance) == 11


# ---- Inception Score ----


class TestInceptionScore:
    def test_sure_and_balanced_scores_the_number_of_classes(self):
        logits = 1e4 * torch.eye(10).repeat(6, 1)  # so sure that the others' share is 0
        assert inception_score(logits) == (pytest.approx(10, rel=1e-12), 0)

    @pytest.mark.parametrize(("count", "splits"), [(3, 1), (4, 1), (7, 1), (8, 2), (11, 2)])
    def test_a_remainder_is_no_split_of_its_own(self, count, splits):
        logits = normal(count, 4) * 3
        parts = [inception_score(part).mean for part in logits.tensor_split(splits)]
        found = inception_score(logits, split_size=4)
        assert found == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-12)


# ---- precision and recall ----


def by_brute_force(real, generated, k):
    """Every pair by its difference in float64, every ball of every sample."""

    def squared(a, b):
        return ((a.double()[:, None] - b.double()[None]) ** 2).sum(-1)

    def radii(x):
        distances = squared(x, x)
        distances[range(len(x)), range(len(x))] = math.inf
        return distances.sort(dim=1).values[:, k - 1]

    pairs = squared(generated, real)  # (N, M)
    in_real, in_generated = pairs <= radii(real), pairs <= radii(generated)[:, None]
    return (
        in_real.any(1).double().mean().item(),
        in_generated.any(0).double().mean().item(),
        in_real.double().sum(1).mean().item() / k,
        in_real.any(0).double().mean().item(),
    )


CLOUDS = {
    "overlapping": lambda: (normal(70, 5), normal(90, 5, 1) * 1.2 + 0.4),
    "apart": lambda: (normal(40, 3), normal(50, 3, 1) + 100),
    "float32, far off": lambda: (
        normal(60, 8, 0, torch.float32) + 1000,
        normal(80, 8, 1, torch.float32) + 1000.5,
    ),
    "copies": lambda: (normal(60, 4), normal(60, 4)),
    "half copies": lambda: (normal(60, 4), torch.cat([normal(60, 4)[:30], normal(30, 4, 1)])),
    "a grid full of ties": lambda: (
        torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)),
        torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)) + torch.tensor([1.0, 0.0]),
    ),
    "duplicates": lambda: (
        normal(8, 3).repeat_interleave(6, 0),
        torch.cat([normal(8, 3)[:4].repeat_interleave(7, 0), normal(9, 3, 1)]),
    ),
    "one picture over and over": lambda: (normal(50, 6), normal(1, 6, 2).repeat(40, 1)),
    "all the same": lambda: (normal(1, 6).repeat(20, 1), normal(1, 6).repeat(30, 1)),
    "far off": lambda: (normal(60, 4) + 1e7, normal(70, 4, 1) + 1e7),
    "far off and apart": lambda: (normal(60, 4) + 1e6, normal(70, 4, 1) - 1e6),
    "tight clusters": lambda: (
        torch.cat([normal(30, 4) * 1e-3, normal(30, 4) * 1e-3 + 10]),
        torch.cat([normal(30, 4, 1) * 1e-3, normal(30, 4, 2) * 1e-3 - 10]),
    ),
}


class TestPrecisionRecall:
    @pytest.mark.parametrize("k", [1, 3, 5])
    @pytest.mark.parametrize("name", CLOUDS)
    @pytest.mark.parametrize("tile", [2048, 7])
    def test_it_is_what_brute_force_says(self, name, k, tile, monkeypatch):
        monkeypatch.setattr(scores, "_TILE", tile)
        real, generated = CLOUDS[name]()
        expected = by_brute_force(real, generated, k)
        assert precision_recall(real, generated, k) == pytest.approx(expected, rel=1e-12)

    @given(st.integers(0, 10**6), st.integers(1, 4), st.integers(5, 30), st.integers(5, 30))
    def test_and_on_random_whole_numbers_where_most_distances_are_ties(self, seed, k, m, n):
        generator = torch.Generator().manual_seed(seed)
        real, generated = (
            torch.randint(0, 4, (count, 3), generator=generator).double() / 3 for count in (m, n)
        )
        expected = by_brute_force(torch.round(real * 3), torch.round(generated * 3), k)
        assert precision_recall(real, generated, k) == pytest.approx(expected, rel=1e-12)

    def test_any_ball_counts_not_only_the_nearest_sample_s(self):
        # The generated 1.5 is nearest to the real 1, whose ball reaches 0.1; that of 4 reaches 3.
        real = torch.tensor([[1.0], [1.1], [4.0], [7.0]])
        generated = torch.tensor([[1.5], [1.5]])
        assert precision_recall(real, generated, k=1).precision == 1
        assert precision_recall(real[:2], generated, k=1).precision == 0

    def test_a_line_whose_answer_is_known(self):
        real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # radii 1, 1, 1, 8
        generated = torch.tensor([[-1.0], [-1.5], [2.5], [19.0]])  # radii 0.5, 0.5, 3.5, 16.5
        # -1 is on the edge of 0's ball, and 19 lies 9 from 10. Of the real ones all are within the
        # balls of 2.5 or 19.
        found = precision_recall(real, generated, k=1)
        assert found.precision == 0.5
        assert found.recall == 1
        assert found.density == 3 / 4  # -1 in one ball, 2.5 in those of 2 and, on 8 of reach, 10
        assert found.coverage == 3 / 4  # all but 1


# ---- kernel distance ----


def by_double_loop(real, generated):
    def kernel(x, y):
        return (float(np.dot(x, y)) / len(x) + 1) ** 3

    def within(xs):
        pairs = [kernel(x, y) for i, x in enumerate(xs) for j, y in enumerate(xs) if i != j]
        return np.mean(pairs)

    real, generated = real.double().numpy(), generated.double().numpy()
    between = np.mean([kernel(x, y) for x in real for y in generated])
    return within(real) + within(generated) - 2 * between


class TestKernelDistance:
    @pytest.mark.parametrize("tile", [2048, 7])
    @pytest.mark.parametrize("dtype", [F64, torch.float32])
    def test_it_is_what_a_double_loop_says(self, tile, dtype, monkeypatch):
        monkeypatch.setattr(scores, "_TILE", tile)
        real, generated = normal(30, 5, 0, dtype), normal(24, 5, 1, dtype) * 1.5 + 0.3
        found = kernel_distance(real, generated)
        assert found == (pytest.approx(by_double_loop(real, generated), rel=1e-10), None)
        assert kernel_distance(real, real).value == pytest.approx(by_double_loop(real, real))

    def test_the_closed_form_of_shifted_points(self):
        # All real samples at 0, all others at c: 1 + (c^2 + 1)^3 - 2.
        found = kernel_distance(torch.zeros(5, 1), torch.full((4, 1), 2.0))
        assert found.value == pytest.approx(1 + 125 - 2, rel=1e-14)

    def test_subsets_as_large_as_the_sets_are_the_sets(self):
        real, generated = normal(40, 5), normal(40, 5, 1) + 0.2
        whole = kernel_distance(real, generated, subsets=0)
        found = kernel_distance(real, generated, subsets=3, subset_size=40)
        assert found == pytest.approx((whole.value, 0), rel=1e-12, abs=1e-14)

    def test_the_seed_alone_decides(self):
        real, generated = normal(60, 5), normal(60, 5, 1)
        first = kernel_distance(real, generated, 5, 20, seed=1)
        torch.manual_seed(99)
        before = torch.get_rng_state()
        assert kernel_distance(real, generated, 5, 20, seed=1) == first
        assert kernel_distance(real, generated, 5, 20, seed=2) != first
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_usual_protocol_comes_with_enough_samples(self):
        real, generated = normal(50, 3), normal(40, 3, 1)
        assert kernel_distance(real, generated, subset_size=41).std is None
        usual = kernel_distance(real, generated, subset_size=40)
        assert usual == kernel_distance(real, generated, subsets=100, subset_size=40)


# ---- CLIP score ----


class TestClipScore:
    def test_angles_that_are_known(self):
        images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [1.0, 0.0]])
        texts = torch.tensor([[5.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        expected = 100 * (1 + 0 + math.sqrt(0.5) + 0) / 4  # an opposite counts 0, not -1
        assert clip_score(images, texts) == pytest.approx(expected, rel=1e-12)

    def test_lengths_say_nothing(self):
        images, texts = normal(9, 5), normal(9, 5, 1)
        found = clip_score(images * 1e3, texts * 1e-3)
        assert found == pytest.approx(clip_score(images, texts), rel=1e-12)


# ---- mistakes ----


def distance_with(place, value):
    statistics = [torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(2)]
    statistics[place] = value
    return frechet_distance(*statistics)


def update(features):
    moments_of(normal(2, 4)).update(features)


NAN, N = torch.tensor([[0.0, math.nan]]), normal(9, 2)


@pytest.mark.parametrize(
    ("score", "given_", "message"),
    [
        (update, (torch.ones(3),), r"shape \(3,\): \(n, d\) is needed"),
        (update, (torch.ones(3, 2, 1),), "flatten the rest"),
        (update, (torch.ones(3, 0),), r"shape \(3, 0\)"),
        (update, (torch.ones(3, 4, dtype=torch.uint8),), "torch.uint8: use floating point values"),
        (update, (torch.ones(3, 5),), "5 wide and those beside them 4: use one network"),
        (distance_with, (0, torch.zeros(2, 1)), r"mean_a of shape \(2, 1\): a mean is \(d,\)"),
        (distance_with, (3, torch.eye(3)), r"cov_b of shape \(3, 3\) beside .*: .* here \(2, 2\)"),
        (distance_with, (1, torch.ones(2)), r"cov_a of shape \(2,\)"),
        (distance_with, (2, NAN[0]), "mean_b holds NaN or infinity"),
        (distance_with, (1, torch.eye(2) * math.inf), "cov_a holds NaN or infinity"),
        (distance_with, (3, torch.tensor([[1.0, 0.1], [0.0, 1.0]])), "cov_b is not symmetric"),
        (distance_with, (1, torch.tensor([[1, 0], [0, -0.5]])), "cov_a has the eigenvalue -0.5 b"),
        (distance_with, (3, -torch.eye(2)), "a covariance has none below 0"),
        (
            lambda: frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3)),
            (),
            "means of 2 and 3 numbers: compare statistics",
        ),
        (inception_score, (torch.ones(0, 4),), "0 logits: at least 1 are needed"),
        (inception_score, (torch.ones(4),), r"logits of shape \(4,\)"),
        (inception_score, (NAN,), "logits hold NaN or infinity"),
        (inception_score, (torch.ones(2, 4, dtype=torch.int64),), "use floating point"),
        (inception_score, (normal(9, 4).softmax(1),), "probabilities already: give what came"),
        (inception_score, (torch.ones(2, 4), 0), "split_size=0: use a whole number from 1 up"),
        (precision_recall, (N[:3], N), "3 real samples: at least 4 are needed for k=3; make"),
        (precision_recall, (N, N[:5], 5), "5 generated samples: at least 6 are needed for k=5"),
        (precision_recall, (N, normal(9, 3)), "generated features are 3 wide and those .* 2: use"),
        (precision_recall, (N, N / 0), "generated features hold NaN or infinity, first"),
        (precision_recall, (N, N, 0), "k=0: use a whole number from 1 up"),
        (precision_recall, (N, N, 2.5), r"k=2\.5: use a whole number"),
        (kernel_distance, (N[:1], N), "1 real samples: at least 2 are needed"),
        (kernel_distance, (N, N[:1]), "1 generated samples: at least 2 are needed"),
        (kernel_distance, (N, N, 5), "subsets of 1000 from 9 samples: use a smaller subset_size"),
        (kernel_distance, (N, N, 0, 1), "subset_size=1: use a whole number from 2 up"),
        (kernel_distance, (N, N, -1), "subsets=-1: use a whole number from 1 up, or 0 for all"),
        (kernel_distance, (N, normal(9, 4)), "generated features are 4 wide"),
        (kernel_distance, (N * math.nan, N), "real features hold NaN or infinity"),
        (clip_score, (N[:3], N[:2]), "3 images and 2 texts: give each image the text"),
        (clip_score, (N, normal(9, 5)), "text_embeddings are 5 wide and those beside them 2"),
        (clip_score, (N[:0], N[:0]), "0 image_embeddings: at least 1 are needed"),
        (clip_score, (N, N * 0), "row 0 has an embedding of zeros"),
        (clip_score, (N * math.inf, N), "image_embeddings hold NaN or infinity"),
    ],
)
def test_mistakes(score, given_, message):
    refuses(message, score, *given_)
