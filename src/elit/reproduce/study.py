"""A study: all pieces of its claims, done once, by processes side by side; then the report."""

import ast
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
from elit._devices import usable_cores
from elit._files import locked, remove_leftovers, write_json
from elit._plain import read_json
from elit._signals import stop_on_signals
from elit.data import ImageDataset, load_dataset
from elit.reproduce.claims import CLAIMS
from elit.reproduce.evidence import Study
from elit.reproduce.pieces import Piece, Pieces
from elit.reproduce.report import write_report
from elit.reproduce.runs import Trainings
from elit.reproduce.scales import Scale
from elit.reproduce.workers import Workers, end_if_imported
from elit.training.config import DataConfig
from elit.training.loop import TrainingDivergedError
from elit.training.metrics import FILE as METRICS

STAMP = "study.json"
# Whose code changes what is trained and measured; judging may change.
_ROOMS = (
    "data", "evaluation", "flow", "interface", "layers", "models", "pipelines", "training",
    "reproduce/measure.py", "reproduce/pieces.py", "reproduce/runs.py", "reproduce/spread.py",
)  # fmt: skip
_DIFFERS = {
    "code": "elit's code, or the version of Python, has changed since",
    "data": "the data are others",
}
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
    end_if_imported()
    for letter in claims:
        check_choice(letter, CLAIMS, "claim")
    for name, value in (("workers", workers), ("seeds", seeds)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    if seeds is not None:
        scale = replace(scale, seeds=seeds, few_seeds=seeds)
    trainings = Trainings(scale, folder, data)
    held_out = load_dataset(data.name, "validation", **data.options)
    with locked(folder, f"another study runs in {folder}; wait for its end"):
        started = check_stamp(folder, scale, [trainings.dataset, held_out])
        remove_leftovers(folder / "pieces")
        study = Study(Pieces(trainings))
        chosen = [CLAIMS[letter] for letter in sorted(set(claims), key=list(CLAIMS).index)]
        needs = {claim.letter: {p.key: p for p in claim.needs(study)} for claim in chosen}
        pieces = {key: piece for needed in needs.values() for key, piece in needed.items()}
        count = workers or scale.workers or usable_cores()
        todo = {k: p for k, p in pieces.items() if not p.file(folder).exists()}
        if todo:
            do_all(needs, todo, min(count, len(todo)), trainings, progress)
        left = sum(not p.file(folder).exists() for p in pieces.values())
        if left:
            return StudyResult(folder, False, len(pieces) - left, len(pieces))
        results = {
            k: read_json(p.file(folder), "remove it, and the same command makes it anew")
            for k, p in pieces.items()
        }
        study.results = results
        about = {
            "started": started,
            "machine": machine(scale.device),
            "command": command,
            "minutes": sum(result["seconds"] for result in results.values()) / 60,
        }
        report = write_report(folder, study, chosen, about)
        return StudyResult(folder, True, len(pieces), len(pieces), report)


def do_all(
    needs: Mapping[str, Mapping[str, Piece]],
    todo: dict[str, Piece],
    count: int,
    trainings: Trainings,
    progress: bool,
) -> None:
    """Do what is to be done, the longest first, until all is done or a signal comes.

    Args:
        needs: pieces by their keys, of each claim.
        todo: those of them that are not done yet; emptied.
        count: processes.
        trainings: of the study.
        progress: whether to show a bar.
    """
    folder = trainings.folder
    pieces = {key: piece for needed in needs.values() for key, piece in needed.items()}
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
                try:
                    for connection in crew.free:
                        piece = _next(todo, folder)
                        if piece is None:
                            break
                        crew.give(connection, todo.pop(piece.key))
                    crew.done(_POLL)
                except ChildProcessError:
                    if not stop_requested():  # the signal may have come to all at once
                        raise
                except TrainingDivergedError as error:
                    assert crew.failed is not None
                    raise TrainingDivergedError(
                        f"{error}; {way_out(needs, crew.failed)}"
                    ) from error
                left = [p.cost for p in todo.values()]
                left += [p.cost * (1 - _share(p, trainings)) for p in crew.busy.values()]
                bar.n = max(bar.n, total - sum(left) / 1e12)
                bar.set_postfix_str(f"{len(todo) + len(crew.busy)} pieces left", refresh=False)
                if not bar.disable and os.isatty(2):
                    bar.refresh()
                else:
                    bar.update(0)
        except BaseException:
            crew.stop()
            raise
        if crew.busy:
            crew.stop()
        else:
            crew.end()


def way_out(needs: Mapping[str, Mapping[str, Piece]], piece: Piece) -> str:
    """What can be judged though a piece cannot be done."""
    others = [letter for letter, needed in needs.items() if piece.key not in needed]
    ways = [f"--claims {' '.join(others)}"] if others else []
    if piece.training.seed > 1:
        ways.append(f"--seeds {piece.training.seed}")
    stuck = " ".join(letter for letter in needs if letter not in others)
    known = f"; without it there is {' or '.join(ways)}" if ways else ""
    return f"the same happens each time, and claims {stuck} need this piece{known}"


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


def check_stamp(folder: Path, scale: Scale, splits: Sequence[ImageDataset]) -> str:
    """Raise a ValueError if a folder's study is another one; the date when it began."""
    stamp = {
        "scale": json.loads(json.dumps(scale.settings())),
        "data": " ".join(data_digest(split) for split in splits),
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
    found = read_json(file, "choose another folder")
    there, here = dict(_flat(found)), dict(_flat(stamp))
    for key in [*here, *there]:
        if key != "started" and there.get(key) != here.get(key):
            differs = _DIFFERS.get(key, f"{key} is {there.get(key)} there and {here.get(key)} now")
            raise ValueError(
                f"{folder} holds a study of other settings: {differs}; choose another folder, or "
                f"remove that one"
            )
    return found["started"]


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree


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
            digest.update(without_words(file.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:16]


def without_words(code: str) -> str:
    """What code does, without comments, docstrings and layout."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                line
                for line in node.body
                if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
    return ast.dump(tree)


def machine(device: str) -> str:
    """What it ran on, in words."""
    name = platform.processor() or platform.machine()
    if device.startswith("cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{name}, {usable_cores()} cores, torch {torch.__version__}"
