"""From nothing to pictures: train on real digits, then draw and judge them at several budgets."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import trange

from elit._devices import pick_device
from elit._files import write_json
from elit._random import seed_of
from elit.cost.flops import cost_of
from elit.evaluation.frechet import Moments, frechet_distance
from elit.flow.guidance import CFG, CheapCFG
from elit.interface.budget import default_budgets, format_budget
from elit.models.elastic import ElasticMixin
from elit.models.presets import preset_config
from elit.networks.classifier import ClassifierFeatures, fit_classifier, fit_network
from elit.pipelines.budgets import draw_budgets
from elit.pipelines.elit_pipeline import ElitPipeline
from elit.training.build import DataSets, read_data, sigma_density
from elit.training.conditioning import LabelConditioning
from elit.training.config import TrainConfig
from elit.training.distributed import World, cpu_threads
from elit.training.loop import train
from elit.training.validation import validation_losses
from elit.viz.sheet import contact_sheet, save_image

IMAGES_PER_CLASS = 10
ROUNDS = 5  # of drawing everything: times are medians of them
MOST_ROWS = 5


def quickstart(
    config: TrainConfig, progress: bool = True, data: DataSets | None = None
) -> dict[str, Any]:
    """Train an elastic model, draw its classes at several budgets and judge the images.

    Leaves `samples.png` (rows: budgets, columns: classes) and `summary.json` in the run's folder,
    beside the trained pipeline. Called again, it goes on where it was stopped.

    Args:
        config: of the training run.
        progress: whether to show progress bars.
        data: as for `train`.

    Returns:
        What `summary.json` holds. "rows", one for each budget, all from the same noise: "budget",
        the fraction of the latents kept; "num_latents" per group; "mflops" of one forward of one
        image, a multiply-add counts as 2; "share" of the full budget's; "ms_per_image", measured,
        all steps and the guide included, the median of the rounds; "loss" of the held-out images;
        "accuracy", the share of images in which a classifier of real images sees the wanted class;
        "distance", the Frechet distance to the real images, in what a small classifier sees of
        them. "plain", "mflops", "share" and "ms_per_image" of an untrained plain model of the same
        blocks, with plain guidance. "num_groups" of a picture: times "num_latents", its latents.
        "images_per_row", of accuracy and distance; "images_per_batch", drawn at once in a round;
        "threads" of the CPU; "steps" and "guidance_scale" of drawing; "train_seconds" of all calls,
        and "total_seconds". "finished": if a signal stopped it, there are no rows, and no file.
    """
    folder = Path(config.output_dir)
    data = data or read_data(config)
    result = train(config, progress, data=data)
    trained = time.perf_counter()
    batch = IMAGES_PER_CLASS * data.train.num_classes
    summary: dict[str, Any] = {
        "rows": [],
        "plain": None,
        "num_groups": 0,
        "images_per_row": ROUNDS * batch,
        "images_per_batch": batch,
        "threads": config.train.threads or torch.get_num_threads(),
        "steps": config.sample.steps,
        "guidance_scale": config.sample.guidance_scale,
        "finished": result.finished and not result.stopped,
        "train_seconds": result.seconds,
    }
    if summary["finished"]:
        with cpu_threads(config.train.threads):
            pipeline = ElitPipeline.from_pretrained(folder).to(pick_device(config.train.device))
            summary |= draw_and_judge(pipeline, config, data, progress)
    summary["total_seconds"] = result.seconds + time.perf_counter() - trained
    if summary["finished"]:
        write_json(folder / "summary.json", summary)
    return summary


def budgets_to_draw(model: ElasticMixin) -> list[float]:
    """1 down to the fewest latents the model is trained with, in a few equal ratios."""
    halves = default_budgets(model.min_latents, model.max_latents)
    stride = -(-(len(halves) - 1) // (MOST_ROWS - 1)) or 1
    chosen = halves[::stride]
    return chosen if chosen[-1] == halves[-1] else [*chosen, halves[-1]]


def plain_model(model: ElasticMixin, preset: str) -> Any:
    """The same blocks without Read and Write, untrained."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    known = preset_config(preset.lower().removeprefix("elit-"))
    for key in ("group", "min_latents", "head", "tail"):
        if key not in known:
            del config[key]
    return type(model)(**config)


