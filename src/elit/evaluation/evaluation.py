"""An evaluation: draw, look, score, and say with each score what it depends on."""

import json
import logging
import platform
import statistics
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elit._files import digest_of, write_file, write_json
from elit._process import Process
from elit.choosing.points import OperatingPoint
from elit.choosing.sweep_file import FORMAT
from elit.choosing.timing import CallTimes, describe, device_name
from elit.evaluation.drawing import Drawing
from elit.evaluation.images import Images
from elit.evaluation.measure import Scores, measure
from elit.evaluation.parts import Parts, part_size
from elit.evaluation.reference import Reference, make_reference
from elit.interface.fit import format_size
from elit.networks.weights import checksum_of
from elit.pipelines.autoencoder import SamplesDivergedError
from elit.pipelines.folder import weights_digest
from elit.viz.sweeps import SCORES

logger = logging.getLogger(__name__)

FAILED = "failed.json"  # in a point's folder, instead of parts that can't be drawn
_LIBRARIES = ("elit-diffusion", "torch", "diffusers", "transformers", "numpy", "pillow")
_SCORED = 2  # counts what `measure` gives: Frechet distances have errors
_NOT_OF_THE_SAMPLES = ("device", "device_name", "versions", "reference")  # may change on the way


@dataclass(frozen=True)
class Evaluation:
    """Draws samples and compares them with real images, by several processes."""

    run: str  # folder or hub name of the pipeline
    drawing: Drawing  # of its samples
    images: Images  # the real ones
    process: Process  # this one
    home: Path  # folder of the samples' features; each operating point has one of its own in it
    # what is known of the model's training: steps and EFLOPs
    training: dict[str, Any] | None = None
    progress: bool = True  # whether to show bars
    variant: str | None = None  # of the files that the weights were read from

    def __post_init__(self) -> None:
        real, drawn = self.images.shape[1:], self.drawing.image_shape()[1:]
        if self.images.count and real != drawn:  # statistics alone say nothing of a size
            raise ValueError(
                f"{self.images.name} has {format_size(real)}, but {self.run} draws "
                f"{format_size(drawn)}: scores of different sizes mean nothing; give images of "
                f"that size, or a folder with --fit, which scales and cuts them"
            )

    @cached_property
    def model(self) -> dict[str, Any]:
        """The report's part on the model."""
        model = self.drawing.pipeline.transformer
        return {
            "path": self.run,
            "class": type(model).__name__,
            "config": digest_of(describe(model)),
            "weights": self._weights("transformer"),
            "parameters": sum(p.numel() for p in model.parameters()),
            "elastic": model.is_elastic,
            "max_latents": model.max_latents,
            "training": self.training,
        }

    def _weights(self, part: str) -> str | None:
        """Digest of a part's weights: of its files or, of a name on the hub, of what was loaded."""
        module = getattr(self.drawing.pipeline, part, None)
        if module is None:
            return None
        return weights_digest(Path(self.run), part) or checksum_of(module)[:16]

    def _text_encoder(self) -> str | None:
        """Digest of the text encoder's weights and settings, and of its tokenizer's files."""
        encoder = getattr(self.drawing.pipeline, "text_encoder", None)
        if encoder is None:
            return None
        tokenizer = weights_digest(Path(self.run), "tokenizer", "*")
        return digest_of([self._weights("text_encoder"), encoder.config.to_dict(), tokenizer])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that all scores depend on but the operating point."""
        drawing = self.drawing
        pipeline = drawing.pipeline
        model, vae = pipeline.transformer, pipeline.vae
        texts = f"{len(drawing.texts)} texts, {digest_of(list(drawing.texts))}"
        return {
            "samples": drawing.count,
            "seed": drawing.seed,
            "drawn": texts if drawing.texts else "classes, balanced",
            "text_encoder": self._text_encoder(),
            "text_tokens": drawing.text_tokens,
            "sampler": type(pipeline.scheduler).__name__,
            "sampler_settings": digest_of(describe(pipeline.scheduler)),
            "dtype": str(model.dtype).removeprefix("torch.")
            + (f" of {self.variant}" if self.variant else ""),
            "batch_size": drawing.batch_size,
            "size": list(drawing.image_shape()[1:]),
            "eight_bit": True,
            "vae": None if vae is None else {
                "class": type(vae).__name__, "weights": self._weights("vae"),
                "config": digest_of(describe(vae)),
            },
            "networks": [
                {"name": n.name, "weights": n.checksum, "preprocessing": n.preprocessing}
                for n in drawing.networks
            ],
            "reference": {
                "name": self.images.name, "digest": self.images.digest,
                "images": self.images.count or None,
            },
            "device": model.device.type,
            "device_name": device_name(model.device),
            "versions": versions(),
        }  # fmt: skip

    def parts(self, point: OperatingPoint) -> Parts:
        """The files that keep the samples of a point."""
        drawing = self.drawing
        settings = {k: v for k, v in self.settings.items() if k not in _NOT_OF_THE_SAMPLES}
        of = self.model["weights"], self.model["config"]
        key = digest_of([of, settings, point.to_dict(), drawing.keep_images])
        size = part_size(drawing.count, drawing.batch_size)
        return Parts(self.home / "samples" / key, drawing.count, size)

    def make_reference(self) -> Reference | None:
        """Statistics of the real images; in the first process alone."""
        return make_reference(
            self.images, self.drawing.networks, self.process, progress=self.progress
        )

    def draw(self, point: OperatingPoint, bar: tqdm, offset: int = 0) -> None:
        """Draw this process's share of a point's samples."""
        parts = self.parts(point)
        settings, failed = self.settings, parts.folder / FAILED
        used = (f"{name} {settings['versions'][name]}" for name in ("torch", "elit-diffusion"))
        origin = ", ".join((settings["device_name"], *used))
        if failed.exists():
            return
        try:
            if parts.missing():
                self.drawing.warm_up(point)
            parts.make(
                lambda samples: self.drawing.draw(point, samples), self.process, bar, offset,
                origin, failed.exists,
            )  # fmt: skip
        except SamplesDivergedError as error:
            write_json(failed, {"reason": str(error)})

    def row(self, point: OperatingPoint, reference: Reference) -> dict[str, Any]:
        """Scores of a point whose parts are all there, with its settings and its FLOPs."""
        parts = self.parts(point)
        failed = parts.folder / FAILED
        failure = json.loads(failed.read_text())["reason"] if failed.exists() else None
        scores = vars(Scores()) if failure else self._scores(parts, reference)
        calls = self.drawing.calls(point)
        pipeline = self.drawing.pipeline
        size = pipeline.input_size(*self.drawing.place)
        levels = pipeline.start(point.steps, "cpu", size=size)
        return {
            **point.to_dict(),
            "num_latents": pipeline.transformer.resolve_budget(point.budget),
            "sampler": type(pipeline.scheduler).__name__,
            "calls": len(calls),
            "grid": [round(level, 6) for level in levels],
            **self.ran(point),
            "scores": scores["values"],
            "scores_of": scores["of"],
            "deviations": scores["deviations"],
            "warnings": [failure] if failure else scores["warnings"],
            "drawn_on": [] if failure else parts.origins(),
        }

    def ran(self, point: OperatingPoint) -> dict[str, Any]:
        """FLOPs of an image; with a step cache, those that were done, and the share of skips."""
        parts = self.parts(point)
        whole = {"gflops_per_image": self.drawing.flops(point) / 1e9}
        if point.cache is None:
            return whole
        if parts.missing():  # it can't be drawn
            return whole | {"skipped": 0.0}
        flops, skipped = (float(parts.whole(name).mean()) for name in ("flops", "skipped"))
        return {"gflops_per_image": flops / 1e9, "skipped": skipped}

    def times(self) -> CallTimes:
        """Of a batch as it is drawn here."""
        drawing = self.drawing
        batch = [drawing.wanted(i) for i in range(min(drawing.batch_size, drawing.count))]
        return CallTimes(drawing.pipeline, batch, drawing.place, progress=self.progress)

    def add_times(self, rows: Sequence[dict[str, Any]]) -> None:
        """Measure what an image of each row takes, now that nothing else runs here."""
        times = self.times()
        all_ms = times.ms_of_points([OperatingPoint.from_dict(row) for row in rows])
        for row, ms in zip(rows, all_ms, strict=True):
            row["ms_per_image"] = ms
            row["decode_ms_per_image"] = times.decode_ms_per_image()

    def _scores(self, parts: Parts, reference: Reference) -> dict[str, Any]:
        """Scores of the parts, kept beside them for this reference."""
        file = parts.folder / "scores.json"
        settings = self.settings
        of = settings["reference"], settings["networks"], settings["versions"]
        key = digest_of([_SCORED, *of])
        try:
            earlier = json.loads(file.read_text())
            if earlier["key"] == key:
                return earlier["scores"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or of another reference
        labelled = not self.drawing.texts
        networks = self.drawing.networks
        scores = vars(measure(parts, networks, reference, labelled, self.progress))
        write_json(file, {"key": key, "scores": scores})
        return scores


def report(
    evaluation: Evaluation, rows: Sequence[dict[str, Any]], ranked_by: str
) -> dict[str, Any]:
    """Content of the files: rows and all that they depend on."""
    return {
        "format": FORMAT,
        "model": evaluation.model,
        "settings": evaluation.settings,
        "ranked_by": ranked_by,
        "lower_is_better": SCORES[ranked_by].lower_is_better,
        "rows": list(rows),
    }


def ranking_score(scores: dict[str, float]) -> str:
    """The score that points are ranked by: the first network's Frechet distance, if it has one."""
    for group in (("fid", "fdd", "fvd", "fd"), ("clip", "is", "accuracy")):
        for name in scores:  # by network
            if name in group:
                return name
    raise ValueError("the networks give no score; add inception, dinov2 or classifier")


