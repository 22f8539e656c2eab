"""The state of a training run: what the loop acts on, how it is made, saved and resumed."""

import contextlib
import errno
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from elit._files import remove_leftovers, replace_files, write_text
from elit._portable import CARD_FILE
from elit._random import generator
from elit._signals import ignore_signals
from elit.data import WholeBatches
from elit.data.order import StepBatches
from elit.training.alignment import Alignment
from elit.training.build import (
    DataSets,
    MakeModel,
    build_parts,
    check_draws,
    latents_to_show,
    read_data,
    sigma_density,
    tail_dropping,
    warn_of_width,
)
from elit.training.checkpoint import Checkpoints, checkpoint_steps, run_tensors, step_name
from elit.training.config import PREPARED, TrainConfig
from elit.training.distributed import Parallel, World, half_dtype, whole
from elit.training.finetune import without_lora
from elit.training.metrics import MetricsLog, draw_curves
from elit.training.optimizer import Average, Optimizer
from elit.training.resume import (
    check_same_data,
    check_same_run,
    fixed_settings,
    last_step,
    read_state,
)
from elit.training.validation import sample_sheet, validation_losses, worth_of_parts
from elit.training.watch import Monitor, PartLatents, watch_interface
from elit.viz.sheet import save_image

logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """Loss, gradient or weights are no longer finite."""


