"""The training loop, from top to bottom."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elit._random import generator
from elit._signals import stop_on_signals
from elit.flow.objective import SigmaDensity, flow_matching_loss
from elit.training.build import DataSets, MakeModel
from elit.training.conditioning import Arguments
from elit.training.config import TrainConfig
from elit.training.distributed import (
    ProcessLostError,
    cpu_threads,
    distributed_world,
    matrix_products,
)
from elit.training.resume import locked_run
from elit.training.run import Run, TrainingDivergedError
from elit.training.watch import PartLatents

__all__ = ["ProcessLostError", "TrainResult", "TrainingDivergedError", "train"]

ROWS_AT_ONCE = 16  # that one generator serves; a GPU would take long over one for each row


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
        folder: of the run; `ElitPipeline.from_pretrained(folder)` loads the averaged weights.
        step: last step done.
        finished: whether that is all steps, or a signal stopped the run.
        stopped: whether a signal asked to stop, be it after the last step.
        seconds: of training, in all calls that the run took.
    """

    folder: Path
    step: int
    finished: bool
    stopped: bool
    seconds: float


def train(
    config: TrainConfig,
    progress: bool = True,
    make_model: MakeModel | None = None,
    data: DataSets | None = None,
) -> TrainResult:
    """Train a model, or go on with a run that was stopped, and leave a pipeline in its folder.

    Args:
        config: the run. The same config again resumes at the last checkpoint, to the same
            weights bit for bit (on the CPU with the same number of threads and processes).
        progress: whether to show a progress bar.
        make_model: makes the model in place of `build_model`, the same each time.
        data: what `check_config` has read, or the same of your own; by default it is read here.
    """
    loop = config.train
    with (
        cpu_threads(loop.threads),
        distributed_world(loop.device) as world,
        matrix_products(world.device, loop.tf32),
        stop_on_signals() as stop_requested,
        locked_run(config, world),
        closing(Run(config, world, make_model, data)) as run,
    ):
        steps = range(run.step, loop.steps)
        batches, stopped = run.monitor.watched(run.loader(steps)), False
        with run.progress_bar(progress) as bar:
            for step in steps:
                part_latents, latent_indices = run.draw_latents(step)
                run.optimizer.set_learning_rate(step)
                loss = torch.zeros((), device=world.device)
                for chunk in run.chunks:
                    batch = next(batches)
                    with run.gradient_sync(last=chunk == run.chunks[-1]):
                        with run.autocast():
                            part = batch_loss(run, batch, step, chunk, part_latents, latent_indices)
                        run.optimizer.backward(part / len(run.chunks))
                    loss += part.detach() / len(run.chunks)
                grad_norm = run.optimizer.clip()

                sound = torch.stack((loss, grad_norm)).isfinite().tolist()
                may_skip = run.optimizer.may_skip() and sound[0]
                broken, skip, stopped, unsaved = world.any(
                    not (all(sound) or may_skip),
                    not all(sound),
                    stop_requested(),
                    run.checkpoints.has_failed,
                )
                if unsaved:
                    raise run.unsaved()
                if broken:
                    raise run.diverged(
                        f"loss {loss.item():g} and gradient norm {grad_norm.item():g} "
                        f"in step {step + 1} (num_latents {', '.join(map(str, part_latents))}"
                        f"{run.monitor.blamed_rows(step + 1)})"
                    )
                run.optimizer.step(skip)
                if not skip:
                    run.average.step(run.trained)

                bar.update()
                run.after_step(step + 1, part_latents, loss, grad_norm, bar)
                if stopped:
                    break
        run.finish()
        (stopped,) = world.any(stopped or stop_requested())
        finished = run.step >= loop.steps  # a signal may have come in the last step
        world.barrier()
        return TrainResult(run.folder, run.step, finished, stopped, run.seconds)


