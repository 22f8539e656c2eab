"""A study: all pieces of its claims, done once, by processes side by side; then the report."""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import elit
from elit._choices import check_choice
from elit._files import remove_leftovers, write_json
from elit.data import ImageDataset
from elit.reproduce.claims import CLAIMS
from elit.reproduce.evidence import Study
from elit.reproduce.pieces import Piece, Pieces
from elit.reproduce.report import write_report
from elit.reproduce.runs import Trainings
from elit.reproduce.scales import Scale
from elit.reproduce.workers import Workers
from elit.training.config import DataConfig
from elit.training.folder import lock_folder
from elit.training.metrics import FILE as METRICS
from elit.training.signals import stop_on_signals

STAMP = "study.json"
_ROOMS = ("layers", "interface", "models", "flow")  # whose code changes what is trained
_POLL = 1.0  # seconds


@dataclass(frozen=True)
class StudyResult:
    """How a call of `reproduce` ended.

    Attributes:
        folder: of the study.
        finished: whether all was done; if a signal stopped it, there is no report.
        done: pieces done.
        pieces: of all.
        report: what results.json holds.
    """

    folder: Path
    finished: bool
    done: int
    pieces: int
    report: dict[str, Any] | None = None


def reproduce(
    scale: Scale,
    folder: Path,
    data: DataConfig,
    claims: Sequence[str] = tuple(CLAIMS),
    workers: int | None = None,
    seeds: int | None = None,
    command: str = "",
    progress: bool = True,
) -> StudyResult:
    """Train and measure what some claims need, and write the page, picture, JSON and table.

    The same call again goes on where it was stopped or killed.

    Args:
        scale: all numbers of the study.
        folder: of the study.
        data: name and options of the data set.
        claims: letters of CLAIMS.
        workers: processes; by default the scale's, or one for each core.
        seeds: of each model, in place of the scale's numbers.
        command: what was typed, for the report.
        progress: whether to show a bar.
    """
    for letter in claims:
        check_choice(letter, CLAIMS, "claim")
    if seeds is not None:
        scale = replace(scale, seeds=seeds, few_seeds=seeds)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_folder(folder)
    except ValueError as error:
        raise ValueError(f"another study runs in {folder}; wait for its end") from error
    with contextlib.closing(lock):
        trainings = Trainings(scale, folder, data)
        started = check_stamp(folder, scale, trainings.dataset)
        remove_leftovers(folder / "pieces")
        study = Study(Pieces(trainings))
        chosen = [CLAIMS[letter] for letter in sorted(set(claims), key=list(CLAIMS).index)]
        pieces = {p.key: p for claim in chosen for p in claim.needs(study)}
        count = workers or scale.workers or os.cpu_count() or 1
        todo = {k: p for k, p in pieces.items() if not p.file(folder).exists()}
        if todo:
            do_all(pieces, todo, min(count, len(todo)), trainings, progress)
        left = sum(not p.file(folder).exists() for p in pieces.values())
        if left:
            return StudyResult(folder, False, len(pieces) - left, len(pieces))
        results = {k: json.loads(p.file(folder).read_text()) for k, p in pieces.items()}
        study.results = results
        about = {
            "started": started,
            "machine": machine(scale.device),
            "command": command,
            "core_minutes": sum(result["seconds"] for result in results.values()) / 60,
        }
        report = write_report(folder, study, chosen, about)
        return StudyResult(folder, True, len(pieces), len(pieces), report)


