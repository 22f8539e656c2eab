"""What a retrofit is: the settings that travel in a model's config."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from elit._choices import check_choice
from elit._numbers import is_whole
from elit._plain import from_plain

Init = Literal["identity", "learned"]
INITS = ("identity", "learned")
LEAST_HEADS = 8  # of Read and Write: fewer gather too little from a group (docs/elasticize.md)


@dataclass(frozen=True)
class Settings:
    """How a transformer is split, and how its latents start.

    Attributes:
        depth: blocks in all.
        head: blocks before Read.
        tail: blocks after Write.
        group: tokens of one group along each axis.
        init: "identity" or "learned".
        rank: of the adapters that act below full budget; 0 is none.
        min_latents: fewest latents per group that training keeps.
    """

    depth: int
    head: int
    tail: int
    group: tuple[int, ...]
    init: Init = "identity"
    rank: int = 0
    min_latents: int = 1

    @classmethod
    def check(
        cls,
        depth: int,
        head: int,
        tail: int,
        group: int | Sequence[int],
        init: str,
        rank: int,
        num_axes: int,
    ) -> "Settings":
        """Settings from what a user gave, or a ValueError."""
        if not is_whole(rank, 0):
            raise ValueError(f"rank={rank!r} is not allowed; give a whole number, 0 for none")
        check_choice(init, INITS, "init")
        if not (is_whole(head) and is_whole(tail)):
            raise ValueError(
                f"head={head!r} and tail={tail!r} are not allowed: a retrofit needs at least one "
                f"block on either side of the core"
            )
        if head + tail >= depth:
            raise ValueError(
                f"a head of {head} and a tail of {tail} blocks leave no core of {depth}; "
                f"choose head + tail < {depth}"
            )
        sizes = tuple(group) if isinstance(group, Sequence) else (group,) * num_axes
        if len(sizes) != num_axes or not all(is_whole(n) for n in sizes):
            raise ValueError(
                f"group={group!r} is not allowed; give one positive integer, or {num_axes} of them"
            )
        return cls(depth, int(head), int(tail), tuple(map(int, sizes)), init, int(rank))  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "Settings":
        """Settings as `to_config` wrote them."""
        try:
            return from_plain(cls, values)
        except ValueError as error:
            raise ValueError(f"settings {values!r} are not those of a retrofit: {error}") from None

    def to_config(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {**asdict(self), "group": list(self.group)}

    @property
    def edges(self) -> tuple[int, int]:
        """Numbers of the core's first and last block."""
        return self.head, self.depth - self.tail - 1


def interface_heads(heads: int, width: int) -> int:
    """Attention heads of the Read and Write of a transformer with so many."""
    return max(heads, LEAST_HEADS) if width % LEAST_HEADS == 0 else heads