class Run:
    """Model, moving average, optimiser, data and files of a run, fresh or resumed."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        make_model: MakeModel | None = None,
        data: DataSets | None = None,
    ):
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self.config, self.world = config, world
        self.folder = Path(config.output_dir)
        self.dataset, self.held_out = data = data or read_data(config)
        check_same_data(data, world)
        self.density = sigma_density(config)
        parts = build_parts(config, self.dataset, world, make_model)
        self.model, self.conditioning, self.distillation, self.frozen = parts
        if world.is_main:
            warn_of_width(self.model)
        self.dropping = tail_dropping(config, self.model)
        # A retrofit is shown at full budget too, where it may be the untrained original.
        is_retrofit = config.retrofit.base is not None
        most = None if is_retrofit or self.dropping is None else self.dropping.max_latents
        self.shown_latents = latents_to_show(self.model, config.sample.budgets, most)
        if config.train.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if config.train.compile:
            self.model.compile_repeated_blocks(fullgraph=True)
        # The last block of a foreign model may have parameters for a text that nobody reads.
        self.parallel = Parallel(self.model, config.train, world, some_unused=is_retrofit)
        self.alignment, projector = None, None
        if config.alignment.weight:
            self.alignment = Alignment(self.model, self.dataset, config, world)
            projector = self.alignment.parallel.model
            self.dataset.with_features = config.alignment.encoder == PREPARED
        self.optimizer = Optimizer(self.model, config, world, projector)
        self.trained = self.optimizer.trained
        self.average = Average(self.trained, config.optimizer.ema)
        # Micro-batches are numbered over all processes, so that P processes draw what one
        # process with P-fold accumulation draws.
        accumulation = config.train.accumulation
        self.chunks = range(world.rank * accumulation, (world.rank + 1) * accumulation)
        check_draws(config, world.size * accumulation)
        self._order = partial(
            StepBatches, len(self.dataset), config.data.batch_size, self.chunks,
            world.size * accumulation, seed=config.seed, buckets=self.dataset.buckets or (),
        )  # fmt: skip

        self._patient_group = world.new_cpu_group()  # to wait in for what takes long
        folder, keep = self.folder / "checkpoints", config.train.keep_checkpoints
        self.checkpoints = Checkpoints(folder, world, keep)
        self.step = self._resume()
        self._exported_step: int | None = None  # a kill may have come before the last export
        if world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints.remove_leftovers()
            remove_leftovers(self.folder)
            text = yaml.safe_dump(config.from_anywhere().to_dict(), sort_keys=False)
            write_text(self.folder / "config.yaml", text)
        self.log = MetricsLog(self.folder, self.step, config, world.is_main)
        seen = self.model, self.dataset, self.step
        self.monitor = Monitor(config, world, *seen, self.rows_of)

    @property
    def seconds(self) -> float:
        """Time that the run has taken, those before a resume included."""
        return self._seconds_before + time.perf_counter() - self._started

    def loader(self, steps: range) -> DataLoader:
        """This process's micro-batches of these steps."""
        workers = self.config.data.num_workers
        return DataLoader(
            WholeBatches(self.dataset), sampler=self._order(steps=steps), batch_size=None,
            num_workers=workers, worker_init_fn=ignore_signals, persistent_workers=workers > 0,
            pin_memory=self.world.device.type == "cuda",
        )  # fmt: skip

    def rows_of(self, step: int) -> list[int]:
        """Rows of the training data that this process sees in a step."""
        return [row for rows in self._order(steps=range(step, step + 1)) for row in rows]

    def draw_latents(self, step: int) -> tuple[PartLatents, Tensor | None]:
        """Latents per group of a step, the same on all processes, without a word between them.

        Returns:
            A number for each part of a batch, and the indices that the ablation keeps.
        """
        if self.dropping is None:
            return [None], None
        draw = generator(self.config.seed, "budget", step)
        part_latents = self.dropping.draw_strata(self.config.latents.draws, draw)
        # The fewest come last: processes look for unused parameters in the last forward, and at
        # full budget the interface may be one.
        return part_latents[::-1], self.dropping.choose(part_latents[0], draw)

    @contextlib.contextmanager
    def gradient_sync(self, last: bool) -> Iterator[None]:
        """Gradients are averaged over the processes with the last micro-batch only."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.parallel.gradient_sync(last))
            if self.alignment is not None:
                stack.enter_context(self.alignment.parallel.gradient_sync(last))
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """Precision of the forward."""
        precision = self.config.train.precision
        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, half_dtype(precision))

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with its moving average in place, ready to sample."""
        # Shards are gathered in the precision of training, a copy is called in its own.
        precision = self.autocast() if self.parallel.is_sharded else contextlib.nullcontext()
        self.model.eval()
        try:
            with self.average.in_place(), precision:
                yield
        finally:
            self.model.train()

    def progress_bar(self, shown: bool) -> tqdm:
        """Bar over the steps, on the main process."""
        return tqdm(
            total=self.config.train.steps, initial=self.step, desc="training", unit="step",
            disable=not (shown and self.world.is_main), dynamic_ncols=True,
        )  # fmt: skip

    def after_step(
        self, step: int, part_latents: PartLatents, loss: Tensor, grad_norm: Tensor, bar: tqdm
    ) -> None:
        """Log, validate, draw and save when due; a run ends with a validation and a sheet."""
        loop, self.step = self.config.train, step
        is_last = step == loop.steps
        if self.alignment is not None:
            aligned = self.alignment.of_step()
            loss = loss - self.config.alignment.weight * aligned  # the velocity's alone
        values = self.monitor.after_step(step, part_latents, loss, grad_norm)
        if values is not None:
            images = f"{values['images_per_second']:.0f}/s"
            bar.set_postfix(loss=f"{values['loss']:.4f}", images=images, refresh=False)
            if self.alignment is not None:
                values["alignment"] = self.world.mean(aligned).item()
            values["lr"] = self.optimizer.lr
            if self.optimizer.scaler.is_enabled():
                values["loss_scale"] = self.optimizer.scaler.get_scale()
            self.log.write(self.step, **values)
        with self.monitor.paused():
            if _is_due(step, loop.validate_every, is_last):
                self.validate()
            if self.conditioning.draws and _is_due(step, loop.sample_every, is_last):
                self.draw_sheet()
            if _is_due(step, loop.checkpoint_every):
                self.save()

    def validate(self) -> None:
        """Measure held-out losses and what the core is worth; log, and warn of what looks wrong."""
        data, seed = (self.held_out, self.conditioning, self.density), self.config.seed
        with self.averaged_weights():
            with watch_interface(self.model) as probe:
                losses = validation_losses(self.model, *data, self.shown_latents, seed, self.world)
            worth = worth_of_parts(losses, self.model, *data, seed, self.world)
        seen = probe.values(self.world)
        self.log.write(self.step, **self.monitor.after_validation(self.step, losses, seen, worth))
        if self.world.is_main:
            draw_curves(self.folder)

    def draw_sheet(self) -> None:
        """Draw samples at every budget with the averaged weights."""
        config = self.config
        # Shards are called together, a copy by the main process alone.
        if self.world.is_main or self.parallel.is_sharded:
            with self.averaged_weights():
                sheet = sample_sheet(
                    self.conditioning,
                    self.held_out,
                    config.pictures,
                    self.shown_latents,
                    config.seed,
                )
            if self.world.is_main:
                save_image(sheet, self.folder / "samples" / f"{step_name(self.step)}.png")
        self.world.barrier(self._patient_group)

    def save(self) -> None:
        """Begin a checkpoint, and write the averaged weights as a pipeline in the run's folder."""
        finite = all(whole(p.isfinite().all()) for p in self.trained)
        if any(self.world.any(not finite)):
            raise self.diverged(f"weights after step {self.step}")
        if self.step != self.checkpoints.begun:
            self.checkpoints.save(self.step, self._tensors(), self._state())
            if not self.checkpoints.saved:  # a pipeline alone could not be gone on with
                self.checkpoints.wait()
        if self.step != self._exported_step:
            with self.averaged_weights():
                model = self.parallel.whole_model()
                if self.world.is_main:
                    export = partial(self.conditioning.export, without_lora(model))
                    replace_files(self.folder, export, keep=[CARD_FILE])  # a person's
            self.world.barrier(self._patient_group)
        self._exported_step = self.step

    def finish(self) -> None:
        """Save, and wait until all is written."""
        self.save()
        self.checkpoints.wait()

    def _tensors(self) -> dict[str, Tensor]:
        projector = None if self.alignment is None else self.alignment.parallel.model
        averaged = self.average.shadow_params
        return run_tensors(self.model, averaged, self.optimizer.parts, projector)

    def _state(self) -> dict[str, Any]:
        return {
            "ema_steps": self.average.optimization_step,
            "seconds": self.seconds,
            "base": self.frozen,
            "in_use": self.dataset.in_use,
            "features": self.alignment and self.alignment.checksum,
            "config": fixed_settings(self.config, self.dataset.fingerprint),
            **self.optimizer.state(),
        }

    def _resume(self) -> int:
        """Load the last checkpoint, if there is one; the number of steps done."""
        folder = self.checkpoints.folder
        steps = self.world.gather(max(checkpoint_steps(folder), default=0))
        step = last_step(self.folder, steps, self.config.train.steps)
        if step:
            check_same_run(folder / step_name(step), self.config, self.frozen, self.dataset)
            if self.alignment is not None:
                path = folder / step_name(step)
                self.alignment.check_same(read_state(path).get("features"), path)
            state = self.checkpoints.load(step, self._tensors(), ("ema_steps", "seconds", "scaler"))
            self.average.optimization_step = state["ema_steps"]
            self._seconds_before = state["seconds"]
            self.optimizer.load_state(state)
        if self.world.is_main and 0 < step < self.config.train.steps:
            logger.info("resuming %s at step %d", self.folder, step)
        return step

    def diverged(self, what: str) -> TrainingDivergedError:
        """The error that tells a user whose run went wrong what to do."""
        with contextlib.suppress(OSError):  # that is of the step before, and less bad
            self.checkpoints.wait()
        saved = f"step {self.checkpoints.saved}" if self.checkpoints.saved else "none yet"
        return TrainingDivergedError(
            f"{what}: not finite. Nothing of it was saved (last checkpoint: {saved}). Look at "
            f"{self.log.path} for where it began; a lower optimizer.lr, a longer "
            f"optimizer.warmup_steps or train.precision=fp32 usually help; also check the data"
        )

    def unsaved(self) -> OSError:
        """The error of a checkpoint that some process could not write."""
        try:
            self.checkpoints.wait()
        except OSError as error:
            return error
        return OSError(errno.EIO, "another process could not write it, and says why", self.folder)

    def close(self) -> None:
        """Close the files, and let go of what the process group must outlive."""
        self.log.close()
        self.parallel.close()
        if self.alignment is not None:
            self.alignment.close()


def _is_due(step: int, every: int, is_last: bool = False) -> bool:
    return every > 0 and (is_last or step % every == 0)
