"""What charts share: round values of an axis, how they are written, colours."""

import math
from collections.abc import Sequence

COLOURS = ("#1f5fbf", "#d9662b", "#2a9d6f", "#a63d8f", "#b8901d", "#5b6475", "#c23b3b", "#3aa6b9")


def round_values(low: float, high: float) -> list[float]:
    """Round numbers between two, a few of them: of a log axis, or evenly of a short range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        values = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(values) >= 3:
            return values[:: -(-len(values) // 10)]  # of very many decades, each second or third
    return even_values(high, (high - low) / 6, low)


def even_values(high: float, rough: float, low: float = 0.0) -> list[float]:
    """Multiples of a round number, at least `rough`, from `low` up to `high`."""
    if rough <= 0:
        return [high]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def short(value: float, digits: int = 4) -> str:
    """1500 -> '1.5k'."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def distinct(values: Sequence[float]) -> list[str]:
    """Values, written as short as keeps them apart."""
    written: list[str] = []
    for digits in range(3, 12):
        written = [short(value, digits) for value in values]
        if len(set(written)) == len(set(values)):
            break
    return written


def pale(colour: str, share: float = 0.35) -> str:
    """A colour mixed with white: a share of the colour."""
    return mix("#ffffff", colour, share)


def mix(first: str, second: str, share: float) -> str:
    """A colour between two: a share of the second, the rest of the first."""
    parts = zip(_parts(first), _parts(second), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in parts)


def ramp(anchors: Sequence[str], count: int) -> list[str]:
    """So many colours from the first anchor to the last; one alone is the last."""
    colours = []
    for i in range(count):
        at = (i / (count - 1) if count > 1 else 1.0) * (len(anchors) - 1)
        left = min(int(at), len(anchors) - 2)
        colours.append(mix(anchors[left], anchors[left + 1], at - left))
    return colours


def cycle(count: int) -> list[str]:
    """So many of the colours, from the first again where they end."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _parts(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
