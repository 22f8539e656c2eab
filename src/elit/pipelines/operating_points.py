"""Operating points: budget, steps and guide of a pipeline, measured by a sweep, chosen by a cap."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elit._files import typed_path
from elit._numbers import is_real
from elit.flow.guidance import Guidance, make_guidance
from elit.interface.budget import format_budget
from elit.pipelines.sweep_file import read_sweep


@dataclass(frozen=True)
class OperatingPoint:
    """One way to draw.

    Attributes:
        budget: fraction of the latents kept.
        steps: of the sampler.
        guidance: "none", "cfg", "ag" or "ccfg".
        scale: of guidance; None without.
        guide_budget: the guide's, of "ag" and "ccfg"; None is the lowest trained.
        interval: noise levels in which guidance acts; None is everywhere.
    """

    budget: float = 1.0
    steps: int = 40
    guidance: str = "none"
    scale: float | None = None
    guide_budget: float | None = None
    interval: tuple[float, float] | None = None

    def make_guidance(self) -> Guidance | None:
        """What the pipeline is given."""
        scale = 2.0 if self.scale is None else self.scale
        interval = (0.0, 1.0) if self.interval is None else self.interval
        return make_guidance(self.guidance, scale, self.guide_budget or "lowest", interval)

    def guide(self) -> str:
        """Its guidance in words: 'ccfg 3, guide 1/16'."""
        if self.guidance == "none":
            return "none"
        words = f"{self.guidance} {self.scale:g}"
        if self.guide_budget is not None:
            words += f", guide {format_budget(self.guide_budget)}"
        if self.interval is not None:
            words += f", levels {self.interval[0]:g} to {self.interval[1]:g}"
        return words

    def __str__(self) -> str:
        return f"budget {format_budget(self.budget)}, {self.steps} steps, guidance {self.guide()}"

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "OperatingPoint":
        """Of a row of a sweep's file, which holds more."""
        interval = row.get("interval")
        fields = {name: row.get(name) for name in ("scale", "guide_budget")}
        return cls(
            float(row["budget"]), int(row["steps"]), str(row["guidance"]),
            interval=None if interval is None else (float(interval[0]), float(interval[1])),
            **fields,
        )  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A point with its score and its cost.

    Attributes:
        point: how it was drawn.
        score: as the sweep ranks.
        flops: of all calls for one image, the autoencoder's apart.
        warnings: of the score.
    """

    point: OperatingPoint
    score: float
    flops: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class OperatingPoints:
    """What a sweep measured of a pipeline.

    Attributes:
        points: all points that have a score.
        ranked_by: name of the score.
        lower_is_better: its direction.
        weights: digest of the weights that were measured.
        sampler: name of the scheduler's class.
        sampler_settings: digest of its settings; None where the file has none.
        size: of the images, in pixels, frames first.
        text_tokens: length of the texts that the costs are of; None of classes.
        file: where this came from.
    """

    points: Sequence[Measured]
    ranked_by: str
    lower_is_better: bool
    weights: str | None
    sampler: str
    sampler_settings: str | None
    size: tuple[int, ...]
    text_tokens: int | None
    file: Path

    @classmethod
    def load(cls, file: str | os.PathLike) -> "OperatingPoints":
        """Read `sweep.json`, or the folder that it lies in."""
        path = Path(typed_path(file))
        path = path / "sweep.json" if path.is_dir() else path
        if not path.exists():
            raise ValueError(f"there is no {path}; `elit sweep RUN` measures and writes it")
        report = read_sweep(path)
        ranked_by, settings = report["ranked_by"], report["settings"]
        points = [
            Measured(
                OperatingPoint.from_dict(row),
                float(row["scores"][ranked_by]),
                row["gflops_per_image"] * 1e9,
                tuple(row.get("warnings") or ()),
            )
            for row in report["rows"]
            if row["scores"].get(ranked_by) is not None
        ]
        if not points:
            raise ValueError(f"{path} has no row with a {ranked_by}; run `elit sweep` to its end")
        return cls(
            points, ranked_by, report["lower_is_better"], report["model"]["weights"],
            settings["sampler"], settings.get("sampler_settings"), tuple(settings["size"]),
            settings.get("text_tokens"), path,
        )  # fmt: skip

    def choose(
        self, allowed: Sequence[Measured], costs: Sequence[Sequence[float]], caps: Sequence[float]
    ) -> int | None:
        """Place of the best point within all caps, of equal scores the cheapest; None if none is.

        Args:
            allowed: points to choose from.
            costs: of each, one for each cap.
            caps: most that each may be.
        """
        sign = 1 if self.lower_is_better else -1
        within = [
            (sign * measured.score, *cost, i)
            for i, (measured, cost) in enumerate(zip(allowed, costs, strict=True))
            if all(c <= cap for c, cap in zip(cost, caps, strict=True))
        ]
        return int(min(within)[-1]) if within else None


def default_home(name: str) -> Path:
    """Folder that results of a pipeline go to: its own, or of one on the hub one under runs/."""
    return Path(name) if Path(name).is_dir() else Path("runs") / Path(name).name


def check_cap(value: Any, name: str) -> float:
    """A cap on cost, or a ValueError."""
    if is_real(value) and value > 0:
        return float(value)
    raise ValueError(f"{name}={value!r:.40} is not allowed; give a positive number")
