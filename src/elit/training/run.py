"""The state of a training run: what the loop acts on, how it is made, saved and resumed."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from elit._files import write_file
from elit.data import load_dataset
from elit.flow.objective import SigmaDensity
from elit.training.build import build_parts, check_draws, tail_dropping
from elit.training.checkpoint import (
    checkpoint_steps,
    load_checkpoint,
    lock_folder,
    remove_leftovers,
    replace_folder_files,
    save_checkpoint,
)
from elit.training.conditioning import OwnConditioning
from elit.training.config import TrainConfig, fixed_settings
from elit.training.distributed import World
from elit.training.metrics import MetricsLog
from elit.training.randomness import StepBatches, generator
from elit.training.retrofit import parameter_groups, without_lora
from elit.training.signals import ignore_signals
from elit.training.validation import (
    budgets_out_of_order,
    latents_to_show,
    sample_sheet,
    validation_losses,
)
from elit.viz.sheet import format_budget, save_image

logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """Loss, gradient or weights are no longer finite."""


class Run:
    """Model, moving average, optimiser, data and files of a run, fresh or resumed."""

    def __init__(self, config: TrainConfig, world: World):
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self.config, self.world = config, world
        self.folder = Path(config.output_dir)
        self.dataset = load_dataset(config.data.name, "train", **config.data.options)
        self.held_out = load_dataset(config.data.name, "validation", **config.data.options)
        objective = config.objective
        self.density = SigmaDensity(objective.density, objective.logit_mean, objective.logit_std)

        device = world.device
        self.model, self.conditioning, self.distillation = build_parts(config, self.dataset, device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.dropping = tail_dropping(config, self.model)
        # A retrofit is shown at full budget too, where it may be the untrained original.
        is_retrofit = config.retrofit.base is not None
        most = None if is_retrofit or self.dropping is None else self.dropping.max_latents
        self.kept = latents_to_show(self.model, config.sample.budgets, most)
        if config.train.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if config.train.compile:
            self.model.compile_repeated_blocks(fullgraph=True)
        # The last block of a foreign model may have parameters for a text that nobody reads.
        self.parallel_model = world.wrap(self.model, some_unused=config.retrofit.base is not None)
        self.ema = EMAModel(self.trained, decay=config.optimizer.ema, foreach=True)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.retrofit),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=world.device.type in ("cpu", "cuda"),
        )
        # Micro-batches are numbered over all processes, so that P processes draw what one
        # process with P-fold accumulation draws.
        accumulation = config.train.accumulation
        self.chunks = range(world.rank * accumulation, (world.rank + 1) * accumulation)
        check_draws(config, world.size * accumulation)

        self.step = self.saved_step = self._resume()
        self._exported_step: int | None = None  # a kill may have come before the last export
        if world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.folder)
            remove_leftovers(self.folder / "checkpoints")
            text = yaml.safe_dump(config.to_dict(), sort_keys=False)
            write_file(self.folder / "config.yaml", lambda aside: aside.write_text(text))
        tensorboard = config.train.tensorboard
        self.log = MetricsLog(self.folder, self.step, tensorboard, active=world.is_main)
        self._logged_at = (self.step, time.perf_counter())

    @property
    def seconds(self) -> float:
        """Time that the run has taken, those before a resume included."""
        return self._seconds_before + time.perf_counter() - self._started

    def loader(self, steps: range) -> DataLoader:
        """This process's micro-batches of these steps."""
        data = self.config.data
        sampler = StepBatches(
            len(self.dataset),
            data.batch_size,
            self.chunks,
            self.world.size * len(self.chunks),
            steps,
            self.config.seed,
        )
        return DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=data.num_workers,
            worker_init_fn=ignore_signals,
            persistent_workers=data.num_workers > 0,
            pin_memory=self.world.device.type == "cuda",
        )

    def draw_latents(self, step: int) -> tuple[Sequence[int | None], Tensor | None]:
        """Latents per group of a step, the same on all processes, without a word between them.

        Returns:
            A number for each part of a batch, and the indices that the ablation keeps.
        """
        if self.dropping is None:
            return [None], None
        draw = generator(self.config.seed, "budget", step)
        kept = self.dropping.draw_strata(self.config.latents.draws, draw)
        # The fewest come last: processes look for unused parameters in the last forward, and at
        # full budget the interface may be one.
        return kept[::-1], self.dropping.choose(kept[0], draw)

    def set_learning_rate(self, step: int) -> None:
        """Warm-up, then constant or cosine: a function of the step."""
        options = self.config.optimizer
        factor = min(1.0, (step + 1) / max(1, options.warmup_steps))
        if options.schedule == "cosine" and step >= options.warmup_steps:
            length = max(1, self.config.train.steps - options.warmup_steps - 1)
            done = (step - options.warmup_steps) / length
            cosine = (1 + math.cos(math.pi * done)) / 2
            factor = options.final_lr + (1 - options.final_lr) * cosine
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * factor * group["scale"]

    def autocast(self) -> AbstractContextManager[Any]:
        """Precision of the forward."""
        device, enabled = self.world.device.type, self.config.train.precision == "bf16"
        return torch.autocast(device, torch.bfloat16, enabled=enabled)

    def gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over the processes with the last micro-batch only."""
        if isinstance(self.parallel_model, DistributedDataParallel) and not last:
            return self.parallel_model.no_sync()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with its moving average in place, ready to sample."""
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)
        self.model.eval()
        try:
            yield
        finally:
            self.ema.restore(self.trained)
            self.model.train()

    def progress_bar(self, shown: bool) -> tqdm:
        """Bar over the steps, on the main process."""
        return tqdm(
            total=self.config.train.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not (shown and self.world.is_main),
            dynamic_ncols=True,
        )

    def after_step(self, step: int, loss: Tensor, grad_norm: Tensor, bar: tqdm) -> None:
        """Log, validate, draw and save when their time has come."""
        loop, self.step = self.config.train, step
        if _due(step, loop.log_every):
            self._log_step(self.world.mean(loss).item(), grad_norm.item(), bar)
        paused = time.perf_counter()
        if self.world.is_main and _due(step, loop.validate_every):
            self.validate()
        if self.world.is_main and self.conditioning.draws and _due(step, loop.sample_every):
            self.draw_sheet()
        if _due(step, loop.checkpoint_every):
            self.save()
        since, then = self._logged_at
        self._logged_at = (since, then + time.perf_counter() - paused)  # speed is of steps alone

    def _log_step(self, loss: float, grad_norm: float, bar: tqdm) -> None:
        since, then = self._logged_at
        now = time.perf_counter()
        images = (self.step - since) * self.config.data.batch_size / (now - then)
        self._logged_at = (self.step, now)
        bar.set_postfix(loss=f"{loss:.4f}", images=f"{images:.0f}/s", refresh=False)
        lr = self.optimizer.param_groups[0]["lr"]
        values = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "images_per_second": images}
        self.log.write(self.step, **values)

    def validate(self) -> None:
        """Measure the held-out loss at every budget, log it, and warn of budgets out of order."""
        with self.averaged_weights():
            losses = validation_losses(
                self.model, self.held_out, self.conditioning, self.density, self.kept,
                self.config.seed, self.world.device,
            )  # fmt: skip
        means = {
            f"validation/loss_{format_budget(self.model.budget_of(n))}": loss.mean().item()
            for n, loss in losses.items()
        }
        self.log.write(self.step, **means)
        for message in budgets_out_of_order(losses):
            logger.warning("step %d: %s", self.step, message)

    def draw_sheet(self) -> None:
        """Draw samples at every budget with the averaged weights."""
        config = self.config
        with self.averaged_weights():
            assert isinstance(self.conditioning, OwnConditioning)
            pipeline = self.conditioning.pipeline()
            sheet = sample_sheet(pipeline, self.held_out, config.sample, self.kept, config.seed)
        save_image(sheet, self.folder / "samples" / f"step-{self.step:08d}.png")

    def save(self) -> None:
        """Write a checkpoint, and the averaged weights as a pipeline into the run's folder."""
        finite = all(p.isfinite().all() for p in self.trained)
        if any(self.world.any(not finite)):
            raise self.diverged(f"weights after step {self.step}")
        if self.world.is_main and self.step != self.saved_step:
            save_checkpoint(
                self.folder / "checkpoints",
                self.step,
                self.model,
                self.ema.shadow_params,
                self.optimizer,
                {
                    "ema_steps": self.ema.optimization_step,
                    "seconds": self.seconds,
                    "config": fixed_settings(self.config),
                },
                self.config.train.keep_checkpoints,
            )
        if self.world.is_main and self.step != self._exported_step:
            with self.averaged_weights():
                export = partial(self.conditioning.export, without_lora(self.model))
                replace_folder_files(self.folder, export)
        self.saved_step = self._exported_step = self.step

    def _resume(self) -> int:
        """Load the last checkpoint, if there is one; the number of steps done."""
        folder = self.folder / "checkpoints"
        step = max(checkpoint_steps(folder), default=0)
        found = self.world.gather(step)
        if len(set(found)) > 1:
            raise ValueError(
                f"the processes find different last checkpoints in {folder}, of the steps {found}: "
                f"output_dir must be one folder that all of them share"
            )
        if step > self.config.train.steps:
            raise ValueError(
                f"{self.folder} is at step {step} already, beyond train.steps="
                f"{self.config.train.steps}; raise train.steps, or choose another output_dir"
            )
        if not step:
            self._check_not_taken()
            return 0
        path = folder / f"step-{step:08d}"
        self._check_same_run(path)
        averaged, state = load_checkpoint(path, self.model, self.optimizer)
        self.ema.shadow_params = [p.to(self.world.device) for p in averaged]
        self.ema.optimization_step = state["ema_steps"]
        self._seconds_before = state["seconds"]
        if self.world.is_main and step < self.config.train.steps:
            logger.info("resuming %s at step %d", self.folder, state["step"])
        return state["step"]

    def _check_not_taken(self) -> None:
        """Raise a ValueError if the folder holds a pipeline but no checkpoint to go on from."""
        if (self.folder / "model_index.json").exists():
            raise ValueError(
                f"{self.folder} holds a pipeline, but no checkpoint to go on from: training would "
                f"overwrite it; choose another output_dir, or remove that folder"
            )

    def _check_same_run(self, path: Path) -> None:
        try:
            saved = json.loads((path / "state.json").read_text())["config"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # load_checkpoint says what is wrong with it
        wanted = fixed_settings(self.config)
        different = [
            f"{key}: {saved.get(key)} there, {wanted[key]} now"
            for key in wanted
            if saved.get(key, wanted[key]) != wanted[key]
        ]
        if different:
            raise ValueError(
                f"{self.folder} holds another run ({'; '.join(different)}); "
                f"choose another output_dir, or give the settings of that run"
            )

    def diverged(self, what: str) -> TrainingDivergedError:
        """Close the files; the error that tells a user whose run went wrong what to do."""
        self.close()
        saved = f"step {self.saved_step}" if self.saved_step else "none yet"
        return TrainingDivergedError(
            f"{what}: not finite. Nothing of it was saved (last checkpoint: {saved}). Look at "
            f"{self.log.path} for where it began; a lower optimizer.lr, a longer "
            f"optimizer.warmup_steps or train.precision=fp32 usually help; also check the data"
        )

    def close(self) -> None:
        """Close the files, and let go of what the process group must outlive."""
        self.log.close()
        self.parallel_model = self.model
        if self.world.is_main:
            self._lock.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
