"""Does the pieces of a study: trains, and measures held-out loss, samples and what is inside."""

import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit._devices import pick_device
from elit._files import write_json
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
from elit.reproduce.runs import Piece, Training, Trainings
from elit.training.loop import train
from elit.training.metrics import FILE as METRICS
from elit.training.metrics import read_metrics

MOST_REFERENCE = 10_000  # real pictures that samples are compared with
_BATCH = 128
_POOL, _LOGITS = "classifier.pool", "classifier.logits"


class Bench:
    """Measures models of one study: the same pictures and the same noise for each of them."""

    def __init__(self, trainings: Trainings):
        self.trainings, self.scale, self.data = trainings, trainings.scale, trainings.data
        self.device = pick_device(self.scale.device)

    @cached_property
    def held_out(self) -> ImageDataset:
        """Pictures that no training sees."""
        return load_dataset(self.data.name, "validation", **self.data.options)

    @cached_property
    def network(self) -> FeatureNetwork:
        """A small classifier of the training pictures, by whose eyes samples are judged."""
        return load_network("classifier", dataset=self.trainings.dataset, device=self.device)

    @cached_property
    def reference(self) -> tuple[Moments, float]:
        """Moments of held-out pictures' features, and the classifier's accuracy on them."""
        moments, right, rows = Moments(), 0, evenly(len(self.held_out), MOST_REFERENCE)
        for part in rows.split(500):
            batch = self.held_out.batch(part.tolist())
            pictures = to_bytes((self.held_out.on_device(batch["images"]) + 1) / 2)
            features = image_features(self.network, pictures)
            moments.update(features[_POOL])
            right += int((features[_LOGITS].argmax(1) == batch["class_labels"]).sum())
        return moments, right / len(rows)

    def do(self, piece: Piece) -> bool:
        """Do a piece and write its result; False if a signal stopped it: the same again goes on."""
        training, run = piece.training, self.trainings.folder / "runs" / piece.training.name
        before, started = 0.0, time.perf_counter()
        if piece.kind == "train":
            config, make_model = self.trainings.config(training), training.form.make_model
            done = train(config, progress=False, make_model=make_model)
            if not done.finished or done.stopped:
                return False
            before, started = done.seconds, time.perf_counter()
        result: Mapping[str, Any]
        if piece.point is not None:
            result = self.draw(run, piece.point)
        else:
            model_class = training.form.model_class
            model = model_class.from_pretrained(run / "transformer", use_safetensors=True)
            if piece.kind == "look":
                result = self.look(model)
            else:
                ladder = self.ladder(model, training)
                curve = read_metrics(run / METRICS)["validation/loss_1"]
                result = {**training.to_dict(), **ladder, "curve": curve}
        seconds = before + time.perf_counter() - started
        result = {"key": piece.key, **result, "seconds": seconds}
        write_json(piece.file(self.trainings.folder), result)
        return True

    @torch.no_grad()
    def losses(self, model: Any, choices: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Losses (samples,) of the same pictures and noise, the forward told each choice."""
        model = model.eval().to(self.device)
        rows = evenly(len(self.held_out), self.scale.images)
        draw = generator(0, "validation")
        noise = torch.randn((len(rows), *self.held_out.image_shape), generator=draw)
        sigma = SigmaDensity().sample(len(rows), draw)
        losses: list[list[Tensor]] = [[] for _ in choices]
        for part in torch.arange(len(rows)).split(_BATCH):
            batch = self.held_out.batch(rows[part].tolist())
            images = self.held_out.on_device(batch["images"].to(self.device))
            labels = batch["class_labels"].to(self.device)
            moved = images, noise[part].to(self.device), sigma[part].to(self.device)
            for latents, of_choice in zip(choices, losses, strict=True):
                forward = partial(model, class_labels=labels, **latents, return_dict=False)

                def velocity(x: Tensor, s: Tensor, forward: Any = forward) -> Tensor:
                    return forward(x, s)[0]

                of_choice.append(flow_matching_loss(velocity, *moved).cpu())
        return [torch.cat(of_choice) for of_choice in losses]

    def ladder(self, model: Any, training: Training) -> dict[str, Any]:
        """Loss at each budget, of the first latents and, below full budget, of random ones."""
        kept = [model.resolve_budget(budget) for budget in self.trainings.budgets(training)]
        choices: list[dict[str, Any]] = [{"num_latents": n} for n in kept]
        draw = generator(training.seed, "budget")  # each training's own
        for n in kept:
            few = n and n < model.max_latents
            for _ in range(self.trainings.random_sets(training) if few else 0):
                order = torch.randperm(model.max_latents, generator=draw)
                indices = order[:n].sort().values  # as training draws them
                choices.append({"num_latents": n, "latent_indices": indices.to(self.device)})
        first: dict[str, Any] = {}
        random: dict[str, list[float]] = {}
        for choice, loss in zip(choices, self.losses(model, choices), strict=True):
            name = format_budget(model.budget_of(choice["num_latents"]))
            mean, error = loss.double().mean(), loss.double().std() / len(loss) ** 0.5
            if "latent_indices" in choice:
                random.setdefault(name, []).append(float(mean))
            else:
                first[name] = {"loss": float(mean), "error": float(error)}
        means = {name: sum(values) / len(values) for name, values in random.items()}
        return {"losses": first, "random": means, "images": len(loss)}

    def draw(self, folder: Path, point: OperatingPoint) -> dict[str, Any]:
        """Draw samples and judge them."""
        count = self.scale.samples
        pipeline = ElitPipeline.from_pretrained(folder).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        drawing = Drawing(pipeline, [self.network], count, batch_size=_BATCH)
        drawn = drawing.draw(point, range(count))
        moments = Moments()
        moments.update(drawn[_POOL])
        real, accuracy = self.reference
        right = drawn[_LOGITS].argmax(1) == drawn["labels"]
        mean, covariance = moments.mean, moments.covariance
        return {
            **point.to_dict(),
            "flops": drawing.flops(point),
            "frechet": frechet_distance(mean, covariance, real.mean, real.covariance),
            "accuracy": float(right.double().mean()),
            "real_accuracy": accuracy,
            "samples": count,
        }

    def look(self, model: Any) -> dict[str, Any]:
        """How Read's attention goes with the loss, with the shuffled control."""
        model = model.eval().to(self.device)
        batch = self.held_out.batch(evenly(len(self.held_out), self.scale.inspected).tolist())
        images = self.held_out.on_device(batch["images"])
        inspector = Inspector(model, Subject(images, {"class_labels": batch["class_labels"]}))
        levels = []
        for sigma in self.scale.sigmas:
            (maps,) = inspector.maps(sigma, [model.max_latents])
            numbers = numbers_of_maps(maps, 1.0)["attention_loss"]
            levels.append({"sigma": sigma, **(numbers or {})})
        return {"levels": levels, "images": len(images)}
