"""The work of `elit prepare`: a source to a folder of shards, by any number of processes."""

import json
import logging
import math
import time
from collections import Counter
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
    Features,
    Manifest,
    Split,
    read_manifest,
    size_name,
)
from elit.preparation.autoencoder import Encoder, load_encoder
from elit.preparation.features import FeatureEncoder, load_features
from elit.preparation.parts import Part, make_null
from elit.preparation.reading import Sizes, default_workers, read
from elit.preparation.records import (
    Piece,
    Record,
    check_content,
    check_same,
    forget_damaged,
    read_null,
    read_record,
)
from elit.preparation.settings import PrepareSettings
from elit.preparation.source import Source, open_source
from elit.preparation.texts import TextEncoder, load_texts

logger = logging.getLogger(__name__)

_MOST_ROWS, _MOST_BYTES = 4096, 2**30  # of a part
USUAL_MEAN, USUAL_STD = 1.0, (0.3, 3.0)  # of latents that are scaled right


@dataclass(frozen=True)
class PrepareResult:
    """Result of a run of `prepare`."""

    folder: Path  # that was written
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

    @property
    def finished(self) -> bool:
        """Whether all parts are done, and the manifest is written."""
        return not self.missing


@dataclass(frozen=True)
class _Task:
    """Settings, source and models that all parts share."""

    folder: Path
    source: Source
    sizes: Sizes
    encoder: Encoder
    texts: TextEncoder | None
    features: FeatureEncoder | None
    pieces: list[Piece]
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
        mine, folder = task.pieces[process.rank :: process.world], task.folder
        makes_null = task.texts if process.rank == 0 else None
        if settings.verify:
            forget_damaged(folder, mine, makes_null is not None)
        for piece in mine:
            check_content(folder, piece, task.source.splits[piece.split], settings.verify)
        if makes_null is not None and read_null(folder) is None:
            make_null(folder, makes_null, task.encoder.dtype)
        start = time.perf_counter()
        done = _make(task, mine, process)
        return _finish(task, done, time.perf_counter() - start)


def _open(settings: PrepareSettings, process: Process) -> _Task:
    """The source and the models, and a folder whose settings are theirs."""
    sizes, folder = Sizes(settings), Path(settings.out)
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
    features = None
    if settings.features is not None:
        features = load_features(settings.features, device, settings.dtype, settings.store_dtype)
    size = settings.part_size or _part_size(sizes, encoder, texts, features, settings.flips)
    pieces = [
        Piece(name, number, range(len(rows))[start : start + size])
        for name, rows in source.splits.items()
        for number, start in enumerate(range(0, len(rows), size))
    ]
    has_models = encoder.about or texts or features
    content = {
        "format": FORMAT,
        "version": VERSION,
        "source": source.describe(),
        "classes": source.classes,
        "kind": encoder.kind,
        "autoencoder": encoder.about and asdict(encoder.about),
        "text_encoder": texts and {"name": texts.name, "sha256": texts.sha256},
        "max_text_length": texts and texts.max_length,
        "features": features and asdict(features.about),
        "resolution": settings.resolution,
        "aspect_ratios": settings.aspect_ratios,
        "multiple": settings.multiple if settings.aspect_ratios else None,
        "flips": settings.flips,
        "frames": settings.frames,
        "fps": settings.fps,
        "clips_per_video": settings.clips_per_video if settings.frames else None,
        "part_size": size,
        "dtype": settings.dtype if has_models else None,
        "store_dtype": settings.store_dtype if has_models else None,
    }
    content = json.loads(json.dumps(content))  # lists for tuples, as they are read back
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if not check_same(folder, content):
        write_json(folder / SETTINGS, content, replace=False)
        check_same(folder, content)  # another run may have begun at the same moment
    return _Task(folder, source, sizes, encoder, texts, features, pieces, settings)


