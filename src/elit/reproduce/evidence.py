"""What claims are judged by: values of each seed, the rule, rows of the table, figures."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from elit.choosing.points import OperatingPoint
from elit.reproduce.runs import Piece, Training, Trainings
from elit.reproduce.scales import Scale, Size

RULE = (
    "Each seed gives one difference between the two sides, both trained from that seed on the same "
    "batches and measured on the same pictures and noise. Where the mean difference is beyond two "
    "standard errors (over seeds) in the claim's direction, the claim holds; beyond two in the "
    "other direction, it does not hold; else, and with a single seed, it is undecided. Over "
    "budgets, the difference is that of the lowest and the full one; a budget that is better than "
    "the next larger one beyond two standard errors makes it not hold. The rule is lenient: a "
    "claim without any truth in it holds once in eleven times with three seeds, once in seven with "
    "two (Student's t)."
)
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
NOT_DEFINED = "not defined"  # in place of a verdict, of a number that no seed has
LOSS_ONLY = "not measured at this scale: loss only"

Figure = dict[str, Any]  # of plain types; `report.py` draws it


class Values(tuple[float, ...]):
    """A number of each seed; the two sides of a claim are subtracted seed by seed."""

    def __sub__(self, other: "Values") -> "Values":
        return Values(a - b for a, b in zip(self, other, strict=True))

    def times(self, factor: float) -> "Values":
        return Values(factor * value for value in self)

    @property
    def mean(self) -> float:
        return sum(self) / len(self)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None of fewer than two values."""
        if len(self) < 2:
            return None
        variance = sum((value - self.mean) ** 2 for value in self) / (len(self) - 1)
        return math.sqrt(variance / len(self))

    def __format__(self, spec: str) -> str:
        text, error = format(self.mean, spec or ".4f"), self.error
        return text if error is None else f"{text} ± {format(error, spec or '.4f')}"


@dataclass(frozen=True)
class Verdict:
    """What differences say of a claim."""

    word: str  # HOLDS, FAILS or UNDECIDED
    difference: float | None  # mean over seeds, above 0 in the claim's direction; None without any
    error: float | None  # its standard error over seeds; None of fewer than two
    seeds: int  # how many


def judge(differences: Sequence[float]) -> Verdict:
    """Apply the rule to one difference for each seed, above 0 where the claim holds."""
    values = Values(differences)
    if not values:
        return Verdict(UNDECIDED, None, None, 0)
    difference, error, word = values.mean, values.error, UNDECIDED
    if error is not None and abs(difference) > 2 * error:
        word = HOLDS if difference > 0 else FAILS
    return Verdict(word, difference, error, len(values))


def judge_order(rows: Sequence[Values]) -> Verdict:
    """Whether the last row is above the first one, and no row is below the one before it.

    Steps may be too small to be told from none; one beyond two standard errors against the order
    is enough to fail.
    """
    whole = judge(rows[-1] - rows[0])
    steps = [judge(above - below) for below, above in itertools.pairwise(rows)]
    return replace(whole, word=FAILS) if any(step.word == FAILS for step in steps) else whole


def judge_reach(shares: Values, reached: int) -> Verdict:
    """Judge shares of which some may be of seeds that never reach the goal."""
    verdict = judge(Values(1 - share for share in shares))
    if reached == 0 and len(shares) > 1:
        return replace(verdict, word=FAILS)
    if reached < len(shares) and verdict.word == HOLDS:
        return replace(verdict, word=UNDECIDED)
    return verdict


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str  # the claim
    paper: str  # its figure
    here: str = "-"  # ours
    control: str = "-"  # what it is held against
    verdict: Verdict | None = None  # None where nothing was measured, or a count needs none
    note: str = ""  # in place of a verdict

    @property
    def word(self) -> str:
        return self.note if self.verdict is None else self.verdict.word

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "word": self.word}


@dataclass(frozen=True)
class Finding:
    """What came of a claim: what its figures show, rows of the table, and the figures."""

    sentence: str
    rows: list[Row]
    figures: list[Figure] = field(default_factory=list)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper."""

    letter: str  # its name on the command line
    title: str  # what is claimed
    sentence: str  # what the figures show, with numbers of the scale by their names
    trains: tuple[str, ...]  # variants, at equal FLOPs
    tell: Callable[..., Iterator[Row | Figure]]  # of a study and the models of these variants
    few: bool = False  # whether with fewer seeds
    all_sizes: bool = False  # whether at all sizes of the scale, or only the first
    steps: Callable[[Scale], int] | None = None  # of these models and not of equal cost
    also: "Callable[[Study], Iterable[Piece]] | None" = None  # pieces beyond these trainings
    by_samples: tuple[str, str] | None = None  # claim and figure, where only samples can tell

    def models(self, study: "Study") -> "list[Models]":
        """Models that it trains, of the scale's first size."""
        steps = self.steps(study.scale) if self.steps else None
        return [study.models(variant, None, self.few, steps) for variant in self.trains]

    def needs(self, study: "Study") -> list[Piece]:
        """Pieces that it is judged by."""
        if self.by_samples and not study.scale.samples:
            return []
        models = self.models(study)
        if self.all_sizes:
            models = [form.at(size) for size in study.scale.sizes for form in models]
        pieces = [piece for form in models for piece in form.trained]
        return [*pieces, *self.also(study)] if self.also else pieces

    def find(self, study: "Study") -> Finding:
        """Judge it."""
        if self.by_samples and not study.scale.samples:
            return Finding(LOSS_ONLY, [Row(*self.by_samples, note=LOSS_ONLY)])
        told = list(self.tell(study, *self.models(study)))
        rows = [one for one in told if isinstance(one, Row)]
        figures = [one for one in told if not isinstance(one, Row)]
        return Finding(self.sentence.format(**vars(study.scale)), rows, figures)


