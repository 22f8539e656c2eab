"""The work of `elit prepare`: a source to a folder of shards, by any number of processes."""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from elit._devices import pick_device
from elit._files import remove_leftovers, write_json
from elit._process import Process, this_process
from elit._signals import ends_on_sigterm
from elit.data.manifest import (
    FORMAT,
    MOMENTS,
    SETTINGS,
    VERSION,
    Autoencoder,
    Manifest,
    Split,
    read_manifest,
    size_name,
)
from elit.preparation.autoencoder import Encoder, load_encoder
from elit.preparation.checks import check_content, check_same, forget_damaged, json_types
from elit.preparation.parts import Part, Record, make_null, parts_of, read_null, read_record
from elit.preparation.reading import Sizes, default_workers, read
from elit.preparation.settings import PrepareSettings
from elit.preparation.source import Source, open_source
from elit.preparation.texts import TextEncoder, load_texts

logger = logging.getLogger(__name__)

_MOST_ROWS, _MOST_BYTES = 4096, 2**30  # of a part
USUAL_STD = (0.3, 3.0)  # of latents that are scaled right


@dataclass(frozen=True)
class PrepareResult:
    """Result of a run of `prepare`."""

    folder: Path  # that was written
    finished: bool  # whether all parts are done, and the manifest is written
    missing: int  # parts, the empty text counted as one, that other processes have not done yet
    samples: dict[str, int]  # in the folder, by split, mirrored ones not counted
    skipped: list[tuple[str, int, str]]  # split, row and reason of all that could not be read
    bytes: int  # of all shards
    done: int  # rows that this run read
    seconds: float  # that it took for them
    mean: float | None = None  # of the latents as training draws them; None for pixels
    std: float | None = None  # likewise
    # captions that the text encoder's tokenizers cut off, by where
    cut: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Task:
    """Settings, source and models that all parts share."""

    folder: Path
    source: Source
    sizes: Sizes
    encoder: Encoder
    texts: TextEncoder | None
    parts: Sequence[tuple[str, int, range]]
    settings: PrepareSettings


def prepare(settings: PrepareSettings) -> PrepareResult:
    """Make what is not there yet of a prepared folder, as far as it falls to this process.

    Raises:
        ValueError: for what is wrong with the settings, the source or what lies in the folder.
        OSError: where the disk is full; what was finished stays, and the same call goes on.
        KeyboardInterrupt: on Ctrl-C and SIGTERM; likewise.
    """
    settings.check()
    process = this_process()
    with ends_on_sigterm():
        task = _open(settings, process)
        mine = [p for i, p in enumerate(task.parts) if i % process.world == process.rank]
        if settings.verify:
            forget_damaged(task.folder, mine)
        for part in mine:
            check_content(task.folder, part, task.source.splits[part[0]], settings.verify)
        if task.texts is not None and process.rank == 0:  # which makes the first part too
            make_null(task.folder, task.texts, task.encoder.dtype, settings.verify)
        start = time.perf_counter()
        done = _make([p for p in mine if not read_record(task.folder, *p)], task, mine, process)
        seconds = time.perf_counter() - start
        return _finish(task, done, seconds)


def _open(settings: PrepareSettings, process: Process) -> _Task:
    """The source and the models, and a folder whose settings are theirs."""
    sizes, folder = Sizes.of(settings), Path(settings.out)
    source = open_source(settings)
    if process.rank == 0:
        logger.info("%s: %s", source.name, "; ".join(source.notes))
    if settings.text_encoder is not None and not source.captions:
        raise ValueError("a text encoder needs captions; name their column with --caption-column")
    device = pick_device(settings.device, process.local_rank, share=True)
    encoder = load_encoder(settings.vae, sizes, device, settings.dtype, settings.store_dtype)
    texts = None
    if settings.text_encoder is not None:
        texts = load_texts(
            settings.text_encoder, settings.max_text_length, device, settings.dtype,
            settings.store_dtype,
        )  # fmt: skip
    size = settings.part_size or _part_size(sizes, encoder, texts, settings.flips)
    parts = [p for name, rows in source.splits.items() for p in parts_of(name, len(rows), size)]
    made_of = {
        "source": source.describe(),
        "classes": source.classes,
        "kind": encoder.kind,
        "autoencoder": encoder.about and asdict(encoder.about),
        "text_encoder": texts and {"name": texts.name, "sha256": texts.sha256},
        "max_text_length": texts and texts.max_length,
        "resolution": settings.resolution,
        "aspect_ratios": settings.aspect_ratios,
        "multiple": settings.multiple if settings.aspect_ratios else None,
        "flips": settings.flips,
        "frames": settings.frames,
        "fps": settings.fps,
        "clips_per_video": settings.clips_per_video if settings.frames else None,
        "part_size": size,
        "dtype": settings.dtype if encoder.about or texts else None,
        "store_dtype": settings.store_dtype if encoder.about or texts else None,
    }
    content = json_types({"format": FORMAT, "version": VERSION, **made_of})
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if not check_same(folder, content):
        write_json(folder / SETTINGS, content, replace=False)
        check_same(folder, content)  # another run may have begun at the same moment
    return _Task(folder, source, sizes, encoder, texts, parts, settings)


