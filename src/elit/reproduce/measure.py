"""What is measured of a trained model: held-out loss, samples, what is inside."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit._devices import pick_device
from elit._random import generator
from elit.choosing.points import OperatingPoint
from elit.data import ImageDataset, load_dataset
from elit.evaluation.drawing import Drawing
from elit.evaluation.frechet import Moments, frechet_distance
from elit.evaluation.images import to_bytes
from elit.evaluation.reference import evenly, image_features
from elit.flow.objective import SigmaDensity, flow_matching_loss
from elit.inspection.inspector import Inspector, Subject
from elit.inspection.numbers import numbers_of_maps
from elit.interface.budget import format_budget
from elit.networks.feature_network import FeatureNetwork, load_network
from elit.pipelines.elit_pipeline import ElitPipeline
from elit.training.config import DataConfig
from elit.training.metrics import FILE as METRICS

MOST_REFERENCE = 10_000  # real pictures that samples are compared with
_BATCH = 128
_POOL, _LOGITS = "classifier.pool", "classifier.logits"


class Bench:
    """Measures models of one study: the same pictures and the same noise for each of them.

    Args:
        data: name and options of the data set.
        images: held-out pictures at most.
        device: where to measure.
    """

    def __init__(self, data: DataConfig, images: int, device: str):
        self.data, self.images, self.device = data, images, pick_device(device)

    @cached_property
    def held_out(self) -> ImageDataset:
        """Pictures that no training sees."""
        return load_dataset(self.data.name, "validation", **self.data.options)

    @cached_property
    def network(self) -> FeatureNetwork:
        """A small classifier of the training pictures, by whose eyes samples are judged."""
        train = load_dataset(self.data.name, "train", **self.data.options)
        return load_network("classifier", dataset=train, device=self.device)

    @cached_property
    def reference(self) -> tuple[Moments, float]:
        """Moments of held-out pictures' features, and the classifier's accuracy on them."""
        moments, right, seen = Moments(), 0, 0
        for part in evenly(len(self.held_out), MOST_REFERENCE).split(500):
            batch = self.held_out.batch(part.tolist())
            pictures = to_bytes((self.held_out.on_device(batch["images"]) + 1) / 2)
            found = image_features(self.network, pictures)
            moments.update(found[_POOL])
            right += int((found[_LOGITS].argmax(1) == batch["class_labels"]).sum())
            seen += len(part)
        return moments, right / seen

    @torch.no_grad()
    def losses(
        self, model: Any, chosen: Sequence[tuple[int | None, Tensor | None]]
    ) -> list[Tensor]:
        """Losses (samples,) of the same pictures, noise and noise levels, at several choices.

        Args:
            model: class-conditional.
            chosen: number of latents and, instead of the first ones, their indices.
        """
        model = model.eval().to(self.device)
        rows = evenly(len(self.held_out), self.images)
        draw = generator(0, "validation")
        noise = torch.randn((len(rows), *self.held_out.image_shape), generator=draw)
        sigma = SigmaDensity().sample(len(rows), draw)
        found: list[list[Tensor]] = [[] for _ in chosen]
        for part in torch.arange(len(rows)).split(_BATCH):
            batch = self.held_out.batch(rows[part].tolist())
            images = self.held_out.on_device(batch["images"].to(self.device))
            labels = batch["class_labels"].to(self.device)
            moved = images, noise[part].to(self.device), sigma[part].to(self.device)
            for (num_latents, indices), losses in zip(chosen, found, strict=True):
                latents: dict[str, Any] = {}
                if num_latents is not None:
                    latents["num_latents"] = num_latents
                if indices is not None:
                    latents["latent_indices"] = indices.to(self.device)

                def velocity(
                    x: Tensor, s: Tensor, labels: Tensor = labels, more: dict = latents
                ) -> Tensor:
                    return model(x, s, class_labels=labels, **more, return_dict=False)[0]

                losses.append(flow_matching_loss(velocity, *moved).cpu())
        return [torch.cat(losses) for losses in found]

    def ladder(
        self, model: Any, budgets: Sequence[float], random_sets: int, seed: int
    ) -> dict[str, Any]:
        """Loss at each budget, of the first latents and, below full budget, of random ones.

        Args:
            model: class-conditional.
            budgets: to measure at.
            random_sets: sets of random latents at each of them.
            seed: of these sets, each training's its own.
        """
        kept = [model.resolve_budget(budget) for budget in budgets]
        chosen: list[tuple[int | None, Tensor | None]] = [(n, None) for n in kept]
        draw = generator(seed, "budget")
        for n in kept:
            for _ in range(random_sets if n and n < model.max_latents else 0):
                order = torch.randperm(model.max_latents, generator=draw)
                chosen.append((n, order[:n].sort().values))  # as training draws them
        found = self.losses(model, chosen)
        losses: dict[str, Any] = {}
        randoms: dict[str, list[float]] = {}
        for (n, indices), loss in zip(chosen, found, strict=True):
            name = format_budget(model.budget_of(n))
            if indices is None:
                error = float(loss.double().std() / len(loss) ** 0.5)
                losses[name] = {"loss": float(loss.double().mean()), "error": error}
            else:
                randoms.setdefault(name, []).append(float(loss.double().mean()))
        return {
            "losses": losses,
            "random": {name: sum(values) / len(values) for name, values in randoms.items()},
            "images": len(found[0]),
        }

    def draw(self, folder: Path, point: OperatingPoint, count: int) -> dict[str, Any]:
        """Draw samples and judge them."""
        pipeline = ElitPipeline.from_pretrained(folder).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        drawing = Drawing(pipeline, [self.network], count, batch_size=_BATCH)
        found = drawing.draw(point, range(count))
        moments = Moments()
        moments.update(found[_POOL])
        real, accuracy = self.reference
        right = found[_LOGITS].argmax(1) == found["labels"]
        return {
            **point.to_dict(),
            "flops": drawing.flops(point),
            "frechet": frechet_distance(
                moments.mean, moments.covariance, real.mean, real.covariance
            ),
            "accuracy": float(right.double().mean()),
            "real_accuracy": accuracy,
            "samples": count,
        }

    def look(self, model: Any, count: int, sigmas: Sequence[float]) -> dict[str, Any]:
        """How Read's attention goes with the loss, with the shuffled control."""
        model = model.eval().to(self.device)
        batch = self.held_out.batch(evenly(len(self.held_out), count).tolist())
        images = self.held_out.on_device(batch["images"])
        inspector = Inspector(model, Subject(images, {"class_labels": batch["class_labels"]}))
        levels = []
        for sigma in sigmas:
            (maps,) = inspector.maps(sigma, [model.max_latents])
            numbers = numbers_of_maps(maps, 1.0)["attention_loss"]
            levels.append({"sigma": sigma, **(numbers or {})})
        return {"levels": levels, "images": len(images)}


def curve(folder: Path) -> list[tuple[int, float]]:
    """Held-out loss at full budget by step, as the training has logged it."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [(x["step"], x["validation/loss_1"]) for x in lines if "validation/loss_1" in x]