def draw_and_judge(
    pipeline: ElitPipeline, config: TrainConfig, data: DataSets, progress: bool
) -> dict[str, Any]:
    """Draw all classes at all budgets and judge them; the first of each class as a picture."""
    model, processor = pipeline.transformer, pipeline.image_processor
    plain = ElitPipeline(plain_model(model, config.model.preset), pipeline.scheduler)
    plain.to(pipeline.device)
    labels = list(range(model.config.num_classes)) * IMAGES_PER_CLASS
    budgets = budgets_to_draw(model)
    drawn, seconds = draw_in_turns(pipeline, plain, budgets, labels, config, progress)
    times = [1000 * statistics.median(took) / len(labels) for took in seconds]

    flops, kept = cost_of(model).flops, [model.resolve_budget(budget) for budget in budgets]
    losses = validation_losses(
        model, data.validation, LabelConditioning(model, model.device), sigma_density(config),
        kept, config.seed, World(0, 1, model.device),
    )  # fmt: skip
    classifier, network = fit_classifier(data.train), ClassifierFeatures(fit_network(data.train))
    real = data.train.on_device(data.train.batch(range(len(data.train)))["images"])
    real_moments = moments_of(network, real)
    rows, pictures = [], []
    for n, images, ms in zip(kept, drawn, times, strict=False):  # the last is the plain model's
        moments = moments_of(network, images * 2 - 1)
        rows.append({
            "budget": model.budget_of(n),
            "num_latents": n,
            "mflops": flops(n) / 1e6,
            "share": flops(n) / flops(),
            "ms_per_image": ms,
            "loss": losses[n].mean().item(),
            "accuracy": classifier.accuracy(images * 2 - 1, torch.tensor(labels * ROUNDS)),
            "distance": frechet_distance(
                moments.mean, moments.covariance, real_moments.mean, real_moments.covariance
            ),
        })  # fmt: skip
        first = images[: model.config.num_classes]
        pictures.append(processor.numpy_to_pil(processor.pt_to_numpy(first)))
    captions = [format_budget(budget) for budget in budgets]
    sheet = contact_sheet(pictures, captions, data.train.class_names, corner="budget")
    save_image(sheet, Path(config.output_dir) / "samples.png")
    cost = cost_of(plain.transformer).flops()
    x = torch.empty(1, model.in_channels, *model.sample_size, device="meta")
    return {
        "rows": rows,
        "plain": {"mflops": cost / 1e6, "share": cost / flops(), "ms_per_image": times[-1]},
        "num_groups": model.token_grid(x).num_groups,
    }


def draw_in_turns(
    pipeline: ElitPipeline,
    plain: ElitPipeline,
    budgets: Sequence[float],
    labels: list[int],
    config: TrainConfig,
    progress: bool,
) -> tuple[list[Tensor], list[list[float]]]:
    """Draw these labels in several rounds, in each at every budget and by the plain model.

    They take turns, so that what else the machine does slows all of them.

    Returns:
        Images (rounds * labels, C, H, W) in [0, 1] and the seconds of each round, for each turn.
    """
    scale = config.sample.guidance_scale

    def draw_round(number: int, steps: int) -> list[tuple[list[Tensor], float]]:
        places = range(number * len(labels), (number + 1) * len(labels))
        seeds = [seed_of(config.seed, "sheet", i) for i in places]
        return [
            turn
            for each, of_each, guidance in ((pipeline, budgets, CheapCFG), (plain, [1.0], CFG))
            for turn in draw_budgets(
                each, labels, of_each, seeds, num_inference_steps=steps, output_type="pt",
                guidance=guidance(scale) if scale != 1 else None,
            )
        ]  # fmt: skip

    for each in (pipeline, plain):
        each.set_progress_bar_config(disable=True)
    draw_round(0, steps=1)  # the first calls are slow
    rounds = [
        draw_round(number, config.sample.steps)
        for number in trange(ROUNDS, desc="drawing", disable=not progress)
    ]
    turns = list(zip(*rounds, strict=True))
    drawn = [torch.stack([x for images, _ in turn for x in images]).cpu() for turn in turns]
    return drawn, [[took for _, took in turn] for turn in turns]


@torch.no_grad()
def moments_of(network: ClassifierFeatures, images: Tensor) -> Moments:
    """Mean and covariance of what a network sees of images (B, C, H, W) in [-1, 1]."""
    moments = Moments()
    moments.update(network(images)["pool"])
    return moments
