"""The latent interface: grids and their groups, Read, Write, budgets and tail dropping."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import randomise
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from elit.interface import Read, TailDropping, TokenGrid, Write, resolve_budget
from elit.interface.budget import check_num_latents, default_budgets
from elit.interface.fit import format_size
from elit.interface.initial import init_weights

DIM, HEADS = 16, 2


@st.composite
def grids(draw) -> TokenGrid:
    """Any grid of two or three axes with at most 3 groups of at most 3 tokens along each."""
    axes = draw(st.integers(2, 3))
    small = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    group = draw(small)
    return TokenGrid(tuple(g * n for g, n in zip(group, draw(small), strict=True)), tuple(group))


def make_read(num_latents: int) -> Read:
    return randomise(Read(DIM, HEADS, num_latents))


def make_write(tokens_per_group: int) -> Write:
    return randomise(Write(DIM, HEADS, tokens_per_group))


def make_tokens(grid: TokenGrid, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, D) and a condition (B, D)."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(batch, grid.num_tokens, DIM, generator=generator)
    return tokens, torch.randn(batch, DIM, generator=generator)


# ---- grids and groups ----


@given(grids(), st.data())
def test_unpatchify_undoes_patchify(grid: TokenGrid, data) -> None:
    axes = len(grid.size)
    patch = tuple(data.draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes)))
    space = [n * p for n, p in zip(grid.size, patch, strict=True)]
    x = torch.randn(2, 3, *space)
    tokens = grid.patchify(x, patch)
    assert tokens.shape == (2, grid.num_tokens, 3 * math.prod(patch))
    assert torch.equal(grid.unpatchify(tokens, patch), x)
    # Token i holds, channels first, the patch that lies at its place.
    for i, place in enumerate(grid.token_places().int().tolist()):
        where = tuple(slice(n * p, n * p + p) for n, p in zip(place, patch, strict=True))
        assert torch.equal(tokens[:, i], x[(..., *where)].flatten(1))


@given(grids())
def test_groups_are_boxes_that_tile_the_grid(grid: TokenGrid) -> None:
    assert grid.num_groups * grid.tokens_per_group == grid.num_tokens == math.prod(grid.size)
    places = grid.token_places()
    assert places.dtype == torch.float32
    all_places = itertools.product(*map(range, grid.size))
    assert Counter(map(tuple, places.int().tolist())) == Counter(all_places)

    boxes = places.view(grid.num_groups, grid.tokens_per_group, -1)
    inside = torch.tensor(list(itertools.product(*map(range, grid.group))))
    corners = []
    for box in boxes:
        assert torch.equal(box - box[0], inside.float())  # the same raster order in every group
        assert not (box[0] % torch.tensor(grid.group)).any()
        corners.append(tuple(box[0].tolist()))
    assert corners == sorted(set(corners))  # groups in raster order


@given(grids(), st.integers(1, 4))
def test_latents_stand_at_the_centre_of_their_group(grid: TokenGrid, num_latents: int) -> None:
    places = grid.latent_places(num_latents).view(grid.num_groups, num_latents, -1)
    boxes = grid.token_places().view(grid.num_groups, grid.tokens_per_group, -1)
    centres = (boxes[:, 0] + boxes[:, -1]) / 2
    torch.testing.assert_close(places, centres[:, None].expand_as(places))


def test_grid_on_paper() -> None:
    grid = TokenGrid((4, 4), (2, 2))
    order = grid.patchify(torch.arange(16).view(1, 1, 4, 4), (1, 1)).flatten().tolist()
    assert order == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    clip = TokenGrid((2, 2, 2), (2, 1, 2))
    order = clip.patchify(torch.arange(8).view(1, 1, 2, 2, 2), (1, 1, 1)).flatten().tolist()
    assert order == [0, 1, 4, 5, 2, 3, 6, 7]
    assert TokenGrid((16, 16), (4, 4)).num_groups == 16  # 256 px
    assert TokenGrid((32, 32), (8, 8)).num_groups == 16  # 512 px
    assert format_size((4, 16, 16)) == "4x16x16"


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=2, max_size=3),
)
@example([(16, 4), (15, 4)])
def test_a_grid_that_groups_do_not_divide_is_refused_with_what_would_fit(axes: list) -> None:
    size, group = zip(*axes, strict=True)
    assume(any(n % g for n, g in axes))
    with pytest.raises(ValueError, match="cannot be cut into groups of") as caught:
        TokenGrid(size, group)
    message = str(caught.value)
    assert f"a grid of {format_size(size)} tokens" in message
    padded = message.split("resize or pad the input to ")[1].split(" tokens")[0]
    fitting = message.split("group=(")[1].split(")")[0]
    padded, fitting = tuple(map(int, padded.split("x"))), tuple(map(int, fitting.split(",")))
    TokenGrid(padded, group)  # both ways out work
    TokenGrid(size, fitting)
    assert all(0 <= p - n < g for n, g, p in zip(size, group, padded, strict=True))


@pytest.mark.parametrize(
    ("size", "group", "message"),
    [
        ((16, 15), (4, 4), r"16x15 .*4x4: 15 is not a multiple of 4; .*16x16.*group=\(4, 3\)"),
        ((16, 16), (4, 4, 4), "a grid of 2 axes .* groups of 3 .*; give a group of 2 numbers"),
        ((4, 0), (2, 2), "every number must be at least 1"),
        ((4, 4), (2, 0), "every number must be at least 1"),
        ((4, 4), (2, -2), "every number must be at least 1"),
    ],
)
def test_bad_grids(size: tuple, group: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenGrid(size, group)


# ---- Read and Write ----


@given(grids(), st.data())
def test_reading_all_latents_and_slicing_equals_reading_fewer(grid: TokenGrid, data) -> None:
    total = grid.tokens_per_group
    kept = data.draw(st.integers(1, total))
    read, (tokens, condition) = make_read(total), make_tokens(grid)
    with torch.no_grad():
        everything = read(tokens, condition, grid, total)
        few = read(tokens, condition, grid, kept)
    assert few.shape == (2, grid.num_groups * kept, DIM)
    sliced = everything.unflatten(1, (grid.num_groups, total))[:, :, :kept].flatten(1, 2)
    torch.testing.assert_close(few, sliced)


@given(grids(), st.data())
def test_groups_do_not_leak_into_each_other(grid: TokenGrid, data) -> None:
    groups, per_group = grid.num_groups, grid.tokens_per_group
    kept = data.draw(st.integers(1, per_group))
    touched = data.draw(st.integers(0, groups - 1))
    others = [g for g in range(groups) if g != touched]
    read, write = make_read(per_group), make_write(per_group)
    tokens, condition = make_tokens(grid)
    changed = tokens.unflatten(1, (groups, per_group)).clone()
    changed[:, touched] += torch.randn(2, per_group, DIM)

    with torch.no_grad():
        latents = read(tokens, condition, grid, kept)
        latents_changed = read(changed.flatten(1, 2), condition, grid, kept)
        before, after = (x.unflatten(1, (groups, kept)) for x in (latents, latents_changed))
        assert torch.equal(before[:, others], after[:, others])
        assert not torch.isclose(before[:, touched], after[:, touched]).all(-1).any()

        # The tokens of one group and its latents reach the tokens of that group alone.
        written = write(tokens, latents, condition, grid)
        for new in (
            write(tokens, latents_changed, condition, grid),
            write(changed.flatten(1, 2), latents, condition, grid),
        ):
            before, after = (x.unflatten(1, (groups, per_group)) for x in (written, new))
            assert torch.equal(before[:, others], after[:, others])
            assert not torch.isclose(before[:, touched], after[:, touched]).all(-1).any()


def test_chosen_latents_are_the_rows_of_reading_all() -> None:
    grid = TokenGrid((4, 4), (2, 2))
    read, (tokens, condition) = make_read(4), make_tokens(grid)
    with torch.no_grad():
        everything = read(tokens, condition, grid, 4).unflatten(1, (4, 4))
        chosen = read(tokens, condition, grid, 2, torch.tensor([3, 1])).unflatten(1, (4, 2))
    torch.testing.assert_close(chosen, everything[:, :, [3, 1]])


def test_read_and_write_by_their_formulas() -> None:
    """As trained weights have them: a sign or a place elsewhere makes other pictures of them."""
    grid, (read, write) = TokenGrid((2, 4), (2, 2)), (make_read(4), make_write(4))
    tokens, condition = make_tokens(grid)

    def normed(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (DIM,), eps=1e-6)

    with torch.no_grad():
        ((shift, scale, gate),) = read.modulation(condition)
        context = normed(tokens) * (1 + scale) + shift + read.token_place.repeat(2, 1)
        queries = normed(read.latents[:3])
        update = [read.attention(queries, group) for group in context.split(4, dim=1)]
        x = (read.latents + read.latent_index)[:3].repeat(2, 1) + gate * torch.cat(update, 1)
        latents = x + gate * read.mlp(normed(x) * (1 + scale) + shift)
        torch.testing.assert_close(read(tokens, condition, grid, 3), latents)

        ((shift, scale, gate),) = write.modulation(condition)
        place = write.token_place.repeat(2, 1)
        queries = normed(tokens) * (1 + scale) + shift + place
        pairs = zip(queries.split(4, dim=1), normed(latents).split(3, dim=1), strict=True)
        x = tokens + gate * torch.cat([write.attention(*pair) for pair in pairs], 1)
        written = x + gate * write.mlp(normed(x) * (1 + scale) + shift + place)
        torch.testing.assert_close(write(tokens, latents, condition, grid), written)

    for part, start in ((read, 1.0), (write, 0.1)):
        part.apply(init_weights)
        ((shift, scale, gate),) = part.modulation(condition)
        assert not shift.any()
        assert not scale.any()
        assert torch.equal(gate, torch.full_like(gate, start))


@pytest.mark.parametrize("num_latents", [0, -1, 5])
def test_read_refuses_latents_that_it_does_not_have(num_latents: int) -> None:
    grid = TokenGrid((4, 4), (2, 2))
    with pytest.raises(ValueError, match=rf"num_latents {num_latents} is outside 1\.\.4"):
        make_read(4)(*make_tokens(grid), grid, num_latents)


# ---- budgets ----


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 4096))
@example(5e-324, 16)
@example(1 / 32, 16)
@example(1.0, 1)
def test_a_budget_is_rounded_to_the_nearest_number_of_latents(budget: float, total: int) -> None:
    kept = resolve_budget(budget, total)
    assert isinstance(kept, int)
    assert 1 <= kept <= total
    assert abs(kept - budget * total) <= 0.5 or (kept == 1 and budget * total < 1)


def test_default_budgets_halve_down_to_the_fewest_latents() -> None:
    assert default_budgets(2, 16) == [1, 1 / 2, 1 / 4, 1 / 8]
    assert default_budgets(3, 16) == [1, 1 / 2, 1 / 4]


def test_a_half_goes_to_the_even_number() -> None:
    assert [resolve_budget(0.5, total) for total in (3, 5, 7, 9)] == [2, 2, 4, 4]


@given(st.integers(1, 4096), st.data())
def test_the_budget_of_n_latents_keeps_n_latents(total: int, data) -> None:
    kept = data.draw(st.integers(1, total))
    assert resolve_budget(kept / total, total) == kept
    assert resolve_budget(np.float32(kept / total), total) == kept
    lower = data.draw(st.floats(0, kept / total, exclude_min=True))
    assert resolve_budget(lower, total) <= kept  # never more for less


OUTSIDE, NO_NUMBER = (
    r"budget {!r} is outside \(0, 1\].*16 .*0\.0625",
    "is not a number; give a fraction",
)


@pytest.mark.parametrize(
    ("message", "budget"),
    [
        *((OUTSIDE, b) for b in (0, -1, 1.5, 1.0001, math.inf, -math.inf, math.nan, "x", "150%")),
        *((NO_NUMBER, b) for b in (None, True, (0.5,), 1j, torch.tensor(0.5))),
    ],
)
def test_bad_budgets(message: str, budget: object) -> None:
    with pytest.raises(ValueError, match=message.format(budget)):
        resolve_budget(budget, 16)


def test_numbers_of_latents_in_range() -> None:
    assert [check_num_latents(n, 4) for n in range(1, 5)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"lowest 5 is outside 1\.\.4, the latents per group"):
        check_num_latents(5, 4, name="lowest")


# ---- tail dropping ----


@given(st.integers(1, 8), st.integers(0, 8), st.integers(0, 8), st.integers(0, 2**31))
def test_draws_stay_in_range_and_follow_the_generator(low, more, spare, seed: int) -> None:
    dropping = TailDropping(low, low + more, low + more + spare)

    def draws() -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [dropping.draw(generator) for _ in range(20)]

    assert all(low <= n <= low + more for n in draws())
    assert draws() == draws()  # every rank draws the same number


def test_draws_are_uniform() -> None:
    dropping = TailDropping(1, 16, 16)
    generator = torch.Generator().manual_seed(0)
    counts = Counter(dropping.draw(generator) for _ in range(8000))
    assert sorted(counts) == list(range(1, 17))
    chi_squared = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert chi_squared < 38  # 15 degrees of freedom: 0.1 % are above


def test_random_dropping_keeps_a_random_set() -> None:
    dropping = TailDropping(1, 8, 8, order="random")
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(8)
    for _ in range(2000):
        kept = dropping.choose(3, generator)
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert len(kept) == 3
        counts[kept] += 1
    torch.testing.assert_close(counts / 2000, torch.full((8,), 3 / 8), atol=0.04, rtol=0)
    assert dropping.choose(8, generator).tolist() == list(range(8))
    assert TailDropping(1, 8, 8).choose(3, generator) is None  # the first ones
    kept = {tuple(dropping.choose(3, torch.Generator().manual_seed(5)).tolist()) for _ in range(9)}
    assert len(kept) == 1  # every rank keeps the same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 16), r"cannot keep 0\.\.4 latents per group: the model has 16; need 1 <="),
        ((5, 4, 16), r"cannot keep 5\.\.4"),
        ((1, 17, 16), r"cannot keep 1\.\.17 .*<= 16"),
        ((1, 4, 16, "last"), "order 'last' is unknown; use 'first' or 'random'"),
    ],
)
def test_bad_tail_dropping(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TailDropping(*arguments)
