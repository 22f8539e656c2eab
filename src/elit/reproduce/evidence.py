"""What a claim is made of: the pieces that it needs, rows of the table, figures, a sentence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from elit.choosing.points import OperatingPoint
from elit.reproduce.pieces import Piece, Pieces
from elit.reproduce.runs import VARIANTS, Training
from elit.reproduce.scales import Scale, Size
from elit.reproduce.verdict import Verdict, mean, standard_error

LOSS_AXIS = "held-out loss (lower is better)"
FRECHET_AXIS = "Frechet distance (lower is better)"
NOT_DEFINED = "not defined"  # in place of a verdict, of a number that no seed has


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: the claim.
        paper: its figure.
        here: ours.
        control: what it is held against.
        verdict: None where nothing was measured, or a count needs none.
        note: in place of a verdict.
    """

    what: str
    paper: str
    here: str
    control: str
    verdict: Verdict | None = None
    note: str = ""

    @property
    def word(self) -> str:
        """The verdict, or what stands in its place."""
        return self.note if self.verdict is None else self.verdict.word

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {**asdict(self), "word": self.word}


@dataclass(frozen=True)
class Finding:
    """What came of a claim.

    Attributes:
        sentence: what the figures show.
        rows: of the table.
        figures: plain types; `report.py` draws them.
    """

    sentence: str
    rows: list[Row]
    figures: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        letter: its name on the command line.
        title: what is claimed.
        needs: pieces that it is judged by.
        find: judges it.
    """

    letter: str
    title: str
    needs: "Callable[[Study], list[Piece]]"
    find: "Callable[[Study], Finding]"


class Study:
    """Pieces of a study by what they are, and their results once there are any."""

    def __init__(self, pieces: Pieces):
        self.pieces, self.trainings = pieces, pieces.trainings
        self.results: Mapping[str, Mapping[str, Any]] = {}

    @property
    def scale(self) -> Scale:
        """All numbers of the study."""
        return self.pieces.scale

    def train(
        self, variants: Sequence[str], few: bool = False, size: Size | None = None, **more: Any
    ) -> list[Piece]:
        """Trainings of some variants, of all seeds or of fewer."""
        return [
            self.pieces.train(self.training(variant, seed, size, **more))
            for variant in variants
            for seed in self.seeds(few)
        ]

    def training(
        self, variant: str, seed: int, size: Size | None = None, steps: int | None = None
    ) -> Training:
        """One of them."""
        return self.trainings.training(variant, seed, size, steps)

    def seeds(self, few: bool = False) -> range:
        """Seeds of a training."""
        return range(self.scale.few_seeds if few else self.scale.seeds)

    def of(self, piece: Piece) -> Mapping[str, Any]:
        """Result of a piece."""
        return self.results[piece.key]

    def losses(
        self,
        variant: str,
        budget: str = "1",
        few: bool = False,
        size: Size | None = None,
        random: bool = False,
        **more: Any,
    ) -> list[float]:
        """Held-out losses of a variant, one for each seed."""
        found = [self.of(piece) for piece in self.train([variant], few, size, **more)]
        if random:
            return [result["random"][budget] for result in found]
        return [result["losses"][budget]["loss"] for result in found]

    def budgets(self, variant: str, size: Size | None = None) -> list[str]:
        """Budgets at which a variant's loss is measured, the largest first."""
        return list(self.of(self.train([variant], size=size)[0])["losses"])

    def draw(self, variant: str, points: Sequence[OperatingPoint]) -> list[Piece]:
        """A variant's trainings and its samples at some points; none where loss is all."""
        if not self.scale.samples:
            return []
        return self.train([variant]) + [
            self.pieces.draw(self.training(variant, seed), point)
            for point in points
            for seed in self.seeds()
        ]

    def scores(
        self, point: OperatingPoint, name: str = "frechet", variant: str = "elit-mb"
    ) -> list[float]:
        """A score of a variant's samples at a point, one for each seed."""
        trainings = [self.training(variant, seed) for seed in self.seeds()]
        return [self.of(self.pieces.draw(training, point))[name] for training in trainings]

    def drawn(self, point: OperatingPoint, variant: str = "elit-mb") -> str:
        """Distance and accuracy of a variant's samples at a point, in words."""
        return in_words(*(self.scores(point, name, variant) for name in ("frechet", "accuracy")))

    def real(self, point: OperatingPoint) -> str:
        """The classifier's accuracy on real pictures, in words."""
        return f"real pictures: accuracy {mean(self.scores(point, 'real_accuracy')):.3f}"

    def unguided(self, budget: float = 1.0) -> OperatingPoint:
        """Samples without guidance."""
        return OperatingPoint(budget, self.scale.sampling_steps)

    @staticmethod
    def title(variant: str) -> str:
        """Name of a variant."""
        return VARIANTS[variant].title


def with_error(values: Sequence[float], digits: int = 4, unit: str = "") -> str:
    """A mean with its standard error over seeds."""
    error = standard_error(values)
    text = f"{mean(values):.{digits}f}"
    return f"{text}{unit}" if error is None else f"{text} ± {error:.{digits}f}{unit}"


def in_words(frechet: Sequence[float], accuracy: Sequence[float]) -> str:
    """What samples were found to be."""
    return f"Frechet {with_error(frechet, 2)}, accuracy {with_error(accuracy, 3)}"


def less(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Differences of paired values, one - other."""
    return [a - b for a, b in zip(one, other, strict=True)]


def point(values: Sequence[float]) -> tuple[float, float]:
    """A mean and its error bar."""
    return mean(values), standard_error(values) or 0.0


def series(label: str, x: Sequence[float], rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A line of a figure: at each x the mean of a row's values, with their error."""
    pairs = [point(values) for values in rows]
    return {
        "label": label, "x": list(x), "y": [y for y, _ in pairs], "error": [e for _, e in pairs]
    }  # fmt: skip


def figure(kind: str, title: str, x: str, y: str, **more: Any) -> dict[str, Any]:
    """A figure: "lines", "bars" or "points", with the names of its axes."""
    return {"kind": kind, "title": title, "x": x, "y": y, **more}