def _part_size(sizes: Sizes, encoder: Encoder, texts: TextEncoder | None, flips: bool) -> int:
    """Rows of a part: a power of two, few enough to be held in memory."""
    if encoder.vae is None:
        length = sizes.pixels
    else:
        smallest = min(size for choice in sizes.choices for size in choice)
        shape = (1, *((sizes.frames,) if sizes.frames else ()), *smallest, 3)
        share = sizes.pixels / math.prod(shape)
        encoded = encoder(torch.zeros(shape, dtype=torch.uint8))
        length = round(encoded.numel() * share * encoder.store.itemsize)
    length *= 2 if flips else 1
    if texts is not None:
        of_text = texts.stored(texts([""])).values()
        copies = len(sizes.choices) * sizes.clips
        length += copies * sum(x.numel() * x.element_size() for x in of_text)
    rows = max(1, _MOST_BYTES // length)
    return min(_MOST_ROWS, 2 ** max(0, rows.bit_length() - 1))


def _make(
    parts: Sequence[tuple[str, int, range]],
    task: _Task,
    mine: Sequence[tuple[str, int, range]],
    process: Process,
) -> int:
    """Make those of this process's parts that are not done; rows that were read."""
    if not parts:
        return 0
    todo, settings = sum(len(rows) for _, _, rows in parts), task.settings
    workers = default_workers(process.local_world) if settings.workers is None else settings.workers
    total = sum(len(rows) for _, _, rows in mine)
    spans = [(split, rows) for split, _, rows in parts]
    seen = [task.source.splits[split].seen(rows) for split, rows in spans]  # before they are read
    bar = tqdm(
        total=total, initial=total - todo, unit="video" if settings.frames else "image",
        desc=f"prepare {process.rank + 1}/{process.world}" if process.world > 1 else "prepare",
        smoothing=0.05, dynamic_ncols=True,
    )  # fmt: skip
    # One part is written while the next is encoded.
    with bar, ThreadPoolExecutor(1) as writer:
        writing: Future[Record] | None = None
        part: Part | None = None
        for number, chunk in read(task.source.splits, task.sizes, spans, workers):
            split, index, rows = parts[number]
            if part is None:
                part = Part(
                    split, index, rows, task.encoder, task.texts, settings.batch_size,
                    settings.flips, seen[number],
                )  # fmt: skip
            part.add(chunk)
            if part.taken == len(rows):
                tensors = part.finish()
                if writing is not None:
                    writing.result()
                writing, part = writer.submit(part.write, task.folder, tensors), None
            bar.update(chunk.count)
        if writing is not None:
            writing.result()
    return todo


def _finish(task: _Task, done: int, seconds: float) -> PrepareResult:
    """Write the manifest if all parts are done, and tell what there is."""
    of_parts = {part[:2]: read_record(task.folder, *part) for part in task.parts}
    records = {key: record for key, record in of_parts.items() if record is not None}
    missing = len(of_parts) - len(records)
    if task.texts is not None and read_null(task.folder) is None:
        missing += 1
    splits = {}
    for name in task.source.splits:
        of_split = [record for (split, _), record in records.items() if split == name]
        shards = tuple(shard for record in of_split for shard in record.shards)
        splits[name] = Split(shards, tuple(row for record in of_split for row in record.skipped))
    skipped = [(name, *what) for name, split in splits.items() for what in split.skipped]
    if not missing:
        if not any(split.count for split in splits.values()):
            raise ValueError(
                f"nothing of {task.source.name} could be read: row {skipped[0][1]}: {skipped[0][2]}"
            )
        _write_manifest(task, splits)
    cut: Counter[str] = Counter()
    for record in records.values():
        cut.update(record.cut)
    for where, count in (+cut).items():
        total = sum(split.count for split in splits.values())
        logger.warning("%d of %d captions were cut off at %s", count, total, where)
    mean, std = _statistics(list(records.values()))
    if std is not None and not USUAL_STD[0] < std < USUAL_STD[1]:
        logger.warning(
            "the scaled latents have a standard deviation of %.3g, but training wants about 1; "
            "look at scaling_factor and shift_factor in the autoencoder's config.json", std
        )  # fmt: skip
    samples = {name: split.count for name, split in splits.items()}
    length = sum(shard.bytes for split in splits.values() for shard in split.shards)
    return PrepareResult(
        task.folder, not missing, missing, samples, skipped, length, done, seconds, mean, std,
        dict(+cut),
    )  # fmt: skip


def _statistics(records: Sequence[Record]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of the latents of all records."""
    total, squares, count = (sum(record.sums[i] for record in records) for i in range(3))
    if not count:
        return None, None
    mean = total / count
    return mean, math.sqrt(max(0.0, squares / count - mean**2))


def _write_manifest(task: _Task, splits: dict[str, Split]) -> None:
    """Write it: all processes would write the same."""
    of_size = {shard.size: shard for split in splits.values() for shard in split.shards}
    sizes = {size_name(size): size for size in of_size}
    made_of = json.loads((task.folder / SETTINGS).read_text(encoding="utf-8"))
    about, texts = made_of["autoencoder"], made_of["text_encoder"]
    kind = task.encoder.kind
    shapes = {}
    for name, size in sorted(sizes.items()):  # of a sample as the model sees it
        with safe_open(task.folder / of_size[size].file, framework="pt") as file:
            _, channels, *space = file.get_slice(kind).get_shape()
        shapes[name] = (channels // 2 if kind == MOMENTS else channels, *space)
    manifest = Manifest(
        kind=kind,
        shapes=shapes,
        splits=splits,
        classes=task.source.classes,
        captions=task.source.captions,
        flips=task.settings.flips,
        autoencoder=about and Autoencoder(**about),
        text_encoder=texts and texts["name"],
        max_text_length=made_of["max_text_length"],
        source=made_of["source"],
        resolutions={name: task.sizes.resolution_of(size) for name, size in sorted(sizes.items())},
        null=read_null(task.folder) if texts else None,
    )
    manifest.write(task.folder)
    read_manifest(task.folder)
