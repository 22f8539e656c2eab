"""From nothing to pictures: train on real digits, then draw and judge them at several budgets."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from elit._devices import pick_device
from elit._files import write_json
from elit._random import seed_of
from elit.cost.flops import cost_of
from elit.data import ImageDataset, load_dataset
from elit.evaluation.frechet import Moments, frechet_distance
from elit.flow.guidance import CFG, CheapCFG
from elit.flow.objective import SigmaDensity
from elit.interface.budget import default_budgets, format_budget
from elit.models.elastic import ElasticMixin
from elit.models.presets import preset_config
from elit.networks.classifier import ClassifierFeatures, fit_classifier, fit_network
from elit.pipelines.budgets import draw_budgets
from elit.pipelines.elit_pipeline import ElitPipeline
from elit.training.conditioning import LabelConditioning
from elit.training.config import TrainConfig
from elit.training.distributed import World, cpu_threads
from elit.training.loop import train
from elit.training.validation import validation_losses
from elit.viz.sheet import contact_sheet, save_image

IMAGES_PER_CLASS = 10
ROUNDS = 5  # of drawing everything: times are medians of them
MOST_ROWS = 5


@dataclass(frozen=True)
class BudgetRow:
    """One budget of the table.

    Attributes:
        budget: fraction of the latents kept.
        num_latents: latents per group.
        mflops: of one forward of one image (a multiply-add counts as 2).
        share: of the full budget's `mflops`.
        ms_per_image: measured, all steps and the guide included: the median of the rounds.
        loss: of the held-out images.
        accuracy: share of images in which a classifier of real images sees the wanted class.
        distance: Frechet distance to the real images, in what a small classifier sees of them.
    """

    budget: float
    num_latents: int
    mflops: float
    share: float
    ms_per_image: float
    loss: float
    accuracy: float
    distance: float


@dataclass(frozen=True)
class PlainRow:
    """What the same blocks cost without an interface: an untrained plain model, timed alone.

    Attributes:
        mflops: of one forward of one image.
        share: of the elastic model's at full budget.
        ms_per_image: of the same grid, with plain guidance of the same scale.
    """

    mflops: float
    share: float
    ms_per_image: float


@dataclass(frozen=True)
class QuickstartSummary:
    """What `summary.json` holds.

    Attributes:
        rows: one for each budget, all from the same noise.
        plain: a plain model of the same blocks beside them; None if a signal stopped it.
        num_groups: groups of a picture; times `num_latents`, its latents.
        images_per_row: images that a row's accuracy and distance are of.
        images_per_batch: drawn at once, in each of the rounds that are timed.
        threads: of the CPU, in training and drawing.
        steps: Euler steps of each image.
        guidance_scale: of cheap classifier-free guidance; 1 is none.
        finished: whether all was done; if a signal stopped it, the rows are missing.
        train_seconds: of training, its validation and sheets included, in all calls that it took.
        total_seconds: of everything.
    """

    rows: list[BudgetRow]
    plain: PlainRow | None
    num_groups: int
    images_per_row: int
    images_per_batch: int
    threads: int
    steps: int
    guidance_scale: float
    finished: bool
    train_seconds: float
    total_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)


def quickstart(config: TrainConfig, progress: bool = True) -> QuickstartSummary:
    """Train an elastic model, draw its classes at several budgets and judge the images.

    Leaves `samples.png` (rows: budgets, columns: classes) and `summary.json` in the run's folder,
    beside the trained pipeline. Called again, it goes on where it was stopped.

    Args:
        config: of the training run.
        progress: whether to show progress bars.
    """
    folder = Path(config.output_dir)
    dataset = load_dataset(config.data.name, **config.data.options)
    result = train(config, progress)
    trained = time.perf_counter()
    rows: list[BudgetRow] = []
    plain, num_groups = None, 0
    finished = result.finished and not result.stopped
    with cpu_threads(config.train.threads):
        threads = torch.get_num_threads()
        if finished:
            pipeline = ElitPipeline.from_pretrained(folder).to(pick_device(config.train.device))
            rows, plain, pictures = draw_and_judge(pipeline, config, progress)
            model = pipeline.transformer
            num_groups = model.token_grid(
                torch.empty(1, model.in_channels, *model.sample_size, device="meta")
            ).num_groups
            captions = [format_budget(row.budget) for row in rows]
            sheet = contact_sheet(pictures, captions, dataset.class_names)
            save_image(sheet, folder / "samples.png")
    summary = QuickstartSummary(
        rows=rows,
        plain=plain,
        num_groups=num_groups,
        images_per_row=ROUNDS * IMAGES_PER_CLASS * dataset.num_classes,
        images_per_batch=IMAGES_PER_CLASS * dataset.num_classes,
        threads=threads,
        steps=config.sample.steps,
        guidance_scale=config.sample.guidance_scale,
        finished=finished,
        train_seconds=result.seconds,
        total_seconds=result.seconds + time.perf_counter() - trained,
    )
    if finished:
        write_json(folder / "summary.json", summary.to_dict())
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
    pipeline: ElitPipeline, config: TrainConfig, progress: bool
) -> tuple[list[BudgetRow], PlainRow, list[list[Image.Image]]]:
    """Draw all classes at all budgets from the same noise; the first of each class as pictures."""
    model, processor = pipeline.transformer, pipeline.image_processor
    plain = ElitPipeline(plain_model(model, config.model.preset), pipeline.scheduler)
    plain.to(pipeline.device)
    labels = list(range(model.config.num_classes)) * IMAGES_PER_CLASS
    budgets = budgets_to_draw(model)
    turns = [(pipeline, budget) for budget in budgets] + [(plain, 1.0)]
    drawn, seconds = draw_in_turns(turns, labels, config, progress)
    times = [1000 * statistics.median(took) / len(labels) for took in seconds]

    flops, kept = cost_of(model).flops, [model.resolve_budget(budget) for budget in budgets]
    full = flops()
    losses = held_out_losses(model, config, kept)
    judge = Judge(load_dataset(config.data.name, "train", **config.data.options))
    rows, pictures = [], []
    for n, images, ms in zip(kept, drawn, times, strict=False):  # the last is the plain model's
        accuracy, distance = judge(images * 2 - 1, torch.tensor(labels * ROUNDS))
        rows.append(
            BudgetRow(
                budget=model.budget_of(n),
                num_latents=n,
                mflops=flops(n) / 1e6,
                share=flops(n) / full,
                ms_per_image=ms,
                loss=losses[n],
                accuracy=accuracy,
                distance=distance,
            )
        )
        first = images[: model.config.num_classes]
        pictures.append(processor.numpy_to_pil(processor.pt_to_numpy(first)))
    cost = cost_of(plain.transformer).flops()
    return rows, PlainRow(cost / 1e6, cost / full, ms_per_image=times[-1]), pictures


def draw_in_turns(
    turns: Sequence[tuple[ElitPipeline, float]],
    labels: list[int],
    config: TrainConfig,
    progress: bool,
) -> tuple[list[Tensor], list[list[float]]]:
    """Draw these labels in several rounds, in each by every pipeline at its budget.

    They take turns, so that what else the machine does slows all of them.

    Returns:
        Images (rounds * labels, C, H, W) in [0, 1] and the seconds of each round, for each turn.
    """
    scale = config.sample.guidance_scale

    def draw(
        pipeline: ElitPipeline, budget: float, round_: int, steps: int
    ) -> tuple[list[Tensor], float]:
        kind = CheapCFG if pipeline.transformer.is_elastic else CFG
        places = range(round_ * len(labels), (round_ + 1) * len(labels))
        ((images, took),) = draw_budgets(
            pipeline, labels, [budget], [seed_of(config.seed, "sheet", i) for i in places],
            num_inference_steps=steps, guidance=kind(scale) if scale != 1 else None,
            output_type="pt",
        )  # fmt: skip
        return images, took

    drawn: list[list[Tensor]] = [[] for _ in turns]
    seconds: list[list[float]] = [[] for _ in turns]
    for pipeline, budget in turns:
        pipeline.set_progress_bar_config(disable=True)
        draw(pipeline, budget, 0, steps=1)  # the first call is slow
    with tqdm(total=ROUNDS * len(turns), desc="drawing", disable=not progress) as bar:
        for round_ in range(ROUNDS):
            for turn, (pipeline, budget) in enumerate(turns):
                images, took = draw(pipeline, budget, round_, config.sample.steps)
                drawn[turn] += images
                seconds[turn].append(took)
                bar.update()
    return [torch.stack(images).cpu() for images in drawn], seconds


def held_out_losses(
    model: ElasticMixin, config: TrainConfig, kept: Sequence[int]
) -> dict[int | None, float]:
    """Mean loss of the held-out images at each number of latents, as training measures it."""
    held_out = load_dataset(config.data.name, "validation", **config.data.options)
    objective = config.objective
    density = SigmaDensity(objective.density, objective.logit_mean, objective.logit_std)
    device = model.device
    losses = validation_losses(
        model, held_out, LabelConditioning(model, device), density, kept, config.seed,
        World(0, 1, device),
    )  # fmt: skip
    return {n: loss.mean().item() for n, loss in losses.items()}


class Judge:
    """Tells how right images are, and how far from the real ones."""

    def __init__(self, real: ImageDataset):
        self.classifier = fit_classifier(real)
        self.network = ClassifierFeatures(fit_network(real))
        self.real = self._moments(real.on_device(real.batch(range(len(real)))["images"]))

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Accuracy and Frechet distance of images (B, C, H, W) in [-1, 1]."""
        drawn, real = self._moments(images), self.real
        distance = frechet_distance(drawn.mean, drawn.covariance, real.mean, real.covariance)
        return self.classifier.accuracy(images, labels), distance

    @torch.no_grad()
    def _moments(self, images: Tensor) -> Moments:
        moments = Moments()
        moments.update(self.network(images)["pool"])
        return moments
