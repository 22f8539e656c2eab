"""Metrics of a run: one JSON object a line; TensorBoard and Weights & Biases where asked for."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

from elit._extras import missing
from elit._files import write_json, write_text
from elit.training.config import TrainConfig
from elit.viz.charts import COLOURS, picture, ramp, run_chart
from elit.viz.sheet import save_image

FILE = "metrics.jsonl"


class MetricsLog:
    """Writes metrics to every sink of a run, from a step on; metrics.jsonl is always one of them.

    One process of a run is active, the others write nothing. Slashes in names group charts.
    """

    def __init__(self, folder: Path, step: int, config: TrainConfig, active: bool = True):
        self.path = folder / FILE
        self._stack = ExitStack()  # what closes the sinks
        self._sinks: list[Callable[[int, Mapping[str, float]], Any]] = []
        if active:
            self._begin_lines(step)
        if active and config.train.tensorboard:
            self._begin_tensorboard(folder / "tensorboard", step)
        if active and config.train.wandb is not None:
            self._begin_wandb(folder, config.train.wandb, config)

    def write(self, step: int, **values: float) -> None:
        """Add the values of a step."""
        for sink in self._sinks:
            sink(step, values)

    def close(self) -> None:
        """Flush everything."""
        self._sinks.clear()
        self._stack.close()

    def _begin_lines(self, step: int) -> None:
        """Append a JSON object a line; what a killed run wrote beyond its checkpoint is dropped."""
        path = self.path
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        write_text(path, "".join(line for line in lines if _numbers(line)[0] <= step))
        file = self._stack.enter_context(path.open("a", buffering=1))
        self._sinks.append(
            lambda step, values: file.write(json.dumps({"step": step, **values}) + "\n")
        )

    def _begin_tensorboard(self, folder: Path, step: int) -> None:
        writer = summary_writer_class()(str(folder), purge_step=step + 1)
        self._stack.callback(writer.close)
        self._sinks.append(
            lambda step, values: [writer.add_scalar(*item, step) for item in values.items()]
        )

    def _begin_wandb(self, folder: Path, project: str, config: TrainConfig) -> None:
        """Go on with the same run of Weights & Biases after every resume: its folder has the id.

        The charts go over a `step` of their own: W&B's own step may not go back, as after a kill.
        WANDB_MODE=offline writes into the run's folder alone; `wandb sync --append` sends it later.
        """
        wandb, notes = wandb_module(), folder / "wandb.json"
        try:
            known = json.loads(notes.read_text())
        except (OSError, ValueError):
            known = {}
        same = isinstance(known, dict) and known.get("project") == project
        try:
            run = wandb.init(
                project=project,
                id=known.get("id") if same else None,  # None: W&B makes one
                resume="allow",
                name=folder.resolve().name,
                dir=str(folder),
                config=config.to_dict(),
                settings=wandb.Settings(console="off"),  # the progress bar stays as it is
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"Weights & Biases cannot begin a run in the project {project!r}: {error}; run "
                f"`wandb login`, set WANDB_MODE=offline, or leave train.wandb out"
            ) from error
        run.define_metric("*", step_metric="step")
        write_json(notes, {"project": project, "id": run.id})
        self._stack.callback(run.finish)
        self._sinks.append(lambda step, values: run.log({"step": step, **values}))


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


def _numbers(line: str) -> tuple[float, dict[str, float]]:
    """Step and values of a line; infinity and none for the torn last line of a killed run."""
    try:
        values = {name: float(value) for name, value in json.loads(line).items()}
        return int(values.pop("step")), values
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return math.inf, {}


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric of a metrics.jsonl, as its (step, value) pairs."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text(errors="replace").splitlines():
        step, values = _numbers(line)
        for name, value in values.items():
            series.setdefault(name, []).append((int(step), value))
    return series


def draw_curves(folder: Path) -> None:
    """Draw a run's losses over its steps into its folder: curves.png."""
    series = read_metrics(folder / FILE)
    prefix = "validation/loss_"
    budgets = [name.removeprefix(prefix) for name in series if name.startswith(prefix)]
    budgets.sort(key=lambda budget: float(Fraction(budget)), reverse=True)
    validation = {f"budget {budget}": series[prefix + budget] for budget in budgets}
    colours = ramp(len(budgets))[::-1]
    charts = [
        run_chart("validation loss at each budget, averaged weights", "loss", validation, colours)
    ]
    for name, title in (("loss", "training loss and its running mean"),
                        ("grad_norm", "gradient norm and its running mean")):  # fmt: skip
        if name in series:
            own = {name: series[name]}
            charts.append(run_chart(title, name.replace("_", " "), own, COLOURS, smooth=True))
    save_image(picture(charts, sentence=_told(validation)), folder / "curves.png")


def _told(validation: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """The last validation in a sentence."""
    if not validation:
        return ""
    (first, own), *others = validation.items()
    step, full = own[-1]
    text = f"At step {step} the validation loss is {full:.4f} at {first}"
    if others:
        last, low = others[-1][0], others[-1][1][-1][1]
        text += f" and {low:.4f} at {last}, {low / full - 1:+.1%}"
    return f"{text}."
