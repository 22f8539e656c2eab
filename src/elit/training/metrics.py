"""Metrics of a run: one JSON object a line, and TensorBoard where asked for."""

import json
from pathlib import Path

from elit._files import write_file


class MetricsLog:
    """Appends to metrics.jsonl; what a killed run wrote beyond its last checkpoint is dropped.

    Args:
        folder: of the run.
        step: step that the run goes on from.
        tensorboard: whether to write TensorBoard files too.
        active: whether to write anything: one process of a run does.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool, active: bool = True):
        self.path = folder / "metrics.jsonl"
        self.active, self._writer = active, None
        if not active:
            return
        if tensorboard:
            writer = summary_writer_class()
            self._writer = writer(str(folder / "tensorboard"), purge_step=step + 1)
        kept = "".join(line for line in self._lines() if _step_of(line) <= step)
        write_file(self.path, lambda aside: aside.write_text(kept))
        self._file = self.path.open("a")

    def _lines(self) -> list[str]:
        return (
            self.path.read_text(errors="replace").splitlines(keepends=True)
            if self.path.exists()
            else []
        )

    def write(self, step: int, **values: float) -> None:
        """Add one line: the step and its values. Slashes in names group TensorBoard's charts."""
        if not self.active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush everything."""
        if self.active:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def summary_writer_class() -> type:
    """TensorBoard's writer, or the error that says how to install it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "train.tensorboard needs TensorBoard, which is not installed; "
            "pip install 'elit-diffusion[tensorboard]', or leave it off"
        ) from error
    return SummaryWriter


def _step_of(line: str) -> float:
    """Step of a line; infinity for the torn last line of a killed run."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
