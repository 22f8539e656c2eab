"""The training loop, from top to bottom."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elit.flow.objective import flow_matching_loss
from elit.training.config import TrainConfig
from elit.training.distributed import cpu_threads, distributed_world
from elit.training.randomness import generator
from elit.training.run import Run, TrainingDivergedError
from elit.training.signals import stop_on_signals

__all__ = ["TrainResult", "TrainingDivergedError", "train"]


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


def train(config: TrainConfig, progress: bool = True) -> TrainResult:
    """Train a model, or go on with a run that was stopped, and leave a pipeline in its folder.

    Args:
        config: the run. The same config again resumes at the last checkpoint, to the same
            weights bit for bit (on the CPU with the same number of threads and processes).
        progress: whether to show a progress bar.
    """
    loop = config.train
    with (
        cpu_threads(loop.threads),
        distributed_world(loop.device) as world,
        stop_on_signals() as stop_requested,
    ):
        run = Run(config, world)
        steps = range(run.step, loop.steps)
        batches, stopped = iter(run.loader(steps)), False
        with run.progress_bar(progress) as bar:
            for step in steps:
                kept, latent_indices = run.draw_latents(step)
                run.set_learning_rate(step)
                loss = torch.zeros((), device=world.device)
                for chunk in run.chunks:
                    batch = next(batches)
                    with run.gradient_sync(last=chunk == run.chunks[-1]):
                        with run.autocast():
                            part = batch_loss(run, batch, step, chunk, kept, latent_indices)
                        (part / len(run.chunks)).backward()
                    loss += part.detach() / len(run.chunks)
                grad_norm = nn.utils.clip_grad_norm_(run.trained, config.optimizer.clip)

                broken = not torch.isfinite(loss + grad_norm).item()
                broken, stopped = world.any(broken, stop_requested())
                if broken:
                    raise run.diverged(
                        f"loss {loss.item():g} and gradient norm {grad_norm.item():g} "
                        f"in step {step + 1} (num_latents {', '.join(map(str, kept))})"
                    )
                run.optimizer.step()
                run.optimizer.zero_grad(set_to_none=True)
                run.ema.step(run.trained)

                bar.update()
                run.after_step(step + 1, loss, grad_norm, bar)
                if stopped:
                    break
        run.save()
        (stopped,) = world.any(stopped or stop_requested())
        finished = run.step >= loop.steps  # a signal may have come in the last step
        run.close()
        world.barrier()
        return TrainResult(run.folder, run.step, finished, stopped, run.seconds)


def batch_loss(
    run: Run,
    batch: dict[str, Any],
    step: int,
    chunk: int,
    kept: Sequence[int | None],
    latent_indices: Tensor | None,
) -> Tensor:
    """Mean loss of one micro-batch, its noise a function of (seed, step, chunk).

    Args:
        run: whose model it is.
        batch: of the data set.
        step: number of the step.
        chunk: number of the micro-batch.
        kept: latents per group, for each of as many parts of the batch.
        latent_indices: the latents to keep instead of the first ones.
    """
    device = run.world.device
    draw = generator(run.config.seed, "noise", step, chunk, device=device)
    data = batch["images"].to(device, non_blocking=True)
    noise = torch.randn(data.shape, generator=draw, device=device)
    sigma = run.density.sample(len(data), draw)
    dropped = torch.rand(len(data), generator=draw, device=device)
    condition = run.conditioning(batch, dropped < run.config.objective.label_dropout)
    losses = []
    for rows, num_latents in zip(
        torch.arange(len(data)).tensor_split(len(kept)), kept, strict=True
    ):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        latents: dict[str, int | Tensor] = {}
        if num_latents is not None:
            latents["num_latents"] = num_latents
        if latent_indices is not None:
            latents["latent_indices"] = latent_indices.to(device)
        of_part = {name: value[part] for name, value in condition.items()}
        losses.append(_part_loss(run, data[part], noise[part], sigma[part], of_part, latents))
    return torch.cat(losses).mean()


def _part_loss(
    run: Run,
    data: Tensor,
    noise: Tensor,
    sigma: Tensor,
    condition: dict[str, Tensor],
    latents: dict[str, int | Tensor],
) -> Tensor:
    """Losses (B,) at one number of latents: of the data, and of the original where one teaches."""
    seen: list[Tensor] = []

    def velocity(x: Tensor, s: Tensor) -> Tensor:
        if run.distillation is not None:
            seen.extend(run.distillation.targets(x, s, condition))
        seen.append(run.conditioning.velocity(run.parallel_model, x, s, condition, latents))
        return seen[-1]

    loss = flow_matching_loss(velocity, data, noise, sigma)
    if run.distillation is None:
        return loss
    return run.distillation.loss(loss, run.model, *seen)
