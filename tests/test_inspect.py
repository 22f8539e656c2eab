"""Looking inside: maps against independent ones, correlations and their control, the command."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ELASTIC, TINY_ELASTIC, ReferenceDiT, randomise, refuses, tiny_dit, tiny_elastic
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from elit import ElitPipeline, ElitTextPipeline, create_model, elasticize, make_scheduler
from elit.cli.main import main
from elit.inspection.correlation import controlled, correlation_matrix, derangements, position_share
from elit.inspection.inspector import (
    Inspector,
    Subject,
    Worth,
    draw_at_budgets,
    in_raster_order,
    spread,
    squares_of_tokens,
    token_grid,
)
from elit.inspection.left_out import leave_out
from elit.inspection.numbers import (
    correlations,
    mean_over_levels,
    numbers_of_core,
    numbers_of_maps,
    numbers_of_worth,
)
from elit.inspection.sheets import told_of_worth
from elit.viz.charts import Chart, Line, picture
from elit.viz.heatmaps import Column, colour_bar, colours, heatmap, map_sheet, overlay
from elit.viz.sheet import stack


def make_subject(model, count: int = 3, **settings) -> Subject:
    draw = torch.Generator().manual_seed(7)
    images = torch.randn(count, model.in_channels, *model.sample_size, generator=draw)
    return Subject(images, model.example_condition(count), **settings)


# ---- correlations ----


def correlate(one: Tensor, other: Tensor, seed: int = 0, **options):
    return controlled(correlation_matrix(one, other, **options), seed)


def random_maps(count: int = 4, groups: int = 3, tokens: int = 5, ties: bool = False) -> Tensor:
    maps = torch.randn(count, groups, tokens)
    return (maps * 2).round() if ties else maps


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_scipys(ties: bool) -> None:
    from scipy import stats

    one, other = random_maps(ties=ties), random_maps(ties=ties)
    for rank, name in ((False, "pearsonr"), (True, "spearmanr")):
        found = correlation_matrix(one, other, rank=rank)
        for i in range(4):
            for j in range(4):
                wanted = getattr(stats, name)(one[i].flatten(), other[j].flatten())[0]
                assert float(found[i, j]) == pytest.approx(wanted, abs=1e-6)


def test_correlations_within_groups_are_those_of_what_is_left_without_the_groups_means() -> None:
    from scipy import stats

    one, other = random_maps(), random_maps()
    ranks = [[stats.rankdata(group) for group in image] for image in one.numpy()]
    others = [[stats.rankdata(group) for group in image] for image in other.numpy()]
    for rank, (a, b) in enumerate(((one.numpy(), other.numpy()), (ranks, others))):
        found = correlation_matrix(one, other, rank=bool(rank), within_groups=True)
        for i in range(4):
            rows = [np.concatenate([g - np.mean(g) for g in maps[i]]) for maps in (a, b)]
            assert float(found[i, i]) == pytest.approx(np.corrcoef(*rows)[0, 1], abs=1e-6)


@given(st.integers(0, 1000))
def test_what_differs_between_groups_alone_changes_nothing_within_them(seed: int) -> None:
    torch.manual_seed(seed)
    one, other, shift = random_maps(), random_maps(), 10 * torch.randn(4, 3, 1)
    for rank in (False, True):
        options = {"rank": rank, "within_groups": True}
        before = correlation_matrix(one, other, **options)
        assert torch.allclose(correlation_matrix(one, other + shift, **options), before, atol=1e-5)
    assert not torch.allclose(
        correlation_matrix(one, other + shift), correlation_matrix(one, other)
    )


def test_a_pattern_of_position_is_as_high_on_shuffled_images() -> None:
    pattern = torch.randn(1, 3, 5)
    found = correlate(pattern.expand(6, -1, -1), pattern.expand(6, -1, -1) * 2 + 1)
    assert found.value == pytest.approx(1)
    assert (found.shuffled, found.shuffled_std) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    assert (found.p, found.images) == (1, 6)
    # Also where only one of the maps is the same on every image.
    found = correlate(pattern.expand(6, -1, -1), random_maps(6))
    assert found.value == pytest.approx(found.shuffled)
    assert found.p == 1


def test_what_goes_with_the_image_is_far_above_its_control() -> None:
    one, pattern = random_maps(12, 4, 16), torch.randn(1, 4, 16)
    other = one + 0.5 * random_maps(12, 4, 16)
    found = correlate(one + pattern, other + pattern)
    assert found.value > found.shuffled + 5 * found.shuffled_std
    assert found.p == 1 / 1000
    assert 0.2 < found.shuffled < 0.7  # the pattern's share
    # The exact mean of all pairs of different images, by loops.
    pairs = [
        np.corrcoef((one + pattern)[i].flatten(), (other + pattern)[j].flatten())[0, 1]
        for i in range(12)
        for j in range(12)
        if i != j
    ]
    assert found.shuffled == pytest.approx(np.mean(pairs), abs=1e-6)


def test_by_chance_p_is_low_as_often_as_it_says() -> None:
    p = [correlate(random_maps(8), random_maps(8), seed=seed).p for seed in range(60)]
    assert sum(value < 0.1 for value in p) <= 14  # 6 are expected; 15 would be one in 2000
    assert 0.35 < np.mean(p) < 0.65


def test_a_map_without_variation_correlates_with_nothing() -> None:
    flat = torch.full((4, 3, 5), 0.1) + 1e-8 * random_maps()  # float32 noise
    for options in ({}, {"rank": True}, {"within_groups": True}):
        found = correlate(flat, random_maps(), **options)
        assert (found.value, found.shuffled, found.p, found.images) == (None, None, None, 0)
    # One such image among others is left out.
    one, other = random_maps(), random_maps()
    one[2] = 1
    kept = torch.tensor([0, 1, 3])
    found, wanted = correlate(one, other), correlate(one[kept], other[kept])
    assert (found.p, found.images) == (wanted.p, 3)
    assert found.value == pytest.approx(wanted.value)
    assert found.shuffled == pytest.approx(wanted.shuffled)
    found = correlate(random_maps(1), random_maps(1))
    assert (found.shuffled, found.images) == (None, 1)
    # Within groups, a group of equal values says nothing, the others do.
    steps = torch.arange(5.0).expand(4, 3, 5).clone()
    steps[:, 0] = 3
    assert correlate(steps, steps, within_groups=True).value == pytest.approx(1)


def test_shuffles_leave_nothing_in_its_place() -> None:
    orders = derangements(3, 200, seed=1)
    assert not (orders == torch.arange(3)).any()
    assert {tuple(order) for order in orders.tolist()} == {(1, 2, 0), (2, 0, 1)}
    assert torch.equal(orders, derangements(3, 200, seed=1))


def test_the_share_of_position() -> None:
    pattern = torch.randn(1, 400)
    noise = torch.randn(5, 400)
    assert position_share(pattern.expand(5, -1)) == pytest.approx(1)
    assert position_share(noise) < 0.05  # the mean map of five has a fifth by chance
    share = position_share(2 * pattern + noise)
    assert share == pytest.approx(float(4 * pattern.var() / (4 * pattern.var() + 1)), abs=0.05)
    # A map that is larger everywhere says nothing about position.
    level = 100 * torch.randn(5, 1)
    assert position_share(2 * pattern + noise + level) == pytest.approx(share, abs=1e-4)
    assert position_share(torch.ones(5, 400)) is None
    refuses("of two or more", position_share, noise[:1])


# ---- maps ----


def in_patches(model, values: Tensor) -> Tensor:
    """Means over patches, raster order (B, *tokens), by numpy alone."""
    squares = values.square().mean(1).numpy()  # (B, *space)
    for axis, patch in enumerate(model.patch_size, start=1):
        parts = np.stack([np.take(squares, range(i, squares.shape[axis], patch), axis)
                          for i in range(patch)])  # fmt: skip
        squares = parts.mean(0)
    return torch.from_numpy(squares)


def test_attention_and_loss_are_the_reference_s() -> None:
    model = tiny_elastic(patch_size=2, group=2, sample_size=(8, 4))
    reference, subject = ReferenceDiT(model), make_subject(model)
    inspector = Inspector(model, subject)
    (found,) = inspector.maps(0.6, [3], shown=1)
    grid = inspector.grid
    attention, loss, latents = torch.zeros(3, 4, 2), torch.zeros(3, 4, 2), torch.zeros(3, 3, 4, 2)
    for batch in subject.batches(torch.device("cpu"), 4):
        level = torch.full((len(batch.rows),), 0.6)
        x = 0.4 * batch.images + 0.6 * batch.noise
        labels = batch.condition["class_labels"]
        velocity = reference(x, level, labels, 3)
        error = in_patches(model, velocity.float() - (batch.noise - batch.images))
        loss.index_add_(0, batch.rows, error / 4)
        weights = torch.zeros(len(x), 3, 8)  # in raster order
        of_groups = zip(reference.groups((4, 2)), reference.seen["read.attention"], strict=True)
        for members, seen in of_groups:
            weights[:, :, members] = seen.mean(1).float()  # over heads
        attention.index_add_(0, batch.rows, weights.sum(1).view(-1, 4, 2) / 4)
        latents.index_add_(0, batch.rows, weights.view(-1, 3, 4, 2) / 4)
    assert torch.allclose(in_raster_order(found.mean("loss"), grid), loss, rtol=1e-4)
    assert torch.allclose(in_raster_order(found.mean("attention"), grid), attention, atol=1e-5)
    assert torch.allclose(in_raster_order(found.shown, grid)[0], latents[0], atol=1e-5)
    assert torch.allclose(in_raster_order(found.latents, grid), latents.mean(0), atol=1e-5)
    assert torch.allclose(found.attention.sum(-1), torch.tensor(3.0))  # a group's tokens share n


@pytest.mark.parametrize("name", ELASTIC)
def test_every_backbone_s_maps_are_sums_of_what_they_show(name: str) -> None:
    model = ELASTIC[name]()
    subject = make_subject(model, draws=2)
    inspector = Inspector(model, subject)
    few = max(1, model.max_latents // 4)
    full, low = inspector.maps(0.5, [model.max_latents, few])
    assert full.difference is None
    for maps in (full, low):
        shape = maps.mean("loss").shape
        assert shape == (3, inspector.grid.num_groups, model.max_latents)
        each = maps.attention.sum(-1)
        assert torch.allclose(each, torch.full_like(each, maps.num_latents), rtol=1e-4)
        assert maps.mean("attention").mean(0) == pytest.approx(maps.latents.sum(0), abs=1e-4)
        assert (maps.entropy <= math.log(model.max_latents) + 1e-5).all()
    # By hand, from the same noise: a low budget's velocity less the full one's, and the loss.
    loss, difference = torch.zeros(3), torch.zeros(3)
    with torch.no_grad():
        for batch in subject.batches(torch.device("cpu"), 2):
            x = torch.lerp(batch.images, batch.noise, 0.5)
            level = torch.full((len(x),), 0.5)
            velocities = [
                model(x, level, **batch.condition, num_latents=n).sample
                for n in (model.max_latents, few)
            ]
            error = velocities[1] - (batch.noise - batch.images)
            loss.index_add_(0, batch.rows, error.square().flatten(1).mean(1) / 2)
            error = velocities[1] - velocities[0]
            difference.index_add_(0, batch.rows, error.square().flatten(1).mean(1) / 2)
    assert torch.allclose(low.mean("loss").mean((1, 2)), loss, rtol=1e-4)
    assert torch.allclose(low.mean("difference").mean((1, 2)), difference, rtol=1e-4)


@pytest.mark.parametrize("size", [(8, 4), (2, 4, 8)])
def test_a_loss_of_position_lies_where_the_data_is(size: tuple[int, ...]) -> None:
    """A model that says 0 has the loss (noise - data)^2: it is high where the data is bright."""
    group = (1,) * (len(size) - 2) + (2, 2)
    model = tiny_elastic(sample_size=size, group=group, hidden_size=36)
    torch.nn.init.zeros_(model.project.linear.weight)
    torch.nn.init.zeros_(model.project.linear.bias)
    bright = torch.arange(math.prod(size)).float().view(1, 1, *size).expand(4, 2, *size) * 3
    subject = Subject(bright.contiguous(), model.example_condition(4))
    inspector = Inspector(model, subject)
    (found,) = inspector.maps(0.3, [2])
    wanted = torch.zeros(4, *size)
    for batch in subject.batches(torch.device("cpu"), 4):
        wanted.index_add_(0, batch.rows, in_patches(model, batch.noise - batch.images) / 4)
    loss = in_raster_order(found.mean("loss"), inspector.grid)
    assert torch.allclose(loss, wanted, rtol=1e-4)
    numbers = numbers_of_maps(found, 2 / 4)
    assert numbers["position_share"]["loss"] > 0.99
    # The loss is a pattern of position: its correlation with anything says nothing, and shows it.
    spearman = numbers["attention_loss"]["spearman"]
    assert spearman["value"] == pytest.approx(spearman["shuffled"], abs=0.05)


def test_uniform_attention_is_null_not_nan() -> None:
    model = tiny_elastic()
    torch.nn.init.zeros_(model.read.attention.to_q.weight)
    torch.nn.init.zeros_(model.read.attention.to_q.bias)
    (found,) = Inspector(model, make_subject(model)).maps(0.5, [4])
    assert torch.allclose(found.attention, torch.tensor(4 / 16))
    assert torch.allclose(found.entropy, torch.tensor(math.log(16)))
    numbers = numbers_of_maps(found, 0.25)
    for kind in numbers["attention_loss"].values():
        kind |= {f"other {name}": value for name, value in kind.pop("other_noise").items()}
        assert {kind[name] for name in kind if "images" not in name} == {None}
    assert numbers["position_share"]["attention"] is None
    assert numbers["position_share"]["loss"] is not None
    json.dumps(numbers, allow_nan=False)


def test_maps_depend_on_the_seed_and_not_on_the_batch() -> None:
    model = tiny_elastic()
    (one,) = Inspector(model, make_subject(model)).maps(0.5, [4], 2)
    (other,) = Inspector(model, make_subject(model, batch_size=5)).maps(0.5, [4], 2)
    (third,) = Inspector(model, make_subject(model, seed=1)).maps(0.5, [4], 2)
    for name in ("loss", "attention", "difference", "latents", "shown", "entropy"):
        values = [getattr(maps, name) for maps in (one, other, third)]
        assert torch.allclose(values[0], values[1], rtol=1e-3, atol=0), name
        assert not torch.equal(values[0], values[2]), name
    assert not torch.allclose(one.loss[0], one.loss[1])  # halves have noise of their own


def test_what_two_maps_see_in_one_noise_is_told_from_what_they_see_in_an_image() -> None:
    of_image, of_noise = torch.randn(1, 12, 4, 8), torch.randn(2, 12, 4, 8)
    one, other = (torch.randn(2, 12, 4, 8) for _ in range(2))
    for kind in correlations(one + 2 * of_noise, other + 2 * of_noise, 0).values():
        assert kind["value"] > 0.5
        assert kind["p"] == 1 / 1000  # a control by shuffled images alone is fooled
        assert abs(kind["other_noise"]["value"]) < 0.2
        assert kind["other_noise"]["p"] > 0.005
    for kind in correlations(one + 2 * of_image, other + 2 * of_image, 0).values():
        assert kind["other_noise"]["value"] > 0.5
        assert kind["other_noise"]["p"] == 1 / 1000
    assert correlations(None, other, 0) is None


# ---- latents ----


def test_leaving_out_the_last_latent_is_keeping_the_others() -> None:
    model = tiny_elastic()
    subject = make_subject(model, draws=2)
    inspector = Inspector(model, subject)
    worth = inspector.worth(0.5)
    assert list(worth.first) == list(range(1, 17))
    assert list(worth.without) == list(range(16))
    assert torch.allclose(worth.without[15], worth.first[15], rtol=1e-5)
    assert not torch.allclose(worth.without[0], worth.first[15], rtol=1e-4)
    # By hand, of the one draw that it uses.
    wanted = torch.zeros(3)
    kept = torch.tensor([i for i in range(16) if i != 6])
    with torch.no_grad():
        for batch in subject.batches(torch.device("cpu"), 1):
            x = torch.lerp(batch.images, batch.noise, 0.5)
            level, labels = torch.full((len(x),), 0.5), batch.condition["class_labels"]
            options = {"num_latents": 15, "latent_indices": kept}
            error = model(x, level, labels, **options).sample - (batch.noise - batch.images)
            wanted.index_add_(0, batch.rows, error.square().flatten(1).mean(1))
    assert torch.allclose(worth.without[6], wanted, rtol=1e-5)


def test_latents_that_nothing_reads_cost_nothing() -> None:
    model = tiny_elastic()
    torch.nn.init.zeros_(model.write.modulation.linear.weight)  # its gate is shut
    torch.nn.init.zeros_(model.write.modulation.linear.bias)
    worths = [Inspector(model, make_subject(model, draws=2)).worth(s) for s in (0.2, 0.8)]
    for row in (*numbers_of_worth(worths)["first"], *numbers_of_worth(worths)["without"]):
        assert row["cost"] == row["cost_error"] == 0
    for worth in worths:  # so shut, the core is worth nothing, and all that differs is unheard
        core = numbers_of_core(worth)
        for part in ("without_core", "without_interface"):
            assert core[part]["cost"] == core[part]["share"] == 0
            assert (
                core[part]["loss"] == core["loss"] == pytest.approx(float(worth.first[16].mean()))
            )
        assert 0 < core["latent_spread_read"] < 16 / 15
    mean = mean_over_levels(worths)
    for where, sums in mean.moments.items():
        assert torch.equal(sums, worths[0].moments[where] + worths[1].moments[where])
    assert mean.sigma == pytest.approx(0.5)
    assert torch.allclose(mean.first[3], (worths[0].first[3] + worths[1].first[3]) / 2)


def test_the_core_s_worth_is_the_rise_of_the_loss_without_it() -> None:
    model = tiny_elastic()
    subject = make_subject(model, draws=2)
    worth = Inspector(model, subject).worth(0.5)
    other = Inspector(model, make_subject(model, draws=2, batch_size=2)).worth(0.5)
    core = numbers_of_core(worth)
    for part in ("core", "interface"):
        with leave_out(model, part):
            alone = Inspector(model, subject).maps(0.5, [16])[0]
        found, numbers = worth.without_part[part], core[f"without_{part}"]
        assert numbers["cost"] == pytest.approx(numbers["loss"] - core["loss"], rel=1e-4)
        assert numbers["share"] == pytest.approx(numbers["cost"] / core["loss"])
        assert found.shape == (3,)
        # `maps` sees two draws, `worth` the first of them.
        assert torch.allclose(found, alone.loss[0].flatten(1).mean(1), rtol=1e-4)
        assert torch.allclose(found, other.without_part[part], rtol=1e-5)
    for name in ("latent_spread_read", "latent_spread"):
        assert numbers_of_core(other)[name] == pytest.approx(core[name], rel=1e-3, abs=1e-4)


def test_of_many_latents_some_are_looked_at() -> None:
    assert spread(1, 16) == list(range(1, 17))
    many = spread(1, 256)
    assert (len(many), many[0], many[-1]) == (32, 1, 256)
    steps = np.diff(many)
    assert steps.max() - steps.min() <= 1


def test_samples_at_budgets_start_from_one_noise() -> None:
    model = tiny_elastic(in_channels=1)
    pipeline = ElitPipeline(model, make_scheduler("euler"))
    pipeline.set_progress_bar_config(disable=True)
    subject = make_subject(model)
    drawn = draw_at_budgets(pipeline, subject, [16, 4], 2, 2)
    again = draw_at_budgets(pipeline, subject, [4], 2, 1)
    assert drawn[16].shape == (2, 1, 8, 8)
    assert torch.allclose(drawn[4][:1], again[4], atol=1e-5)
    assert not torch.allclose(drawn[4], drawn[16], atol=1e-3)
    # One step is x - velocity: the noise is the same.
    one = draw_at_budgets(pipeline, subject, [16, 4], 1, 1)
    (noise,) = [b.noise[:1] for b in subject.batches(torch.device("cpu"), 4) if b.rows[0] == 0]
    for n in (16, 4):
        with torch.no_grad():
            labels = subject.condition["class_labels"][:1]
            velocity = model(noise, torch.ones(1), labels, num_latents=n).sample
        assert torch.allclose(one[n], noise - velocity, atol=1e-5)
    grid = token_grid(model, drawn[4])
    found = in_raster_order(squares_of_tokens(drawn[4] - drawn[16], grid, model), grid)
    assert torch.allclose(found, in_patches(model, drawn[4] - drawn[16]).float(), rtol=1e-4)


def test_a_retrofit_is_looked_at_where_it_reads() -> None:
    model = elasticize(tiny_dit(patch_size=1), head=1, tail=1, group=(4, 4))
    randomise(model.elit)
    inspector = Inspector(model, make_subject(model, draws=2))
    assert inspector.grid.group == (4, 4)
    full, low = inspector.maps(0.5, [16, 4], 1)
    assert full.attention is full.latents is None  # it copies there
    assert torch.allclose(low.attention.sum(-1), torch.tensor(4.0))
    numbers = numbers_of_maps(full, 1.0)
    assert numbers["attention_loss"] is numbers["latent_entropy"] is None
    worth = inspector.worth(0.5)
    assert worth.without == {}
    assert not torch.allclose(worth.without_part["core"], worth.first[16])
    assert worth.without_part["core"] == pytest.approx(worth.without_part["interface"])


def test_a_subject_and_an_inspector_refuse_what_makes_no_sense() -> None:
    refuses("draws=3: give an even number, of at least 2", make_subject, tiny_elastic(), draws=3)
    with pytest.raises(ValueError, match="this is a plain DiT without a latent interface"):
        Inspector(tiny_dit(), make_subject(tiny_dit()))


# ---- pictures ----


def test_colours_grow_lighter_evenly() -> None:
    found = colours(np.linspace(0, 1, 200), 0, 1).astype(float) / 255
    linear = np.where(found <= 0.04045, found / 12.92, ((found + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
    assert (np.diff(lightness) >= 0).all()
    assert lightness[0] < 10
    assert lightness[-1] > 94
    assert np.diff(lightness[::10]).max() < 8


def test_a_heatmap_shows_each_number_as_a_rectangle() -> None:
    values = np.array([[0.0, 1.0, np.nan], [2.0, 5.0, -1.0]])
    image = np.asarray(heatmap(values, (30, 20), (0, 2)))
    dark, light = colours(np.array([0, 2]), 0, 2)
    assert (image[:10, :10] == dark).all()
    assert (image[10:, :20] == light).all()
    assert (image[10:, 20:] == dark).all()
    assert (image[:10, 20:] == 128).all()
    picture = Image.new("RGB", (4, 4), (0, 200, 0))
    over = np.asarray(overlay(picture, values[:, :2], (0, 2))).astype(float)
    grey = np.asarray(picture.convert("L")).astype(float)[..., None]
    drawn = np.asarray(heatmap(values[:, :2], (4, 4), (0, 2)))
    assert np.allclose(over, 0.4 * grey + 0.6 * drawn, atol=1)


def test_a_sheet_has_one_scale_for_a_column_and_says_it() -> None:
    maps = np.stack([np.zeros((2, 2)), np.eye(2)])
    picture = Image.new("RGB", (8, 8), "red")
    column = Column("b", maps=maps)
    assert column.scale == (0, 1)
    sheet = map_sheet([Column("a", [picture] * 2), column], ["x", "y"], 32, "title")
    pixels = np.asarray(sheet)
    assert (pixels == colours(np.array(0), 0, 1)).all(-1).sum() >= 32 * 32  # all of the first map
    assert (pixels == (255, 0, 0)).all(-1).sum() == 2 * 32 * 32
    assert Column("c", maps=np.full((1, 2, 2), 3.0)).scale == (3, 3)
    assert Column("d", maps=np.array([[[np.nan, 1.0, 5.0]]])).scale == (1, 5)
    assert colour_bar((3, 3), 50).size == colour_bar((0, 3), 50).size
    assert stack([sheet, sheet]).height == 2 * sheet.height + 10
    with pytest.raises(ValueError, match=r"columns of \[1, 2\] rows; give one or more"):
        map_sheet([Column("a", [picture]), column])


def test_bars_stand_on_zero() -> None:
    bars = Line((0, 1), (2.0, -1.0), error=(0.5, 0.0))
    chart = Chart("t", "x", "y", [bars], kind="bars", names=("a", "b"), zero=True)
    blue = (np.asarray(picture([chart])) == (0x1F, 0x5F, 0xBF)).all(-1)
    middle = int(np.flatnonzero(blue.any(0)).mean())
    left, right = blue[:, :middle], blue[:, middle:]
    heights = [side.any(1).sum() for side in (left, right)]
    assert heights[0] == pytest.approx(2 * heights[1], abs=8)
    assert np.flatnonzero(left.any(1)).max() <= np.flatnonzero(right.any(1)).min()


# ---- the command ----

QUICK = ("--images", 5, "--draws", 2, "--steps", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of random weights: of digits, captions, clips, a retrofit, and one without a config."""
    home, euler = tmp_path_factory.mktemp("runs"), make_scheduler("euler")
    digits = {"sample_size": 16, "in_channels": 1, "num_classes": 10, "patch_size": 2, "group": 2}

    def save(name: str, pipeline, data: str | None) -> None:
        pipeline.save_pretrained(home / name)
        if data is not None:
            (home / name / "config.yaml").write_text(f"data: {data}\n")

    model = randomise(type(tiny_elastic())(**TINY_ELASTIC | digits))
    save("digits", ElitPipeline(model, euler), "{name: digits}")
    save("bare", ElitPipeline(model, euler), None)
    plain = {k: v for k, v in digits.items() if k != "group"}
    save("plain", ElitPipeline(tiny_dit(**plain), euler), "{name: digits}")
    texts = randomise(create_model("elit-mmdit-tiny/2", 16, in_channels=3, hidden_size=32,
                                   num_heads=2, depth=3, head=1, tail=1, group=2))  # fmt: skip
    save("texts", ElitTextPipeline(texts, euler), "{name: captioned-shapes}")
    clips = randomise(create_model("elit-video-dit-tiny/2", hidden_size=36, num_heads=2,
                                   group=(2, 2, 2), depth=3, head=1, tail=1))  # fmt: skip
    save("clips", ElitPipeline(clips, euler), "{name: moving-shapes}")
    retrofit = elasticize(tiny_dit(**plain), head=1, tail=1, group=(2, 2))
    save("retrofit", ElitPipeline(retrofit, euler), "{name: digits}")
    return home