class Models:
    """The trainings of one variant, one for each seed, and what was measured of them."""

    def __init__(self, study: "Study", trainings: Sequence[Training]):
        self.study, self.trainings, first = study, trainings, trainings[0]
        self.title, self.size = first.form.title, first.size.name
        self.steps, self.step_flops = first.steps, first.step_flops
        self.trained = [study.train(training) for training in trainings]

    def at(self, size: Size) -> "Models":
        """The same variant of another size."""
        return self.study.models(self.trainings[0].variant, size)

    @property
    def looked(self) -> list[Piece]:
        return [self.study.look(training) for training in self.trainings]

    def drawn(self, point: OperatingPoint) -> list[Piece]:
        return [self.study.draw(training, point) for training in self.trainings]

    def results(self, pieces: Iterable[Piece]) -> list[Mapping[str, Any]]:
        return [self.study.results[piece.key] for piece in pieces]

    @property
    def budgets(self) -> list[str]:
        """Budgets at which the loss is measured, the largest first."""
        return list(self.results(self.trained)[0]["losses"])

    def loss(self, budget: str = "1") -> Values:
        """Held-out loss, with the first latents."""
        return Values(result["losses"][budget]["loss"] for result in self.results(self.trained))

    def random_loss(self, budget: str) -> Values:
        """Held-out loss with random latents."""
        return Values(result["random"][budget] for result in self.results(self.trained))

    @property
    def curves(self) -> list[list[tuple[int, float]]]:
        """Held-out loss by step, of each seed."""
        return [result["curve"] for result in self.results(self.trained)]

    def score(self, name: str, *points: OperatingPoint) -> Values:
        """A score of samples, mean over points."""
        columns = zip(*(self.results(self.drawn(point)) for point in points), strict=True)
        return Values(Values(result[name] for result in column).mean for column in columns)

    def distance(self, *points: OperatingPoint) -> Values:
        return self.score("frechet", *points)

    def accuracy(self, *points: OperatingPoint) -> Values:
        return self.score("accuracy", *points)

    def flops(self, point: OperatingPoint) -> float:
        """Sampling FLOPs of a picture."""
        return self.score("flops", point).mean

    def in_words(self, *points: OperatingPoint) -> str:
        """What samples were found to be."""
        return f"Frechet {self.distance(*points):.2f}, accuracy {self.accuracy(*points):.3f}"

    def real(self, point: OperatingPoint) -> str:
        """The classifier's accuracy on real pictures, in words."""
        return f"real pictures: accuracy {self.score('real_accuracy', point).mean:.3f}"


class Study(Trainings):
    """Models of a study by what they are, and results of its pieces once there are any."""

    results: Mapping[str, Mapping[str, Any]] = {}

    def models(
        self, variant: str, size: Size | None = None, few: bool = False, steps: int | None = None
    ) -> Models:
        """A variant's trainings of all seeds or of fewer, at equal FLOPs or of so many steps."""
        seeds = range(self.scale.few_seeds if few else self.scale.seeds)
        return Models(self, [self.training(variant, seed, size, steps) for seed in seeds])

    def samples(self, variant: str, *points: OperatingPoint) -> list[Piece]:
        """Pieces that train a variant and draw its samples; none where loss is all."""
        if not self.scale.samples:
            return []
        models = self.models(variant)
        return [*models.trained, *(piece for point in points for piece in models.drawn(point))]

    def unguided(self, budget: float = 1.0) -> OperatingPoint:
        """Samples without guidance."""
        return OperatingPoint(budget, self.scale.sampling_steps)


def series(label: str, x: Iterable[float], rows: Iterable[Values]) -> Figure:
    """A line of a figure: at each x the mean of a row's values, with their error."""
    rows = list(rows)
    y, error = [row.mean for row in rows], [row.error or 0.0 for row in rows]
    return {"label": label, "x": list(x), "y": y, "error": error}


def figure(kind: str, title: str, x: str, y: str, series: list[Figure], **more: Any) -> Figure:
    """A figure: "lines", "bars", "points" or "scatter", with the names of its axes."""
    return {"kind": kind, "title": title, "x": x, "y": y, "series": series, **more}