def batch_loss(
    run: Run,
    batch: dict[str, Any],
    step: int,
    chunk: int,
    part_latents: PartLatents,
    latent_indices: Tensor | None,
) -> Tensor:
    """Mean loss of one micro-batch, its noise a function of (seed, step, row).

    The batch is cut into as many parts as there are `part_latents`, the latents per group that each
    keeps: the first ones, or those of `latent_indices`.
    """
    stored = batch["images"].to(run.world.device, non_blocking=True)
    draws = draw_rows(
        range(chunk * len(stored), (chunk + 1) * len(stored)),
        run.dataset.seen_shape(stored),
        run.density,
        run.config.seed,
        step,
        run.world.device,
        run.dataset.has_posterior,
    )
    data = run.dataset.on_device(stored, draws.posterior)
    condition = run.conditioning(batch, draws.dropout < run.config.objective.label_dropout)
    parts = torch.arange(len(data)).tensor_split(len(part_latents))
    features = None if run.alignment is None else run.alignment.features(data, batch)
    losses, aligned = [], []
    for rows, num_latents in zip(parts, part_latents, strict=True):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        latents: Arguments = {} if num_latents is None else {"num_latents": num_latents}
        if latent_indices is not None:
            latents["latent_indices"] = latent_indices.to(run.world.device)
        told = {name: value[part] for name, value in condition.items()}
        noise, sigma = draws.noise[part], draws.sigma[part]
        losses.append(_part_loss(run, data[part], noise, sigma, told, latents))
        if run.alignment is not None and features is not None:
            aligned.append(run.alignment.loss(noise, features[part]))
    loss = torch.cat(losses).mean()
    return loss if run.alignment is None else loss + run.alignment.weighted(torch.cat(aligned))


def _part_loss(
    run: Run, data: Tensor, noise: Tensor, sigma: Tensor, condition: Arguments, latents: Arguments
) -> Tensor:
    """Losses (B,) at one number of latents: of the data, and of the original where one teaches."""
    seen: list[Tensor] = []

    def velocity(x: Tensor, s: Tensor) -> Tensor:
        if run.distillation is not None:
            seen.extend(run.distillation.targets(x, s, condition))
        seen.append(run.conditioning.velocity(run.parallel.module, x, s, condition, latents))
        return seen[-1]

    loss = flow_matching_loss(velocity, data, noise, sigma, run.conditioning.target(condition))
    if run.distillation is None:
        return loss
    return run.distillation.loss(loss, run.model, *seen)


class Draws(NamedTuple):
    """Random numbers of B rows, a function of (seed, step, row) alone.

    So a run may go on with another number of processes or micro-batches, and draws the same.

    Attributes:
        noise: (B, ...), standard normal.
        sigma: (B,), noise levels in [0, 1].
        dropout: (B,), uniform in [0, 1): below the share of dropped labels, the label is dropped.
        posterior: (B, ...), standard normal, for the draw from an autoencoder's posterior; or None.
    """

    noise: Tensor
    sigma: Tensor
    dropout: Tensor
    posterior: Tensor | None


def draw_rows(
    rows: range,
    shape: Sequence[int],
    density: SigmaDensity,
    seed: int,
    step: int,
    device: torch.device,
    with_posterior: bool = False,
) -> Draws:
    """Draw for rows that are next to each other in the whole batch of a step.

    Args:
        rows: one or more, counted over all processes and micro-batches.
        shape: of one sample.
        device: to draw on; others draw other numbers.
        with_posterior: whether the data are moments of an autoencoder's posterior.
    """
    first, last = rows.start // ROWS_AT_ONCE, (rows.stop - 1) // ROWS_AT_ONCE
    blocks: list[list[Tensor]] = []
    for block in range(first, last + 1):
        draw = generator(seed, "noise", step, block, device=device)
        noise = torch.randn((ROWS_AT_ONCE, *shape), generator=draw, device=device)
        sigma = density.sample(ROWS_AT_ONCE, draw, shape)
        drawn = [noise, sigma, torch.rand(ROWS_AT_ONCE, generator=draw, device=device)]
        if with_posterior:
            drawn.append(torch.randn((ROWS_AT_ONCE, *shape), generator=draw, device=device))
        blocks.append(drawn)
    start = rows.start - first * ROWS_AT_ONCE
    own = slice(start, start + len(rows))
    noise, sigma, dropout, *posterior = (
        torch.cat(block)[own] for block in zip(*blocks, strict=True)
    )
    return Draws(noise, sigma, dropout, posterior[0] if posterior else None)
