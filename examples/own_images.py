"""A folder of pictures by class and a tiny autoencoder, to try `elit prepare` without a download.

python examples/own_images.py --count 3000 --out images --vae tiny-vae

The pictures are elit's `shapes`; a folder of your own looks the same. The autoencoder is diffusers'
AutoencoderKL, trained here for a minute: it stands for a real one, such as
stabilityai/sd-vae-ft-mse, whose name goes in its place.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn.functional import mse_loss

from elit.data import load_dataset
from elit.preparation.source import datasets_module


def write_images(folder: Path, count: int, split: str) -> None:
    """PNGs as FOLDER/SPLIT/CLASS/NUMBER.png."""
    dataset = load_dataset("shapes", split, count=count, size=40)
    for start in range(0, count, 100):
        rows = range(start, min(count, start + 100))
        batch = dataset.batch(rows)
        pixels = ((batch["images"] + 1) * 127.5).round().byte().movedim(1, -1).numpy()
        for row, picture, label in zip(rows, pixels, batch["class_labels"], strict=True):
            path = folder / split / dataset.class_names[int(label)] / f"{row:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)


def train_autoencoder(steps: int) -> AutoencoderKL:
    """32x32 pixels to 4 channels of 16x16, scaled to a standard deviation of 1."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8,
        sample_size=32,
    )  # fmt: skip
    dataset = load_dataset("shapes", size=32)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        rows = torch.randint(len(dataset), (16,)).tolist()
        images = dataset.batch(rows)["images"]
        posterior = vae.encode(images).latent_dist
        loss = mse_loss(vae.decode(posterior.sample()).sample, images)
        (loss + 1e-5 * posterior.kl().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1}: mean squared error {loss.item():.4f}")
    with torch.no_grad():
        spread = vae.eval().encode(dataset.batch(range(200))["images"]).latent_dist.sample().std()
    vae.register_to_config(scaling_factor=1 / float(spread))
    return vae


def main() -> None:
    """Write the pictures, then train and save the autoencoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=3000, help="pictures to train on")
    parser.add_argument("--out", default="images", help="folder of the pictures")
    parser.add_argument("--vae", default="tiny-vae", help="folder of the autoencoder")
    parser.add_argument("--steps", type=int, default=300, help="of training it")
    args = parser.parse_args()
    try:
        datasets_module()  # `elit prepare` needs it: told now, not after a minute
    except ValueError as error:
        parser.error(str(error))
    write_images(Path(args.out), args.count, "train")
    write_images(Path(args.out), max(10, args.count // 20), "validation")
    train_autoencoder(args.steps).save_pretrained(args.vae)
    print(f"now: elit prepare {args.out} prepared --vae {args.vae} --resolution 32")


if __name__ == "__main__":
    main()
