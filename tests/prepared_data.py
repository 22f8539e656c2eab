"""Small prepared folders, written by their format alone: what training reads, without `prepare`."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from elit.data.manifest import (
    CAPTION_ENDS,
    CAPTIONS,
    LABELS,
    NULL,
    ROWS,
    Autoencoder,
    Manifest,
    Shard,
    Split,
    size_name,
)

CLASSES = ("ant", "bee", "cow")
SQUARE = ((32, 32),)


def make_shard(
    kind: str,
    count: int,
    shape: Sequence[int],
    first: int,
    captions: bool,
    flips: bool,
    texts: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """Tensors of one shard: the first number of a sample's first channel is its row."""
    channels, *space = shape
    if kind == "images":
        data = torch.randint(0, 256, (count, *shape), dtype=torch.uint8)
        data[:, 0, 0, 0] = torch.arange(first, first + count) % 256
    else:
        wide = 2 * channels if kind == "moments" else channels
        data = 0.1 * torch.randn(count, wide, *space)
        data[(slice(None), 0, *(0,) * len(space))] = torch.arange(first, first + count).float()
        if kind == "moments":
            data[:, channels:] -= 2
        data = data.half()
    tensors = {kind: data, LABELS: torch.arange(first, first + count) % len(CLASSES)}
    tensors[ROWS] = torch.arange(first, first + count)
    if flips:
        tensors[f"{kind}_flipped"] = data.flip(-1).contiguous()
    if captions:
        said = [f"číslo {first + i}" for i in range(count)]
        lengths = torch.tensor([len(text.encode()) for text in said])
        tensors[CAPTION_ENDS] = lengths.cumsum(0)
        tensors[CAPTIONS] = torch.tensor(list("".join(said).encode()), dtype=torch.uint8)
    for name, of_text in texts.items():
        if "mask" in name:
            tensors[name] = torch.ones(count, *of_text, dtype=torch.bool)
        else:
            tensors[name] = torch.randn(count, *of_text).half()
    return tensors


def write_prepared(
    folder: Path,
    parts: Sequence[int] = (30, 30, 20),
    kind: str = "moments",
    sizes: Sequence[Sequence[int]] = SQUARE,
    scale: int = 4,
    channels: int = 4,
    flips: bool = False,
    captions: bool = False,
    texts: Mapping[str, Sequence[int]] | None = None,
    validation: int = 0,
    classes: Sequence[str] = CLASSES,
    **changes: Any,
) -> Manifest:
    """Write a folder whose parts have so many samples of each size, and return its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = texts or {}
    shapes = {
        size_name(size): (channels, *(s if kind == "images" else s // scale for s in size))
        for size in sizes
    }
    splits, first = {}, 0
    for split, counts in {"train": parts, "validation": [validation] * bool(validation)}.items():
        shards = []
        for part, count in enumerate(counts):
            for size in sizes:
                name = f"{split}-{part:05d}-{size_name(size)}.safetensors"
                given = kind, count, shapes[size_name(size)], first, captions, flips, texts
                save_file(make_shard(*given), folder / name)
                content = (folder / name).read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                shards.append(Shard(name, tuple(size), count, len(content), digest))
                first += count
        if shards:
            splits[split] = Split(tuple(shards))
    if texts:
        null = {}
        for name, of_text in texts.items():
            mask = torch.zeros(1, *of_text, dtype=torch.bool)
            null[name] = mask if "mask" in name else torch.zeros(1, *of_text).half()
        save_file(null, folder / NULL)
    vae = Autoencoder("no-such/vae", "AutoencoderKL", "0" * 64, (0.5,), (0.25,))
    squares = [size[-1] for size in sizes if size[-1] == size[-2]] or [sizes[0][-1]]
    given = {
        "kind": kind,
        "resolutions": {
            size_name(size): min(squares, key=lambda side: abs(side**2 - size[-1] * size[-2]))
            for size in sizes
        },
        "shapes": shapes,
        "splits": splits,
        "classes": tuple(classes),
        "captions": captions,
        "flips": flips,
        "autoencoder": None if kind == "images" else vae,
        "source": {"name": "made for a test"},
    }
    manifest = Manifest(**given | changes)
    manifest.write(folder)
    return manifest
