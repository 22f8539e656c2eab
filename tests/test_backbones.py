"""What is special to a backbone: U-ViT's skips, HDiT's neighbourhoods and levels."""

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, make_inputs, randomise, tiny_dit, tiny_elastic
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from elit.interface import TokenGrid
from elit.layers.neighborhood import (
    NeighborhoodAttention,
    attend_neighborhood,
    from_rows,
    neighborhood,
    tile_size,
    to_rows,
)
from elit.layers.positions import rotary_embedding
from elit.models.hdit import HDiT
from elit.models.uvit import SkipBlock, UViT

# ---- U-ViT ----


@pytest.mark.parametrize("make", [tiny_dit, tiny_elastic])
def test_with_skips_that_pass_the_newer_half_on_a_uvit_is_a_dit(make) -> None:
    dit = make(depth=7)
    uvit = randomise(UViT(**{k: v for k, v in dit.config.items() if not k.startswith("_")}))
    skips = [block for block in uvit.blocks if isinstance(block, SkipBlock)]
    assert len(skips) == 3
    for block in skips:
        dim = block.skip.out_features
        with torch.no_grad():
            block.skip.weight.copy_(torch.eye(dim, 2 * dim))
            block.skip.bias.zero_()
    inputs = make_inputs(dit)
    for n in (None,) if not dit.is_elastic else (1, 7, 16):
        torch.testing.assert_close(
            uvit(*inputs, num_latents=n).sample, dit(*inputs, num_latents=n).sample
        )


@pytest.mark.parametrize(
    ("split", "sources"),
    [
        ({"depth": 7}, {6: 0, 5: 1, 4: 2}),
        ({"depth": 6}, {5: 0, 4: 1}),
        ({"depth": 8, "group": 4, "head": 1, "tail": 2}, {7: 0, 5: 1, 4: 2}),
        ({"depth": 7, "group": 4, "head": 2, "tail": 2}, {6: 0, 5: 1, 4: 2}),
    ],
)
def test_skips_tie_the_first_block_to_the_last(split, sources) -> None:
    assert UViT(**TINY | {"patch_size": 1} | split).skip_sources == sources


def test_a_skip_takes_what_its_source_gave() -> None:
    model = randomise(UViT(**TINY | {"depth": 5}))
    inputs = make_inputs(model)
    given, taken = {}, {}
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, n=number: given.__setitem__(n, out))
        block.register_forward_pre_hook(
            lambda _, args, n=number: taken.__setitem__(n, args[3] if len(args) > 3 else None)
        )
    model(*inputs)
    assert taken[4] is given[0]
    assert taken[3] is given[1]
    assert [taken[n] for n in (0, 1, 2)] == [None] * 3


# ---- neighbourhood attention ----


def dense_mask(grid: TokenGrid, kernel: int) -> torch.Tensor:
    """(N, N), by loops over the definition: the k nearest, shifted inwards at a border."""
    places = grid.token_places().long().tolist()
    mask = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            inside = True
            for q, k, n in zip(query, key, grid.size, strict=True):
                width = min(kernel, n)
                first = min(max(q - width // 2, 0), n - width)
                inside &= first <= k < first + width
            mask[i, j] = inside
    return mask


@pytest.mark.parametrize(
    ("size", "kernel"),
    [((8, 8), 3), ((8, 12), 7), ((5, 7), 3), ((6, 4), 5), ((2, 3), 7), ((2, 4, 6), 3), ((9, 1), 3)],
)
def test_neighborhood_attention_is_the_masked_dense_one(size, kernel) -> None:
    grid = TokenGrid(size, tile_size(size))
    places = grid.token_places()
    near = neighborhood(places, size, kernel, rotary_embedding(places, 8, 100.0))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, grid.num_tokens, 3, 8)
    mask = dense_mask(grid, kernel)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    expected = expected.transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend_neighborhood(q, k, v, near), expected)


def test_rows_and_back() -> None:
    grid = TokenGrid((8, 12), tile_size((8, 12)))
    places = grid.token_places()
    near = neighborhood(places, grid.size, 3, rotary_embedding(places, 8, 100.0))
    rows = to_rows(places[None, :, None], near)  # (1, h, w, 1, 2)
    assert rows[0, 5, 7, 0].tolist() == [5, 7]
    assert torch.equal(from_rows(rows, near)[0, :, 0], places)


def test_a_neighbourhood_of_everything_is_self_attention() -> None:
    from elit.layers.attention import SelfAttention

    grid = TokenGrid((4, 8), tile_size((4, 8)))
    places = grid.token_places()
    rotary = rotary_embedding(places, 16, 100.0)
    local, full = NeighborhoodAttention(32, 2), SelfAttention(32, 2)
    full.load_state_dict(local.state_dict())
    x = torch.randn(2, 32, 32)
    near = neighborhood(places, grid.size, 15, rotary)
    torch.testing.assert_close(local(x, near), full(x, rotary))


# ---- HDiT ----

HOURGLASS = TINY | {"hidden_size": 64, "sample_size": 16, "head": 1, "tail": 1, "kernel_size": 3}


def test_the_outer_level_is_local_and_the_inner_one_is_not() -> None:
    model = randomise(HDiT(**HOURGLASS))
    samples, sigma, labels = make_inputs(model)
    samples.requires_grad_()
    model(samples, sigma, labels).sample[0, :, 0, 0].sum().backward()
    assert samples.grad[0, :, 15, 15].abs().max() > 0
    samples.grad = None
    nn.init.zeros_(model.skip_weight)  # around the inner level, through 2 blocks of 3 neighbours
    model(samples, sigma, labels).sample[0, :, 0, 0].sum().backward()
    reached = samples.grad[0].abs().amax(0) > 0
    assert reached[:4, :4].all()  # the corner sees 0..2, and 2 sees 1..3
    assert not reached[4:].any()
    assert not reached[:, 4:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 1}, "patch_size=1, .* cannot be halved for the outer level"),
        ({"num_heads": 1}, "num_heads=1 cannot be halved"),
        ({"kernel_size": 4}, "kernel_size=4 is not allowed; use an odd number"),
        ({"head": 2, "tail": 1}, "head of 2 and a tail of 1 blocks leave no core of 3"),
    ],
)
def test_settings_that_do_not_fit(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        HDiT(**HOURGLASS | change)


def test_neighbourhoods_cost_less_than_the_whole_grid() -> None:
    def flops(kernel: int) -> int:
        with torch.device("meta"):
            model = HDiT(**HOURGLASS | {"sample_size": 64, "kernel_size": kernel})
        inputs = tuple(x.to("meta") for x in make_inputs(model.requires_grad_(False)))
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
        return counter.get_total_flops()

    assert flops(3) < flops(7) < 0.5 * flops(63)
