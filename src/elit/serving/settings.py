"""What `elit serve` was asked for."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Arguments of a server.

    Attributes:
        run: folder of a pipeline, or its name on the hub.
        host: address to listen on.
        port: likewise.
        p95_ms: milliseconds from a request to its answer that are held by budget.
        min_budget: lowest budget that a request may have, or that control may choose.
        batch_size: pictures drawn at a time.
        most_waiting: pictures in the queue.
        steps: where a request doesn't say; None of this and the next three: the sweep's best.
        guidance: likewise.
        scale: likewise.
        guide_budget: likewise.
        sampler: instead of the one that was saved.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "fp32" or "bf16".
        variant: of the files of weights.
    """

    run: str
    host: str = "127.0.0.1"
    port: int = 8000
    p95_ms: float | None = None
    min_budget: float | None = None
    batch_size: int = 32
    most_waiting: int = 1024
    steps: int | None = None
    guidance: str | None = None
    scale: float | None = None
    guide_budget: float | None = None
    sampler: str | None = None
    device: str = "auto"
    dtype: str = "fp32"
    variant: str | None = None

    @property
    def name(self) -> str:
        """Of the model, in requests and answers."""
        return PurePath(self.run).name or "elit"

    def point(self) -> dict[str, Any]:
        """Those of steps and guidance that are given."""
        names = ("steps", "guidance", "scale", "guide_budget")
        return {name: x for name in names if (x := getattr(self, name)) is not None}
