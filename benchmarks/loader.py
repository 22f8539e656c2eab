"""Samples a second of the loader of prepared data alone, beside what a training step takes.

    python benchmarks/loader.py --samples 8192 --batches 40

Writes folders of random moments, as `elit prepare` does of 256 and of 512 px, and reads them with
the run's own order and loader. "Cold" is after the system was asked to forget the files.
"""

import argparse
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from elit import create_model
from elit.cost.devices import peak_flops
from elit.cost.flops import forward_flops
from elit.data import WholeBatches, load_dataset
from elit.data.manifest import Autoencoder, Manifest, Shard, Split
from elit.data.order import StepBatches
from elit.models.presets import preset_config, preset_model

PER_SHARD, BATCH, CLASSES = 2048, 256, 1000
GPU, MFU = "NVIDIA H100 80GB HBM3", 0.5


def write(folder: Path, side: int, samples: int) -> Path:
    """A prepared folder of moments (8, side, side)."""
    folder.mkdir()
    shards = []
    for part in range(samples // PER_SHARD):
        file = f"train-{part:05d}-{8 * side}x{8 * side}.safetensors"
        labels = torch.randint(0, CLASSES, (PER_SHARD,))
        moments = torch.randn(PER_SHARD, 8, side, side).half()
        save_file({"moments": moments, "class_labels": labels}, folder / file)
        size = 8 * side, 8 * side
        shards.append(Shard(file, size, PER_SHARD, (folder / file).stat().st_size, ""))
    Manifest(
        kind="moments",
        shapes={f"{8 * side}x{8 * side}": (4, side, side)},
        splits={"train": Split(tuple(shards))},
        classes=tuple(map(str, range(CLASSES))),
        autoencoder=Autoencoder("random", "AutoencoderKL", ""),
    ).write(folder)
    return folder


def forget(folder: Path) -> None:
    """Ask the system to drop a folder's files from its memory."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def rate(folder: Path, workers: int, batches: int) -> float:
    """Samples a second after the first batch, which waits for the workers to start."""
    dataset = load_dataset("prepared", path=folder)
    dataset.left_out = frozenset(("captions",))
    steps = range(batches + 1)
    order = StepBatches(len(dataset), BATCH, range(1), 1, steps, 0, dataset.buckets or ())
    loader = DataLoader(WholeBatches(dataset), sampler=order, batch_size=None, num_workers=workers)
    loading = iter(loader)
    next(loading)
    start = time.perf_counter()
    for _ in loading:
        pass
    return batches * BATCH / (time.perf_counter() - start)


def step_rate(preset: str, batch: int = 4) -> float:
    """Samples a second of forward and backward here."""
    model = create_model(preset)
    x, sigma = torch.randn(batch, 4, 32, 32), torch.rand(batch)
    labels = torch.randint(0, CLASSES, (batch,))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model(x, sigma, labels).sample.square().mean().backward()
        seconds.append(time.perf_counter() - start)
    return batch / min(seconds)


def main() -> None:
    """Write, read, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=8192, help=f"multiple of {PER_SHARD}")
    parser.add_argument("--batches", type=int, default=40, help="timed, of 256 samples")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--folder", help="on the disk to measure; default: a temporary one")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=args.folder))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {root}\n")
    print("| moments | memory | " + " | ".join(f"{n} workers" for n in args.workers) + " |")
    print("|---|---" + "|---:" * len(args.workers) + "|")
    try:
        for side in (32, 64):
            folder = write(root / str(side), side, args.samples)
            for state in ("cold", "warm"):
                cells = []
                for workers in args.workers:
                    if state == "cold":
                        forget(folder)
                    cells.append(f"{rate(folder, workers, args.batches):,.0f}")
                print(f"| 4x{side}x{side} | {state} | {' | '.join(cells)} |", flush=True)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(f"\nelit-dit-s/2 at 256 px on this processor: {step_rate('elit-dit-s/2'):.1f} samples/s")
    peak = peak_flops(GPU)
    assert peak is not None
    for resolution in (256, 512):
        with torch.device("meta"):
            model = preset_model("elit-dit-xl/2")(**preset_config("elit-dit-xl/2", resolution))
        flops = 3 * forward_flops(model.requires_grad_(False))
        needed = MFU * peak / flops
        print(f"elit-dit-xl/2 at {resolution} px on {GPU} at MFU {MFU}: {needed:.0f} samples/s")


if __name__ == "__main__":
    main()