def do_all(
    pieces: Mapping[str, Piece],
    todo: dict[str, Piece],
    count: int,
    trainings: Trainings,
    progress: bool,
) -> None:
    """Do what is to be done, the longest first, until all is done or a signal comes.

    Args:
        pieces: of the study.
        todo: those of them that are not done yet; emptied.
        count: processes.
        trainings: of the study.
        progress: whether to show a bar.
    """
    folder = trainings.folder
    total = sum(p.cost for p in pieces.values()) / 1e12
    bar = tqdm(
        total=total, desc="reproducing", disable=not progress, dynamic_ncols=True,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} TFLOPs "
        "[{elapsed}<{remaining}{postfix}]",
        initial=total - sum(p.cost * (1 - _share(p, trainings)) for p in todo.values()) / 1e12,
    )  # fmt: skip
    with bar, stop_on_signals() as stop_requested:
        crew = Workers(count, trainings.scale, folder, trainings.data)
        try:
            while todo or crew.busy:
                if stop_requested():
                    bar.set_postfix_str("stopping")
                    break
                for connection in crew.free:
                    piece = _next(todo, folder)
                    if piece is None:
                        break
                    crew.give(connection, todo.pop(piece.key))
                try:
                    crew.done(_POLL)
                except ChildProcessError:
                    if not stop_requested():  # the signal may have come to all at once
                        raise
                left = [p.cost for p in todo.values()]
                left += [p.cost * (1 - _share(p, trainings)) for p in crew.busy.values()]
                bar.n = max(bar.n, total - sum(left) / 1e12)
                bar.set_postfix_str(f"{len(todo) + len(crew.busy)} pieces left", refresh=False)
                bar.refresh() if not bar.disable and os.isatty(2) else bar.update(0)
        except BaseException:
            crew.stop()
            raise
        if crew.busy:
            crew.stop()
        else:
            crew.end()


def _next(todo: Mapping[str, Piece], folder: Path) -> Piece | None:
    """The longest piece whose model is there."""
    ready = [
        p
        for p in todo.values()
        if p.needs is None or (folder / "pieces" / f"{p.needs}.json").exists()
    ]
    return max(ready, key=lambda p: p.cost, default=None)


def _share(piece: Piece, trainings: Trainings) -> float:
    """How much of a piece is done, by the last line that its training has logged."""
    if piece.kind != "train":
        return 0.0
    file = trainings.folder / "runs" / piece.training.name / METRICS
    try:
        with file.open("rb") as log:
            log.seek(max(0, file.stat().st_size - 4096))
            lines = log.read().splitlines()
        return json.loads(lines[-1])["step"] / piece.training.steps
    except (OSError, ValueError, IndexError, KeyError):
        return 0.0


def check_stamp(folder: Path, scale: Scale, dataset: ImageDataset) -> str:
    """Raise a ValueError if a folder's study is another one; the date when it began."""
    stamp = {
        "scale": json.loads(json.dumps(scale.settings())),
        "data": data_digest(dataset),
        "elit": elit.__version__,
        "torch": torch.__version__,
        "code": code_digest(),
    }
    file = folder / STAMP
    if not file.exists():
        if any(folder.glob("[!.]*")):
            raise ValueError(f"{folder} holds something else; choose another folder, or remove it")
        write_json(file, {**stamp, "started": date.today().isoformat()})
        return date.today().isoformat()
    found = json.loads(file.read_text())
    there, here = dict(_flat(found)), dict(_flat(stamp))
    for key in [*here, *there]:
        if key != "started" and there.get(key) != here.get(key):
            raise ValueError(
                f"{folder} holds a study of other settings: {key} is {there.get(key)} there and "
                f"{here.get(key)} now; choose another folder, or remove that one"
            )
    return found["started"]


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree


def data_digest(dataset: ImageDataset) -> str:
    """Digest of a data set: its own fingerprint, or of its labels and some pictures."""
    if dataset.fingerprint is not None:
        return dataset.fingerprint
    rows = range(0, len(dataset), max(1, len(dataset) // 64))
    seen = dataset.labels.numpy().tobytes() + dataset.batch(rows)["images"].numpy().tobytes()
    return hashlib.sha256(seen).hexdigest()[:16]


def code_digest() -> str:
    """Digest of the code that says what a model is: a study of two versions would mean nothing."""
    root, digest = Path(elit.__file__).parent, hashlib.sha256()
    for room in _ROOMS:
        for file in sorted((root / room).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def machine(device: str) -> str:
    """What it ran on, in words."""
    name = platform.processor() or platform.machine()
    if device.startswith("cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"
