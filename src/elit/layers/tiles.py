"""Tiles of a grid, whose tokens share the keys that they attend to; without torch."""

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
