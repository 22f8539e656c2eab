"""The training loop, from top to bottom."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from elit.flow.objective import flow_matching_loss
from elit.training.config import TrainConfig
from elit.training.distributed import distributed_world
from elit.training.randomness import generator
from elit.training.run import Run
from elit.training.signals import stop_on_signals

logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is no longer finite."""


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
        folder: of the run; `ElitPipeline.from_pretrained(folder)` loads the averaged weights.
        step: last step done.
        finished: whether that is all steps, or a signal stopped the run.
        seconds: that this call took.
    """

    folder: Path
    step: int
    finished: bool
    seconds: float


def train(config: TrainConfig, progress: bool = True) -> TrainResult:
    """Train a model, or go on with a run that was stopped, and leave a pipeline in its folder.

    Args:
        config: the run. The same config again resumes at the last checkpoint, to the same
            weights bit for bit (on the CPU with the same number of threads and processes).
        progress: whether to show a progress bar.
    """
    started = time.perf_counter()
    loop = config.train
    with distributed_world(loop.device) as world, stop_on_signals() as stop_requested:
        run = Run(config, world)
        first_step, stopped = run.step, False
        batches = iter(run.loader(range(first_step, loop.steps)))
        bar = tqdm(
            total=loop.steps,
            initial=first_step,
            desc="training",
            unit="step",
            disable=not (progress and world.is_main),
            dynamic_ncols=True,
        )
        for step in range(first_step, loop.steps):
            num_latents, latent_indices = run.draw_latents(step)
            run.set_learning_rate(step)
            loss = torch.zeros((), device=world.device)
            for chunk in run.chunks:
                batch = next(batches)
                with run.gradient_sync(last=chunk == run.chunks[-1]), run.autocast():
                    part = batch_loss(run, batch, step, chunk, num_latents, latent_indices)
                    (part / len(run.chunks)).backward()
                loss += part.detach() / len(run.chunks)
            grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.optimizer.clip)

            broken = not torch.isfinite(loss + grad_norm).item()
            broken, stopped = world.any(broken, stop_requested())
            if broken:
                run.close()
                raise TrainingDivergedError(diverged(run, step, loss, grad_norm, num_latents))
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.ema.step(run.model.parameters())

            bar.update()
            run.after_step(step + 1, loss, grad_norm, bar, save=stopped)
            if stopped:
                break
        bar.close()
        if not stopped:
            run.save()
        run.close()
        world.barrier()
        return TrainResult(run.folder, run.step, not stopped, time.perf_counter() - started)


def batch_loss(
    run: Run,
    batch: dict[str, Tensor],
    step: int,
    chunk: int,
    num_latents: int | None,
    latent_indices: Tensor | None,
) -> Tensor:
    """Mean flow-matching loss of one micro-batch, its noise a function of (seed, step, chunk)."""
    device = run.world.device
    draw = generator(run.config.seed, "noise", step, chunk, device=device)
    data = batch["images"].to(device, non_blocking=True)
    labels = batch["class_labels"].to(device, non_blocking=True)
    noise = torch.randn(data.shape, generator=draw, device=device)
    sigma = run.density.sample(len(data), draw)
    dropped = torch.rand(len(data), generator=draw, device=device)
    null_label = run.model.config.num_classes
    labels = labels.where(dropped >= run.config.objective.label_dropout, null_label)
    latents: dict[str, int | Tensor] = {}
    if num_latents is not None:
        latents["num_latents"] = num_latents
    if latent_indices is not None:
        latents["latent_indices"] = latent_indices.to(device)

    def velocity(x: Tensor, s: Tensor) -> Tensor:
        return run.parallel_model(x, s, labels, return_dict=False, **latents)[0]

    return flow_matching_loss(velocity, data, noise, sigma).mean()


def diverged(run: Run, step: int, loss: Tensor, grad_norm: Tensor, num_latents: int | None) -> str:
    """What to tell a user whose run went wrong."""
    saved = f"the checkpoint of step {run.saved_step} is intact" if run.saved_step else "none yet"
    return (
        f"loss {loss.item():g} and gradient norm {grad_norm.item():g} in step {step + 1} "
        f"(num_latents {num_latents}): not finite. Nothing was saved since ({saved}). Look at "
        f"{run.folder / 'metrics.jsonl'} for where it began; a lower optimizer.lr, a longer "
        f"optimizer.warmup_steps or train.precision=fp32 usually help; also check the data"
    )