def score_points(
    evaluation: Evaluation, points: Sequence[OperatingPoint], words: str
) -> list[dict[str, Any]] | None:
    """Draw points until all processes are done, and score them; all processes call this.

    Returns:
        A row of each, in the first process.
    """
    reference = evaluation.make_reference()
    is_first = evaluation.process.rank == 0
    todo = sum(evaluation.parts(point).todo() for point in points)
    hidden = not (is_first and evaluation.progress)
    with tqdm(total=todo, desc=words, unit="image", disable=hidden) as bar:
        for i, point in enumerate(points):
            bar.set_postfix_str(str(point), refresh=False)
            evaluation.draw(point, bar, offset=i)
        if reference is None:
            return None
        for parts in map(evaluation.parts, points):
            parts.wait(bar, (parts.folder / FAILED).exists)
    hidden = hidden or len(points) == 1
    bar = tqdm(points, "scoring", unit="point", disable=hidden)
    return [evaluation.row(point, reference) for point in bar]


def evaluate(evaluation: Evaluation, point: OperatingPoint) -> dict[str, Any] | None:
    """The report of one operating point, in the first process; all processes call this."""
    rows = score_points(evaluation, [point], "drawing")
    if rows is None:
        return None
    (row,) = rows
    if not row["drawn_on"]:
        raise ValueError(f"{point}: {row['warnings'][0]}")
    evaluation.add_times(rows)
    seconds = evaluation.parts(point).whole("seconds")
    row["drawn_ms_per_image"] = 1000 * statistics.median(seconds.tolist())  # checks what was timed
    return report(evaluation, rows, ranking_score(row["scores"]))


def save_npz(parts: Parts, path: Path) -> None:
    """Write all samples as `arr_0` (N, H, W, C) uint8, as other evaluation tools read them."""
    first = next(parts.read("images"))
    if first.ndim != 4:
        raise ValueError("clips have no form that evaluation tools read; leave --save-npz out")
    shape = (parts.count, *first.shape[2:], 3)

    def write(aside: Path) -> None:
        with (
            zipfile.ZipFile(aside, "w", allowZip64=True) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for images in parts.read("images"):
                colour = images.expand(-1, 3, -1, -1)  # grey too
                member.write(colour.movedim(1, -1).contiguous().numpy().tobytes())

    write_file(path, write)


def versions() -> dict[str, str]:
    """Versions of the libraries that scores depend on."""
    numbers = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            continue
    return numbers
