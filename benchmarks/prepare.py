"""How much of the bare autoencoder's speed `elit prepare` keeps, end to end.

python benchmarks/prepare.py [--large] [--device cuda --dtype bf16]

JPEGs of 500x375 pixels are made, as ImageNet's are. Bare is the autoencoder alone, on pictures that
lie in memory, cut already; prepare reads, decodes, scales and cuts them, encodes and writes. Both
are run in turns, and the median is given; processor seconds, of all processes, hold on a machine
that others use too. Its start (imports, opening the source, loading and
hashing the weights) is not counted. Weights are random; --large has the size of Stable Diffusion's
autoencoder.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from sklearn.datasets import load_sample_images

from elit._devices import pick_device
from elit.preparation import PrepareSettings, prepare
from elit.preparation.autoencoder import load_encoder
from elit.preparation.images import fit, read_image
from elit.preparation.reading import Sizes

SMALL, LARGE = (32, 64, 64), (128, 256, 512, 512)  # channels; LARGE is Stable Diffusion's


def write_images(folder: Path, count: int) -> None:
    """JPEGs cut from scikit-learn's two photographs."""
    photos = load_sample_images().images  # 427x640
    draw = np.random.default_rng(0)
    (folder / "all").mkdir()
    for number in range(count):
        top, left = draw.integers(0, 427 - 375), draw.integers(0, 640 - 500)
        picture = Image.fromarray(photos[number % 2][top : top + 375, left : left + 500])
        picture.save(folder / "all" / f"{number:05d}.jpg", quality=90)


def make_vae(channels: tuple[int, ...]) -> AutoencoderKL:
    """A diffusers autoencoder of random weights."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=channels, latent_channels=4, norm_num_groups=32, layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
    )  # fmt: skip


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def bare(settings: PrepareSettings, pictures: torch.Tensor) -> tuple[float, float]:
    """Pictures a second of the autoencoder alone, and processor seconds a picture."""
    device = pick_device(settings.device)
    encoder = load_encoder(
        settings.vae, Sizes(settings), device, settings.dtype, settings.store_dtype
    )
    encoder(pictures[: settings.batch_size])
    start, used = time.perf_counter(), processor_seconds()
    for batch in pictures.split(settings.batch_size):
        encoder(batch)
    seconds, used = time.perf_counter() - start, processor_seconds() - used
    return len(pictures) / seconds, used / len(pictures)


def end_to_end(settings: PrepareSettings) -> tuple[float, float]:
    """The same of `elit prepare`."""
    before = processor_seconds()
    result = prepare(settings)
    between = processor_seconds()
    prepare(settings)  # all is done: what the start costs
    used = 2 * between - before - processor_seconds()
    return result.done / result.seconds, used / result.done


def measure(name: str, channels: tuple[int, ...], args: argparse.Namespace, count: int) -> str:
    """A row of the table."""
    rates: dict[str, list[tuple[float, float]]] = {"bare": [], "prepare": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "images").mkdir()
        write_images(folder / "images", count)
        make_vae(channels).save_pretrained(folder / "vae")
        paths = sorted((folder / "images" / "all").iterdir())
        size = (args.resolution, args.resolution)
        cut = [np.asarray(fit(read_image(str(path)), size)) for path in paths]
        pictures = torch.from_numpy(np.stack(cut))
        for turn in range(args.repeats):
            settings = PrepareSettings(
                str(folder / "images"), str(folder / f"out{turn}"), vae=str(folder / "vae"),
                resolution=[args.resolution], batch_size=args.batch_size, device=args.device,
                dtype=args.dtype, workers=args.workers,
            )  # fmt: skip
            rates["bare"].append(bare(settings, pictures))
            rates["prepare"].append(end_to_end(settings))
    (alone, busy), (whole, busy_whole) = (
        [statistics.median(turn[i] for turn in rates[key]) for i in range(2)]
        for key in ("bare", "prepare")
    )
    row = (name, count, f"{alone:.2f}", f"{whole:.2f}", f"{whole / alone:.2f}")
    return f"| {' | '.join(map(str, (*row, f'{busy:.2f}', f'{busy_whole:.2f}')))} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=32, help="pictures")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, help="that read pictures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--large", action="store_true", help="Stable Diffusion's size too")
    parser.add_argument("--large-count", type=int, default=4, help="pictures for it")
    args = parser.parse_args()
    print(
        f"{args.device}, {args.dtype}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs"
    )
    columns = ("bare, images/s", "prepare, images/s", "ratio", "bare, CPU s/image", "prepare")
    print(f"| autoencoder | pictures | {' | '.join(columns)} |")
    print("|---" * 7 + "|")
    print(measure("small", SMALL, args, args.count))
    if args.large:
        print(measure("Stable Diffusion's", LARGE, args, args.large_count))


if __name__ == "__main__":
    main()
