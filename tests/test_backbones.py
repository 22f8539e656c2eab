"""What is special to a backbone: U-ViT's skips, HDiT's neighbourhoods and levels."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, make_inputs, randomise, tiny_dit, tiny_elastic
from torch import nn

from elit.interface import TokenGrid
from elit.layers.neighborhood import (
    NeighborhoodAttention,
    NeighborhoodBlock,
    attend_natten,
    attend_neighborhood,
    neighborhood,
    tile_size,
)
from elit.layers.transformer import TransformerBlock, rotary_embedding
from elit.models.dit import DiT
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


def test_a_neighbourhood_of_everything_is_self_attention() -> None:
    from elit.layers.transformer import SelfAttention

    grid = TokenGrid((4, 8), tile_size((4, 8)))
    places = grid.token_places()
    rotary = rotary_embedding(places, 16, 100.0)
    local, full = NeighborhoodAttention(32, 2), SelfAttention(32, 2)
    full.load_state_dict(local.state_dict())
    x = torch.randn(2, 32, 32)
    near = neighborhood(places, grid.size, 15, rotary)
    torch.testing.assert_close(local(x, near), full(x, rotary))


def test_a_block_of_neighbourhoods_starts_as_any_block_does() -> None:
    """Its attention is made once: the same seed gives the same weights."""
    weights = []
    for kind in (TransformerBlock, NeighborhoodBlock):
        torch.manual_seed(0)
        weights.append(kind(32, 2, 4.0).state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def dense_na2d(query, key, value, kernel_size) -> torch.Tensor:
    """What NATTEN documents, (B, h, w, H, d), by a dense mask: it is not installed here."""
    size = tuple(query.shape[1:3])
    mask = dense_mask(TokenGrid(size, size), kernel_size[0])
    heads_first = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    return out.transpose(1, 2).unflatten(1, size)


def test_natten_is_given_rows_and_gives_the_same(monkeypatch) -> None:
    natten = types.ModuleType("natten")
    natten.na2d = dense_na2d
    monkeypatch.setitem(sys.modules, "natten", natten)
    grid = TokenGrid((8, 12), tile_size((8, 12)))
    places = grid.token_places()
    near = neighborhood(places, grid.size, 5, rotary_embedding(places, 8, 100.0))
    q, k, v = torch.randn(3, 2, grid.num_tokens, 3, 8)
    torch.testing.assert_close(attend_natten(q, k, v, near), attend_neighborhood(q, k, v, near))


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


@pytest.mark.parametrize("elastic", [False, True])
def test_the_inner_level_is_a_dit(elastic: bool) -> None:
    """With a head that does nothing and a merge that is the DiT's patch embedding."""
    interface = {"group": 4} if elastic else {}
    hdit = randomise(HDiT(**HOURGLASS | interface))
    settings = TINY | {"hidden_size": 64, "sample_size": 16, "depth": 1, "patch_size": 2}
    dit = randomise(DiT(**settings | interface))
    for name in ("time_embed", "label_embed", *(("read", "write") if elastic else ())):
        getattr(dit, name).load_state_dict(getattr(hdit, name).state_dict())
    dit.blocks[0].load_state_dict(hdit.blocks[1].state_dict())
    channels = hdit.in_channels
    with torch.no_grad():
        for parameter in (*hdit.blocks[0].modulation.parameters(), hdit.merge_tokens.weight):
            parameter.zero_()
        hdit.patch_embed.weight.copy_(torch.eye(32, channels))
        hdit.patch_embed.bias.zero_()
        hdit.merge_tokens.weight[:, : 4 * channels] = dit.patch_embed.weight
        hdit.merge_tokens.bias.copy_(dit.patch_embed.bias)
        hdit.skip_weight.fill_(1)  # nothing goes around the inner level
    given = {}
    for module, name in ((hdit.split_tokens, "hdit"), (dit.project, "dit"), (hdit.blocks[2], "up")):
        module.register_forward_pre_hook(lambda _, args, n=name: given.__setitem__(n, args[0]))
    inputs = make_inputs(dit)
    grid = dit.token_grid(inputs[0])
    for n in (1, 5, 16) if elastic else (None,):
        with torch.no_grad():
            hdit(*inputs, num_latents=n)
            dit(*inputs, num_latents=n)
            inner = grid.unpatchify(hdit.split_tokens(given["dit"]), (1, 1))  # (B, 128, 8, 8)
        torch.testing.assert_close(given["hdit"], given["dit"])
        outer = hdit.outer_grid(grid).unpatchify(given["up"], (1, 1))  # (B, 32, 16, 16)
        torch.testing.assert_close(outer, F.pixel_shuffle(inner, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 1}, "patch_size=1, .* cannot be halved for the outer level"),
        ({"num_heads": 1}, "num_heads=1 cannot be halved"),
        ({"kernel_size": 4}, "kernel_size=4 is not allowed; use an odd number"),
        ({"head": 2, "tail": 1}, "head=2 and tail=1 leave no core of 3 blocks"),
    ],
)
def test_settings_that_do_not_fit(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        HDiT(**HOURGLASS | change)
