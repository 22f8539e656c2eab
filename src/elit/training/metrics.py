"""Metrics of a run: one JSON object a line; TensorBoard and Weights & Biases where asked for."""

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from elit._extras import missing
from elit._files import write_json, write_text
from elit.training.config import TrainConfig
from elit.viz.charts import COLOURS, picture, ramp, run_chart
from elit.viz.sheet import save_image

FILE = "metrics.jsonl"


class Sink(Protocol):
    """Somewhere that metrics go. Slashes in names group charts."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step."""

    def close(self) -> None:
        """Flush everything."""


class MetricsLog:
    """Writes metrics to every sink of a run, from a step on; metrics.jsonl is always one of them.

    One process of a run is active, the others write nothing.
    """

    def __init__(self, folder: Path, step: int, config: TrainConfig, active: bool = True):
        self.path = folder / FILE
        self.sinks: list[Sink] = []
        if not active:
            return
        self.sinks.append(JsonLines(self.path, step))
        if config.train.tensorboard:
            self.sinks.append(TensorBoard(folder, step))
        if config.train.wandb is not None:
            self.sinks.append(WeightsAndBiases(folder, config.train.wandb, config.to_dict()))

    def write(self, step: int, **values: float) -> None:
        """Add the values of a step."""
        for sink in self.sinks:
            sink.write(step, values)

    def close(self) -> None:
        """Flush everything."""
        for sink in self.sinks:
            sink.close()
        self.sinks = []


class JsonLines:
    """Appends a JSON object a line; what a killed run wrote beyond its checkpoint is dropped."""

    def __init__(self, path: Path, step: int):
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        write_text(path, "".join(line for line in lines if _step_of(line) <= step))
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard's files, in a folder of the run's."""

    def __init__(self, folder: Path, step: int):
        writer = summary_writer_class()
        self._writer = writer(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases: the same one after every resume, its id is kept in the folder.

    The charts go over a `step` of their own: W&B's own step may not go back, as after a kill.
    WANDB_MODE=offline writes into the run's folder alone; `wandb sync --append` sends it later.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]):
        wandb = wandb_module()
        notes = folder / "wandb.json"
        try:
            known = json.loads(notes.read_text())
        except (OSError, ValueError):
            known = {}
        same = isinstance(known, dict) and known.get("project") == project
        try:
            self._run = wandb.init(
                project=project,
                id=known.get("id") if same else None,  # None: W&B makes one
                resume="allow",
                name=folder.resolve().name,
                dir=str(folder),
                config=dict(config),
                settings=wandb.Settings(console="off"),  # the progress bar stays as it is
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"Weights & Biases cannot begin a run in the project {project!r}: {error}; run "
                f"`wandb login`, set WANDB_MODE=offline, or leave train.wandb out"
            ) from error
        self._run.define_metric("*", step_metric="step")
        write_json(notes, {"project": project, "id": self._run.id})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def summary_writer_class() -> type:
    """TensorBoard's writer, or the error that says how to install it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        needs = "train.tensorboard needs TensorBoard, which is not installed"
        raise ValueError(missing(needs, "tensorboard", "leave it off")) from error
    return SummaryWriter


def wandb_module() -> ModuleType:
    """The package of Weights & Biases, or the error that says how to install it."""
    try:
        import wandb
    except ImportError as error:
        needs = "train.wandb needs Weights & Biases, which is not installed"
        raise ValueError(missing(needs, "wandb", "leave it out")) from error
    return wandb


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric of a metrics.jsonl, as its (step, value) pairs."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
            points = {name: (step, float(value)) for name, value in values.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            continue  # the torn last line of a killed run
        for name, point in points.items():
            series.setdefault(name, []).append(point)
    return series


def draw_curves(folder: Path) -> None:
    """Draw a run's losses over its steps into its folder: curves.png."""
    series = read_metrics(folder / FILE)
    prefix = "validation/loss_"
    budgets = [name.removeprefix(prefix) for name in series if name.startswith(prefix)]
    budgets.sort(key=lambda budget: float(Fraction(budget)))
    validation = {f"budget {budget}": series[prefix + budget] for budget in budgets}
    colours = ramp(len(budgets))
    charts = [
        run_chart("validation loss at each budget, averaged weights", "loss", validation, colours)
    ]
    for name, title in (("loss", "training loss and its running mean"),
                        ("grad_norm", "gradient norm and its running mean")):  # fmt: skip
        if name in series:
            own = {name: series[name]}
            charts.append(run_chart(title, name.replace("_", " "), own, COLOURS, smooth=True))
    save_image(picture(charts), folder / "curves.png")


def _step_of(line: str) -> float:
    """Step of a line; infinity for the torn last line of a killed run."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return float("inf")
