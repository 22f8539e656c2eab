"""The pieces of a study's work: each is done once, and its result is a JSON file."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from elit._files import write_json
from elit._plain import read_json
from elit.choosing.points import OperatingPoint
from elit.reproduce.measure import Bench, curve
from elit.reproduce.runs import Training, Trainings, describe
from elit.training.loop import train
from elit.training.validation import MAX_SAMPLES


class StoppedError(Exception):
    """A signal asked to stop, and what there was is saved."""


@dataclass(frozen=True)
class Piece:
    """A training with the loss it came to, or something measured of a trained model.

    Attributes:
        key: of its result, a file name without its ending.
        training: that it is, or whose model it measures.
        kind: "train", "draw" or "look".
        cost: FLOPs, for the bar.
        point: how to draw.
    """

    key: str
    training: Training
    kind: str
    cost: float
    point: OperatingPoint | None = None

    @property
    def needs(self) -> str | None:
        """Key of the piece that comes before."""
        return None if self.kind == "train" else train_key(self.training)

    def file(self, folder: Path) -> Path:
        """Where its result is."""
        return folder / "pieces" / f"{self.key}.json"


def train_key(training: Training) -> str:
    """Key of a training's piece."""
    return f"train-{training.name}"


class Pieces:
    """Makes pieces, and does them.

    Args:
        trainings: of the study.
    """

    def __init__(self, trainings: Trainings):
        self.trainings, self.scale = trainings, trainings.scale

    @cached_property
    def bench(self) -> Bench:
        """What measures."""
        return Bench(self.trainings.data, self.scale.images, self.scale.device)

    def train(self, training: Training) -> Piece:
        """The piece that trains a model and measures its loss."""
        every = self.trainings.config(training).train.validate_every
        step = 3 * self.scale.batch_size  # forwards
        choices = len(self.budgets(training)) * (1 + self.random_sets(training))
        extra = training.steps / every * min(MAX_SAMPLES, self.scale.images) / step
        extra += choices * self.scale.images / step
        cost = training.flops + extra * training.step_flops
        return Piece(train_key(training), training, "train", cost)

    def draw(self, training: Training, point: OperatingPoint) -> Piece:
        """The piece that draws and judges samples."""
        words = str(point).replace(", ", "-").replace(" ", "-").replace("/", "of")
        cost = self.scale.samples * self.sampling_flops(training.variant, point)
        return Piece(f"draw-{training.name}-{words}", training, "draw", cost, point)

    def look(self, training: Training) -> Piece:
        """The piece that looks at Read's attention."""
        forwards = self.scale.inspected * 4 * len(self.scale.sigmas)
        cost = forwards * self.trainings.forward_flops(training.variant, 1.0)
        return Piece(f"look-{training.name}", training, "look", cost)

    def sampling_flops(self, variant: str, point: OperatingPoint) -> float:
        """FLOPs of one picture, guides included."""
        guided = self.trainings.forward_flops(variant, point.budget)
        lowest = 1 / self.scale.group**2
        guide = {"none": 0, "cfg": guided}.get(
            point.guidance, self.trainings.forward_flops(variant, lowest) if point.scale else 0
        )
        return point.steps * (guided + guide)

    def budgets(self, training: Training) -> list[float]:
        """Budgets at which a training's loss is measured."""
        return Trainings.measured_budgets(training.variant, self.scale.group)

    def random_sets(self, training: Training) -> int:
        """Sets of random latents at each of them."""
        counts = training.variant == "elit-mb" and training.size == self.scale.sizes[0]
        return self.scale.random_sets if counts else 0

    def do(self, piece: Piece) -> dict[str, Any]:
        """Do a piece, unless it was done; its result.

        Raises:
            StoppedError: if a signal stopped it; the same again goes on.
        """
        folder = self.trainings.folder
        file = piece.file(folder)
        if file.exists():
            return read_json(file, "remove it, and the same command makes it anew")
        started = time.perf_counter()
        run = folder / "runs" / piece.training.name
        if piece.kind == "train":
            result, seconds = self._train(piece.training, run)
        elif piece.kind == "draw":
            assert piece.point is not None
            result, seconds = self.bench.draw(run, piece.point, self.scale.samples), 0.0
        else:
            model = self._model(piece.training, run)
            result = self.bench.look(model, self.scale.inspected, self.scale.sigmas)
            seconds = 0.0
        seconds = seconds or time.perf_counter() - started
        write_json(file, {"key": piece.key, **result, "seconds": seconds})
        return read_json(file, "remove it, and the same command makes it anew")

    def _train(self, training: Training, run: Path) -> tuple[Mapping[str, Any], float]:
        config = self.trainings.config(training)
        done = train(config, progress=False, make_model=Trainings.make_model(training.variant))
        if not done.finished or done.stopped:
            raise StoppedError
        started = time.perf_counter()
        model = self._model(training, run)
        found = self.bench.ladder(
            model, self.budgets(training), self.random_sets(training), training.seed
        )
        result = {**describe(training), **found, "curve": curve(run)}
        return result, done.seconds + time.perf_counter() - started

    def _model(self, training: Training, run: Path) -> Any:
        model_class = Trainings.model_class(training.variant)
        return model_class.from_pretrained(run / "transformer", use_safetensors=True)