def _part_size(
    sizes: Sizes,
    encoder: Encoder,
    texts: TextEncoder | None,
    features: FeatureEncoder | None,
    flips: bool,
) -> int:
    """Rows of a part: a power of two, few enough to be held in memory."""
    if encoder.vae is None:
        length = sizes.pixels
    else:
        shape = (1, *((sizes.frames,) if sizes.frames else ()), *min(sizes.all), 3)
        encoded = encoder(torch.zeros(shape, dtype=torch.uint8))
        length = round(encoded.numel() * sizes.pixels / math.prod(shape) * encoder.store.itemsize)
    if features is not None:
        length += len(sizes.choices) * math.prod(features.about.shape) * features.store.itemsize
    length *= 2 if flips else 1
    if texts is not None:
        of_text = texts.stored(texts([""])).values()
        copies = len(sizes.choices) * sizes.clips
        length += copies * sum(x.numel() * x.element_size() for x in of_text)
    rows = max(1, _MOST_BYTES // length)
    return min(_MOST_ROWS, 2 ** max(0, rows.bit_length() - 1))


def _make(task: _Task, mine: list[Piece], process: Process) -> int:
    """Make those of this process's parts that are not done; rows that were read."""
    todo, settings = [p for p in mine if not read_record(task.folder, p)], task.settings
    if not todo:
        return 0
    count, total = (sum(len(piece.rows) for piece in pieces) for pieces in (todo, mine))
    workers = default_workers(process.local_world) if settings.workers is None else settings.workers
    splits = task.source.splits
    parts = [  # the state of their files is looked up before they are read
        Part(p, splits[p.split].seen(p.rows), task.encoder, task.texts, settings, task.features)
        for p in todo
    ]
    chunks = read(splits, task.sizes, [(piece.split, piece.rows) for piece in todo], workers)
    bar = tqdm(
        total=total, initial=total - count, unit="video" if settings.frames else "image",
        desc=f"prepare {process.rank + 1}/{process.world}" if process.world > 1 else "prepare",
        smoothing=0.05, dynamic_ncols=True,
    )  # fmt: skip
    # One part is written while the next is encoded.
    with bar, ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for chunk in chunks:
            if parts[0].add(chunk):
                part = parts.pop(0)
                tensors = part.finish()
                if writing is not None:
                    writing.result()
                writing = writer.submit(part.write, task.folder, tensors)
            bar.update(len(chunk.digests))
        if writing is not None:
            writing.result()
    return count


def _finish(task: _Task, done: int, seconds: float) -> PrepareResult:
    """Write the manifest if all parts are done, and tell what there is."""
    of_pieces = [(piece, read_record(task.folder, piece)) for piece in task.pieces]
    there = [(piece.split, record) for piece, record in of_pieces if record is not None]
    records = [record for _, record in there]
    missing = len(of_pieces) - len(there)
    if task.texts is not None and read_null(task.folder) is None:
        missing += 1
    splits = {}
    for name in task.source.splits:
        of_split = [record for split, record in there if split == name]
        shards = tuple(shard for record in of_split for shard in record.shards)
        splits[name] = Split(shards, tuple(row for record in of_split for row in record.skipped))
    skipped = [(name, *what) for name, split in splits.items() for what in split.skipped]
    samples = {name: split.count for name, split in splits.items()}
    if not missing:
        if not any(samples.values()):
            raise ValueError(
                f"nothing of {task.source.name} could be read: row {skipped[0][1]}: {skipped[0][2]}"
            )
        _write_manifest(task, splits)
    cut: Counter[str] = Counter()
    for record in records:
        cut.update(record.cut)
    for where, count in (+cut).items():
        logger.warning(
            "%d of %d captions were cut off at %s", count, sum(samples.values()), where
        )  # fmt: skip
    mean, std = _statistics(records)
    off = mean is not None and abs(mean) > USUAL_MEAN
    if off or (std is not None and not USUAL_STD[0] < std < USUAL_STD[1]):
        logger.warning(
            "the scaled latents have mean %.3g and standard deviation %.3g, but training wants "
            "about 0 and 1; look at scaling_factor, shift_factor, latents_mean and latents_std in "
            "the autoencoder's config.json", mean, std
        )  # fmt: skip
    length = sum(shard.bytes for split in splits.values() for shard in split.shards)
    return PrepareResult(
        task.folder, missing, samples, skipped, length, done, seconds, mean, std, dict(+cut)
    )


def _statistics(records: list[Record]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of the latents of all records."""
    total, squares, count = (sum(record.sums[i] for record in records) for i in range(3))
    if not count:
        return None, None
    mean = total / count
    return mean, math.sqrt(max(0.0, squares / count - mean**2))


def _write_manifest(task: _Task, splits: dict[str, Split]) -> None:
    """Write it: all processes would write the same."""
    folder, texts, kind = task.folder, task.texts, task.encoder.kind
    of_size = {shard.size: shard for split in splits.values() for shard in split.shards}
    shapes, resolutions = {}, {}
    for name, size in sorted((size_name(size), size) for size in of_size):
        with safe_open(folder / of_size[size].file, framework="pt") as file:
            _, channels, *space = file.get_slice(kind).get_shape()
        # of a sample as the model sees it
        shapes[name] = (channels // 2 if kind == MOMENTS else channels, *space)
        resolutions[name] = task.sizes.resolution_of(size)
    made_of = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))  # with its first names
    about, of_features = made_of["autoencoder"], made_of.get("features")
    Manifest(
        kind=kind,
        shapes=shapes,
        splits=splits,
        classes=task.source.classes,
        captions=task.source.captions,
        flips=task.settings.flips,
        autoencoder=about and Autoencoder(**about),
        text_encoder=made_of["text_encoder"]["name"] if texts else None,
        max_text_length=texts.max_length if texts else None,
        source=made_of["source"],
        resolutions=resolutions,
        null=read_null(folder) if texts else None,
        features=Features(**of_features) if of_features else None,
    ).write(folder)
    read_manifest(folder)