@pytest.fixture
def inspect(capsys, tmp_path, runs):
    """Runs `elit inspect RUN ... --out tmp_path/NAME`; gives (exit code, stdout, stderr)."""

    def call(name: str, *words: object, out: str = "out") -> tuple[int, str, str]:
        capsys.readouterr()
        line = [str(runs / name), *map(str, words), "--out", str(tmp_path / out)]
        code = main(["inspect", *line])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def no_constant(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def test_inspect_writes_numbers_maps_and_sheets(inspect, tmp_path) -> None:
    words = (*QUICK, "--sigma", 0.3, 0.7, "--budget", 1, "1/4", 0.25)
    code, out, err = inspect("digits", *words)
    assert code == 0
    assert "noise levels" in err  # the bar: it takes minutes
    assert "warning" not in err
    folder = tmp_path / "out"
    report = json.loads((folder / "inspect.json").read_text(), parse_constant=no_constant)
    assert [(m["sigma"], m["num_latents"]) for m in report["maps"]] == [
        (0.3, 4), (0.3, 1), (0.7, 4), (0.7, 1)
    ]  # fmt: skip
    assert report["settings"]["data"] == "digits"
    assert len(set(report["settings"]["indices"])) == report["settings"]["images"] == 5
    assert report["settings"]["weights"]
    assert len(report["latents"]["without"]) == 2 * 4
    assert [one["sigma"] for one in report["core"]] == [0.3, 0.7]
    mean = report["core_mean"]
    assert f"straight to Write {mean['without_core']['loss']:.4f} (" in out
    assert f"{mean['latent_spread']:.1%} after the core (0% would" in out
    table = out.splitlines()
    assert table[2].split()[:2] == ["0.3", "1"]
    assert table[2].split()[2] == f"{report['maps'][0]['loss']:.4f}"
    maps = load_file(folder / "maps.safetensors")
    loss = maps["sigma-0.3.latents-1.loss"]
    assert loss.shape == (5, 8, 8)
    assert float(loss.mean()) == pytest.approx(report["maps"][1]["loss"], rel=1e-5)
    assert maps["sigma-0.3.latents-1.by_latent"].shape == (1, 8, 8)
    assert {path.name for path in folder.iterdir()} == {
        "inspect.json", "maps.safetensors", "inspect.png", "latents.png", "budgets.png",
        "worth.png",
    }  # fmt: skip
    sheets = ("inspect.png", "latents.png", "budgets.png", "worth.png")
    assert report["sheets"] == [str(folder / name) for name in sheets]
    assert all(Image.open(path).size > (300, 200) for path in report["sheets"])
    # Again, in other batches: the same numbers.
    code, out, _ = inspect("digits", *words, "--batch-size", 3, "--json", out="again")
    again = json.loads(out)
    for one, other in zip(report["maps"], again["maps"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        kinds = [maps["attention_loss"]["pearson"]["other_noise"] for maps in (one, other)]
        assert kinds[0] == pytest.approx(kinds[1], abs=1e-3)


@pytest.mark.parametrize("name", ["texts", "clips", "retrofit"])
def test_inspect_takes_every_kind_of_run(name: str, inspect, tmp_path) -> None:
    code, out, err = inspect(name, *QUICK, "--sigma", 0.5, "--images", 3, "--json")
    assert (code, "warning" in err) == (0, False), err
    report = json.loads(out, parse_constant=no_constant)
    assert [row["budget"] for row in report["maps"]] == [1, 0.25]
    assert (report["maps"][0]["attention_loss"] is None) == (name == "retrofit")
    assert (tmp_path / "out" / "latents.png").exists()
    if name == "clips":
        maps = load_file(tmp_path / "out" / "maps.safetensors")
        assert maps["sigma-0.5.latents-8.loss"].ndim == 4  # (N, t, h, w)


def test_inspect_of_a_retrofit_at_full_budget_has_no_latents_to_show(inspect, tmp_path) -> None:
    assert inspect("retrofit", *QUICK, "--sigma", 0.5)[0] == 0
    assert (tmp_path / "out" / "latents.png").exists()
    code, out, _ = inspect("retrofit", *QUICK, "--sigma", 0.5, "--budget", 1)
    assert code == 0
    assert not (tmp_path / "out" / "latents.png").exists()  # nor one of an earlier call
    assert out.splitlines()[2].split()[3:] == ["-"] * 9


def test_inspect_looks_at_prepared_vae_latents_and_other_data(inspect, runs, tmp_path) -> None:
    from prepared_data import write_prepared

    write_prepared(tmp_path / "data", scale=2)
    model = tiny_elastic(sample_size=16, in_channels=4, patch_size=2, group=2)
    ElitPipeline(model, make_scheduler("euler")).save_pretrained(runs / "latents")
    data = f"{{name: prepared, options: {{path: '{tmp_path}/data'}}}}"
    (runs / "latents" / "config.yaml").write_text(f"data: {data}\n")
    code, out, err = inspect("latents", *QUICK, "--sigma", 0.5, "--json")
    assert (code, "warning" in err) == (0, False), err
    assert json.loads(out)["settings"]["data"] == "prepared"
    words = (*QUICK, "--sigma", 0.5, "--data", "digits", "--split", "train", "--json")
    code, out, _ = inspect("bare", *words)
    assert (code, json.loads(out)["settings"]["split"]) == (0, "train")


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("plain", (), "is a plain DiT without a latent interface: there are no latents"),
        ("bare", (), "bare has no config.yaml, which would say what it was trained on"),
        ("digits", ("--data", "shapes"), "shapes doesn't fit .*input of shape"),
        ("digits", ("--data", "digitz"), "unknown data set 'digitz'"),
        ("digits", ("--data.options.count", "5"), "option 'count' of data set 'digits'"),
        ("digits", ("--images", "1"), "'1' is not allowed; give a whole number, at least 2"),
        ("digits", ("--draws", "3"), "draws=3: give an even number, of at least 2"),
        ("digits", ("--sigma", "1.5"), r"noise level '1.5' is outside \[0, 1\]"),
        ("digits", ("--sigma", "much"), r"noise level 'much' is outside \[0, 1\]"),
        ("digits", ("--budget", "0"), r"budget '0' is outside \(0, 1\]"),
        ("digits", ("--split", "test"), "split 'test'"),
        ("digits", ("--device", "abacus"), "device 'abacus' is not usable"),
        ("nowhere", (), "there is no folder"),
        ("texts", ("--data", "shapes", "--data.options.size", "16"), "has none; choose what it"),
        ("clips", ("--data", "moving-shapes", "--data.options.frames", "3"), "doesn't fit"),
    ],
)
def test_inspect_says_what_is_wrong(name: str, words: tuple, message: str, inspect) -> None:
    import re

    code, out, err = inspect(name, *words)
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert err.count("\n") == 1


def test_inspect_writes_nowhere_else(runs, tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    words = ["inspect", str(runs / "digits"), "--out", str(tmp_path / "file" / "x")]
    assert main(words) == 2
    assert "is not a folder; choose another folder with --out" in capsys.readouterr().err
    run = shutil.copytree(runs / "digits", tmp_path / "run")
    assert main(["inspect", str(run), *map(str, QUICK), "--sigma", "0.5"]) == 0
    assert (run / "inspected" / "inspect.json").exists()


def test_the_sentence_above_the_charts_says_what_they_show() -> None:
    ones = torch.ones(4)
    mean = Worth(
        0.5,
        first={1: 2 * ones, 2: 1.005 * ones, 4: ones},
        without={0: ones + torch.tensor([0.1, 0.2, 0.1, 0.2]), 1: ones},
        without_part={"core": 1.5 * ones, "interface": 3 * ones},
        moments={},
    )
    assert told_of_worth(mean) == (
        "The first 2 of 4 latents bring the loss within 1% of all; leaving one out adds at most "
        "0.150 ± 0.029, latent 1; leaving out the core adds 50%."
    )
    chart = Chart("a", "x", "y", [Line([0, 1], [1, 2])])
    plain, told = picture([chart]), picture([chart], sentence="A sentence. " * 20)
    assert (plain.width, plain.height + 50) <= (told.width, told.height)


def test_a_few_outliers_do_not_set_a_column_s_scale() -> None:
    maps = np.linspace(0, 1, 100).reshape(4, 5, 5)
    maps[0, 0, 0], maps[-1, -1, -1] = -50, 1000
    column = Column("loss", maps=maps)
    assert column.beyond == (True, True)
    low, high = column.scale
    assert 0 <= low < 0.05 < 0.95 < high <= 1
