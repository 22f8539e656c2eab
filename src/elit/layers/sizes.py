"""Sizes within a layer, without torch: tiles of a grid, whose tokens share keys, and heads."""

from elit._numbers import is_whole

# Most tokens of a tile along an axis. Smaller tiles copy each key into more slabs, larger ones
# attend to more keys in vain: with 7 neighbours, 4, 8 and 16 read 6.2, 3.1 and 1.9 keys per query
# and attend to 100, 196 and 484.
TILE = 8


def tile_size(size: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens of a tile along each axis: the most up to TILE that divide the grid."""
    return tuple(max(t for t in range(1, TILE + 1) if n % t == 0) for n in size)


def slab_size(size: tuple[int, ...], kernel: int) -> tuple[int, ...]:
    """Keys along each axis that a tile's queries share, each seeing `kernel` of them at most."""
    tiles = zip(size, tile_size(size), strict=True)
    return tuple(min(min(kernel, n) + t - 1, n) for n, t in tiles)


def head_dim(dim: int, num_heads: int) -> int:
    """Width of one head."""
    if not is_whole(dim) or not is_whole(num_heads) or dim % num_heads:
        raise ValueError(
            f"width {dim} cannot be divided into {num_heads} heads; "
            f"choose a number of heads that divides {dim}"
        )
    return dim // num_heads


def pairs_per_axis(head_dim: int, num_axes: int) -> list[int]:
    """Pairs of features that rotary positions turn along each axis, one more along the last."""
    pairs = head_dim // 2
    if head_dim % 2 or pairs < num_axes:
        raise ValueError(
            f"heads of width {head_dim} cannot carry rotary positions of {num_axes} axes; "
            f"use an even width of at least {2 * num_axes} (hidden_size / num_heads)"
        )
    return [pairs // num_axes + (axis >= num_axes - pairs % num_axes) for axis in range(num_axes)]
