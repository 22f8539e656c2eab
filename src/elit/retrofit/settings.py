"""Settings of a retrofit, which travel in a model's config."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from elit._choices import check_choice
from elit._numbers import check_whole, is_whole
from elit._plain import from_plain
from elit.models.geometry import check_core, per_axis

Init = Literal["identity", "learned"]
LEAST_HEADS = 8  # of Read and Write: fewer gather too little from a group (docs/elasticize.md)


@dataclass(frozen=True)
class Settings:
    """Split of a transformer, and start of its latents."""

    depth: int  # blocks in all
    head: int  # blocks before Read
    tail: int  # blocks after Write
    group: tuple[int, ...]  # tokens of one group along each axis
    init: Init = "identity"
    rank: int = 0  # of the adapters that act below full budget; 0 is none
    min_latents: int = 1  # fewest latents per group that training keeps

    @classmethod
    def check(
        cls, depth: int, head: int, tail: int, group: int | Sequence[int], init: Any, rank: int,
        num_axes: int,
    ) -> "Settings":  # fmt: skip
        """Settings from what a user gave, or a ValueError."""
        check_whole(rank, "rank", 0, advice="a whole number, 0 for none")
        check_choice(init, get_args(Init), "init")
        if not (is_whole(head) and is_whole(tail)):
            raise ValueError(
                f"head={head!r} and tail={tail!r} are not allowed: a retrofit needs at least one "
                f"block on either side of the core"
            )
        check_core(depth, head, tail)
        return cls(depth, int(head), int(tail), per_axis(group, num_axes, "group"), init, int(rank))

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
