"""What the process that answers knows of the model, told by the one that draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elit.serving.control import Way


class RefusedError(Exception):
    """A request that is not served: an HTTP status and OpenAI's words for the reason."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str = "invalid_value",
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.param, self.status, self.code, self.retry_after = param, status, code, retry_after

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        kinds = {429: "rate_limit_error", 503: "server_error", 500: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Point:
    """A row of the sweep: a way to draw, what it costs, how good it is (lower is better)."""

    way: Way
    latents: int
    gflops: float
    ms: float
    badness: float


@dataclass(frozen=True)
class Facts:
    """A model as it is served.

    Attributes:
        name: of the model in answers.
        num_classes: None of a model that draws texts.
        labels: numbers of the classes by their names.
        max_latents: latents per group at full budget; 0 of a plain model.
        min_latents: fewest that it was trained with.
        lowest: fewest that a request may ask for.
        size: width and height of its pictures, in pixels.
        way: how it draws where a request doesn't say.
        latents: likewise, latents per group.
        ladder: latents per group that control may choose, highest first.
        points: of the sweep; none without one.
        calls: seconds of forwards; see Prices.
        fixed: likewise.
        calls_per_step: likewise.
        batch_size: pictures of the largest batch.
        device: what it draws on.
        front: where way and ladder are from, in words.
    """

    name: str
    num_classes: int | None
    labels: Mapping[str, int]
    max_latents: int
    min_latents: int
    lowest: int
    size: tuple[int, int]
    way: Way
    latents: int
    ladder: Sequence[int]
    points: Sequence[Point]
    calls: Mapping[int, Sequence[float]]
    fixed: Sequence[float]
    calls_per_step: float
    batch_size: int
    device: str
    front: str

    def budget(self, latents: int) -> float:
        """Fraction of the latents that are kept."""
        return latents / self.max_latents if self.max_latents else 1.0
