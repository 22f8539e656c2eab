"""What a run shows of itself: validation loss and samples at every budget."""

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from elit._random import generator, seed_of
from elit.data import ImageDataset
from elit.evaluation.samples import cell_size
from elit.flow.guidance import CheapCFG
from elit.flow.objective import SigmaDensity, flow_matching_loss
from elit.inspection.left_out import PARTS, has_original_core, leave_out
from elit.interface.budget import format_budget
from elit.models.elastic import ElasticMixin
from elit.pipelines.budgets import draw_budgets
from elit.training.conditioning import Conditioning
from elit.training.config import SampleConfig
from elit.training.distributed import World
from elit.viz.sheet import contact_sheet, film_strip

logger = logging.getLogger(__name__)

MAX_SAMPLES = 512


@torch.no_grad()
def validation_losses(
    model: ElasticMixin,
    dataset: ImageDataset,
    conditioning: Conditioning,
    density: SigmaDensity,
    shown_latents: Sequence[int | None],
    seed: int,
    world: World,
    batch_size: int = 128,
) -> dict[int | None, Tensor]:
    """Losses (samples,) of the same samples, noise and noise levels at several numbers of latents.

    On the CPU. Each process measures its share; all must call this together.
    """
    count = min(len(dataset), MAX_SAMPLES)
    # Spread over the set: it may be sorted by class.
    chosen = torch.linspace(0, len(dataset) - 1, count).long()
    draw = generator(seed, "validation")
    shapes = [bucket.shape for bucket in dataset.buckets or ()] or [dataset.image_shape]
    noise = torch.randn((count, max(map(math.prod, shapes))), generator=draw)
    sigma = replace(density, shift=1.0).sample(count, draw)  # shifted by what each shape asks for
    posterior = noise  # not looked at
    if dataset.has_posterior:
        posterior = torch.randn(noise.shape, generator=generator(seed, "validation", 1))
    losses = {num_latents: torch.empty(count) for num_latents in shown_latents}
    alike = [torch.arange(count)]  # places in `chosen` of the samples of each shape
    if dataset.buckets:
        spans = ((bucket.runs[0, 0], bucket.runs[-1].sum()) for bucket in dataset.buckets)
        alike = [((chosen >= first) & (chosen < end)).nonzero().flatten() for first, end in spans]
    for members in filter(len, alike):
        share = -(-len(members) // world.size)  # the last begin again: shards are called together
        mine = members[(torch.arange(share) + world.rank * share) % len(members)]
        measured: dict[int | None, list[Tensor]] = {
            num_latents: [] for num_latents in shown_latents
        }
        for part in mine.split(batch_size):
            batch = dataset.batch(chosen[part].tolist())
            shape = len(part), *dataset.seen_shape(batch["images"])
            own_noise, own_posterior = (
                x[part, : math.prod(shape[1:])].view(shape).to(world.device)
                for x in (noise, posterior)
            )
            images = dataset.on_device(batch["images"].to(world.device), own_posterior)
            levels = density.shifted(sigma[part], shape[1:])
            moved = images, own_noise, levels.to(world.device)
            condition = conditioning(batch)
            target = conditioning.target(condition)
            for num_latents, parts in measured.items():
                latents = {} if num_latents is None else {"num_latents": num_latents}
                velocity = partial(
                    conditioning.velocity, model, condition=condition, latents=latents
                )
                parts.append(flow_matching_loss(velocity, *moved, target).cpu())
        for num_latents, parts in measured.items():
            losses[num_latents][members] = world.gather_rows(torch.cat(parts))[: len(members)]
    return losses


def worth_of_parts(
    losses: dict[int | None, Tensor], model: ElasticMixin, *measured: Any
) -> dict[str, float]:
    """Rise of the loss at the most latents, as a share of it, without the core and without all of
    the interface; none of a plain model, or where the core is that of a retrofit's original.

    `measured` are the arguments of `validation_losses`, which gave the losses, without the numbers
    of latents. All processes must call this together.
    """
    most = max((n for n in losses if n is not None), default=None)
    if most is None or has_original_core(model):
        return {}
    dataset, conditioning, density, *rest = measured
    worth: dict[str, float] = {}
    for part in PARTS:
        with leave_out(model, part):
            without = validation_losses(model, dataset, conditioning, density, [most], *rest)[most]
        worth[part] = float(without.mean() / losses[most].mean() - 1)
    return worth


def budgets_out_of_order(losses: dict[int | None, Tensor]) -> list[str]:
    """A message for each budget that is worse than the next smaller one.

    The samples are the same, so their differences are tested: it takes two standard errors, and
    half a percent of the loss.
    """
    messages = []
    numbers = sorted((n for n in losses if n is not None), reverse=True)
    for larger, smaller in itertools.pairwise(numbers):
        difference = losses[larger] - losses[smaller]
        if len(difference) < 2:
            continue  # a single sample has no standard error
        error = difference.std() / len(difference) ** 0.5
        least = 0.005 * losses[smaller].mean()
        if difference.mean() > torch.maximum(2 * error, least):
            messages.append(
                f"{larger} latents per group have a higher validation loss than {smaller}: "
                f"{losses[larger].mean():.4f} against {losses[smaller].mean():.4f}; early in "
                f"training this may pass, later it means that large budgets are drawn too rarely"
            )
    return messages


def sample_sheet(
    conditioning: Conditioning,
    dataset: ImageDataset,
    config: SampleConfig,
    kept: Sequence[int | None],
    seed: int,
) -> Image.Image:
    """One row for each number of latents, a column for each class or caption, of the same noise."""
    pipeline = conditioning.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    model = pipeline.transformer
    guidance = CheapCFG(config.guidance_scale) if config.guidance_scale != 1 else None
    vae = conditioning.vae
    try:
        if vae is not None:  # it is where the model is only while it draws
            vae.to(next(model.parameters()).device)
        names, what = conditioning.to_show(pipeline, dataset, config.columns)
        budgets = [model.budget_of(num_latents) for num_latents in kept]
        seeds = [seed_of(seed, "sheet", i) for i in range(len(names))]
        drawn = draw_budgets(
            pipeline, what, budgets, seeds, num_inference_steps=config.steps, guidance=guidance
        )
        rows = [images for images, _ in drawn]
    finally:
        if vae is not None:
            vae.to("cpu")
    if pipeline.draws_clips:
        rows = [[film_strip(clip) for clip in row] for row in rows]
    captions = [format_budget(budget) for budget in budgets]
    return contact_sheet(rows, captions, names, cell_size(pipeline), "budget")
