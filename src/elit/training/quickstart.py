"""From nothing to pictures: train on real digits, then draw and judge them at five budgets."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from elit._devices import pick_device
from elit._files import write_json
from elit.data import load_dataset
from elit.evaluation.classifier import fit_classifier
from elit.evaluation.flops import ElasticFlops
from elit.flow.guidance import CheapCFG
from elit.interface.budget import format_budget
from elit.pipelines.elit_pipeline import ElitPipeline
from elit.training.config import TrainConfig
from elit.training.loop import train
from elit.training.randomness import generator
from elit.viz.sheet import contact_sheet, save_image

BUDGETS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
IMAGES_PER_CLASS = 10


@dataclass(frozen=True)
class BudgetRow:
    """One budget of the table.

    Attributes:
        budget: fraction of the latents kept.
        num_latents: latents per group.
        mflops: of one forward of one image (a multiply-add counts as 2).
        ms_per_image: measured, all steps and the guide included.
        accuracy: share of images in which a classifier of real images sees the wanted class.
    """

    budget: float
    num_latents: int
    mflops: float
    ms_per_image: float
    accuracy: float


@dataclass(frozen=True)
class QuickstartSummary:
    """What `summary.json` holds.

    Attributes:
        rows: one for each budget, all from the same noise.
        images_per_row: images that a row's accuracy and time are of.
        steps: Euler steps of each image.
        guidance_scale: of cheap classifier-free guidance.
        finished: whether all was done; if a signal stopped it, the rows are missing.
        train_seconds: of training, its validation and sheets included, in all calls that it took.
        total_seconds: of everything.
    """

    rows: list[BudgetRow]
    images_per_row: int
    steps: int
    guidance_scale: float
    finished: bool
    train_seconds: float
    total_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)


def quickstart(config: TrainConfig, progress: bool = True) -> QuickstartSummary:
    """Train an elastic model, draw its classes at five budgets and judge the images.

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
    finished = result.finished and not result.stopped
    if finished:
        pipeline = ElitPipeline.from_pretrained(folder).to(pick_device(config.train.device))
        rows, pictures = draw_and_judge(pipeline, config, progress)
        captions = [format_budget(row.budget) for row in rows]
        names = dataset.class_names
        save_image(contact_sheet(pictures, captions, names), folder / "samples.png")
    summary = QuickstartSummary(
        rows=rows,
        images_per_row=IMAGES_PER_CLASS * dataset.num_classes,
        steps=config.sample.steps,
        guidance_scale=config.sample.guidance_scale,
        finished=finished,
        train_seconds=result.seconds,
        total_seconds=result.seconds + time.perf_counter() - trained,
    )
    if finished:
        write_json(folder / "summary.json", summary.to_dict())
    return summary


def draw_and_judge(
    pipeline: ElitPipeline, config: TrainConfig, progress: bool
) -> tuple[list[BudgetRow], list[list[Image.Image]]]:
    """Draw all classes at all budgets from the same noise; the first of each class as pictures."""
    model, processor = pipeline.transformer, pipeline.image_processor
    classifier = fit_classifier(load_dataset(config.data.name, "train", **config.data.options))
    pipeline.set_progress_bar_config(disable=True)
    guidance = CheapCFG(config.sample.guidance_scale)
    flops = ElasticFlops(model)
    num_classes = model.config.num_classes
    labels = list(range(num_classes)) * IMAGES_PER_CLASS
    pipeline(labels, num_inference_steps=1, guidance=guidance)  # the first call is slow
    rows, pictures = [], []
    for budget in tqdm(BUDGETS, desc="drawing", unit="budget", disable=not progress):
        num_latents = model.resolve_budget(budget)
        generators = [generator(config.seed, "sheet", i) for i in range(len(labels))]
        started = time.perf_counter()
        images = pipeline(
            labels,
            budget=budget,
            num_inference_steps=config.sample.steps,
            guidance=guidance,
            generator=generators,
            output_type="pt",
            return_dict=False,
        )[0]  # (B, C, H, W) in [0, 1]
        seconds = time.perf_counter() - started
        rows.append(
            BudgetRow(
                budget=model.budget_of(num_latents),
                num_latents=num_latents,
                mflops=flops(num_latents) / 1e6,
                ms_per_image=1000 * seconds / len(labels),
                accuracy=classifier.accuracy(images * 2 - 1, torch.tensor(labels)),
            )
        )
        first = processor.pt_to_numpy(images[:num_classes])
        pictures.append(processor.numpy_to_pil(first))
    return rows, pictures
