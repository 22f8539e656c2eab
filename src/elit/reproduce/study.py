"""A study: all pieces of its claims, done once, by processes side by side; then the report."""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

import elit
from elit._choices import check_choice
from elit._devices import usable_cores
from elit._files import locked, remove_leftovers, write_json
from elit._plain import read_json
from elit.data import ImageDataset, load_dataset
from elit.reproduce.claims import CLAIMS
from elit.reproduce.evidence import Study
from elit.reproduce.report import write_report
from elit.reproduce.scales import Scale
from elit.reproduce.workers import do_all, end_if_imported
from elit.training.config import DataConfig

STAMP = "study.json"
# Whose code changes what is trained and measured; judging may change.
_ROOMS = (
    "cost", "data", "evaluation", "flow", "interface", "layers", "models", "pipelines", "training",
    "choosing/points.py", "reproduce/measure.py", "reproduce/runs.py", "reproduce/spread.py",
)  # fmt: skip
_DIFFERS = {
    "code": "elit's code has changed since",
    "data": "the data are others",
}


@dataclass(frozen=True)
class StudyResult:
    """How a call of `reproduce` ended."""

    folder: Path  # of the study
    finished: bool  # whether all was done; if a signal stopped it, there is no report
    done: int  # pieces done
    pieces: int  # of all
    report: dict[str, Any] | None = None  # what results.json holds


def reproduce(
    scale: Scale,
    folder: Path,
    data: DataConfig,
    claims: Sequence[str] = tuple(CLAIMS),
    workers: int | None = None,  # processes; by default the scale's, or one for each core
    seeds: int | None = None,  # of each model, in place of the scale's numbers
    command: str = "",  # what was typed, for the report
    progress: bool = True,  # whether to show a bar
) -> StudyResult:
    """Train and measure what some claims need, and write the page, picture, JSON and table.

    The same call again goes on where it was stopped or killed.
    """
    end_if_imported()
    for letter in claims:
        check_choice(letter, CLAIMS, "claim")
    for name, value in (("workers", workers), ("seeds", seeds)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    if seeds is not None:
        scale = replace(scale, seeds=seeds, few_seeds=seeds)
    study = Study(scale, folder, data)
    held_out = load_dataset(data.name, "validation", **data.options)
    with locked(folder, f"another study runs in {folder}; wait for its end"):
        started = check_stamp(folder, scale, [study.dataset, held_out])
        remove_leftovers(folder / "pieces")
        letters = sorted(set(claims))
        needs = {c: {piece.key: piece for piece in CLAIMS[c].needs(study)} for c in letters}
        pieces = {key: piece for needed in needs.values() for key, piece in needed.items()}
        count = workers or scale.workers or usable_cores()
        todo = {k: p for k, p in pieces.items() if not p.file(folder).exists()}
        if todo:
            do_all(needs, todo, min(count, len(todo)), study, progress)
        left = sum(not p.file(folder).exists() for p in pieces.values())
        if left:
            return StudyResult(folder, False, len(pieces) - left, len(pieces))
        study.results = {key: piece.result(folder) for key, piece in pieces.items()}
        minutes = sum(result["seconds"] for result in study.results.values()) / 60
        about = {"started": started, "machine": machine(scale.device)}
        about |= {"command": command, "minutes": minutes}
        report = write_report(folder, study, letters, about)
        return StudyResult(folder, True, len(pieces), len(pieces), report)


def check_stamp(folder: Path, scale: Scale, splits: Sequence[ImageDataset]) -> str:
    """Raise a ValueError if a folder's study is another one; the date when it began."""
    stamp: dict[str, Any] = {
        "scale": json.loads(json.dumps(scale.settings())),
        "data": " ".join(data_digest(split) for split in splits),
        "elit": elit.__version__,
        "torch": torch.__version__,
        "code": code_digest(),
        "started": date.today().isoformat(),
    }
    file = folder / STAMP
    if not file.exists():
        if any(folder.glob("[!.]*")):
            raise ValueError(f"{folder} holds something else; choose another folder, or remove it")
        write_json(file, stamp)
        return stamp["started"]
    found = read_json(file, "choose another folder")
    old, new = found.get("scale", {}), stamp["scale"]
    pairs = {f"scale.{key}": (old.get(key), new[key]) for key in new}
    pairs |= {key: (found.get(key), stamp[key]) for key in ("data", "elit", "torch", "code")}
    for key, (there, here) in pairs.items():
        if there != here:
            differs = _DIFFERS.get(key, f"{key} is {there} there and {here} now")
            raise ValueError(
                f"{folder} holds a study of other settings: {differs}; choose another folder, or "
                f"remove that one"
            )
    return found["started"]


def data_digest(dataset: ImageDataset) -> str:
    """Digest of one split: its own fingerprint, or of its labels and some pictures."""
    if dataset.fingerprint is not None:
        return dataset.fingerprint
    rows = range(0, len(dataset), max(1, len(dataset) // 64))
    seen = dataset.labels.numpy().tobytes() + dataset.batch(rows)["images"].numpy().tobytes()
    return hashlib.sha256(seen).hexdigest()[:16]


def code_digest() -> str:
    """Digest of the code that trains and measures: a study of two versions would mean nothing."""
    root, digest = Path(elit.__file__).parent, hashlib.sha256()
    for room in _ROOMS:
        place = root / room
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def machine(device: str) -> str:
    """What it ran on, in words."""
    name = platform.processor() or platform.machine()
    if device.startswith("cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{name}, {usable_cores()} cores, torch {torch.__version__}"
