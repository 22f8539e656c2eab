"""Draw images of captions at three budgets and see whether shape and colour are what they say.

    python examples/caption_check.py runs/captioned-shapes

Needs a run of `elit train captioned-shapes`. A classifier of real images judges the shape, the
pixels that differ most from the ground judge the colour.
"""

import argparse

import torch

from elit import CheapCFG, ElitTextPipeline
from elit.data import load_dataset
from elit.data.captioned_shapes import PAINTS
from elit.networks.classifier import fit_classifier


def paint_of(images: torch.Tensor) -> torch.Tensor:
    """Number of the nearest paint, (B,), of objects on plain grounds, (B, 3, H, W) in [-1, 1]."""
    pixels = images.flatten(2)  # (B, 3, H*W)
    differs = (pixels - pixels.median(dim=2, keepdim=True).values).abs().sum(1)  # (B, H*W)
    ink = differs > 0.7 * differs.amax(1, keepdim=True)
    colour = (pixels * ink[:, None]).sum(2) / ink.sum(1, keepdim=True)  # (B, 3)
    paints = torch.tensor([list(bytes.fromhex(paint)) for paint in PAINTS.values()]) / 127.5 - 1
    return torch.cdist(colour, paints).argmin(1)


def main() -> None:
    """Print the share of images with the right shape, colour, and both, at each budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--count", type=int, default=200, help="captions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=4.0, help="of cheap CFG")
    args = parser.parse_args()
    held_out = load_dataset("captioned-shapes", "validation", count=args.count)
    batch, scenes = held_out.batch(range(args.count)), held_out.scenes(range(args.count))
    paints = torch.tensor([list(PAINTS).index(scene.paint) for scene in scenes])
    judge = fit_classifier(load_dataset("captioned-shapes"))

    def report(what: str, images: torch.Tensor) -> None:
        shape = judge.predict(images) == batch["class_labels"]
        colour = paint_of(images) == paints
        shares = [x.float().mean().item() for x in (shape, colour, shape & colour)]
        print("{:12} shape {:.3f}, colour {:.3f}, both {:.3f}".format(what, *shares))

    report("real images", batch["images"])
    pipeline = ElitTextPipeline.from_pretrained(args.run)
    pipeline.set_progress_bar_config(disable=True)
    for budget in (1, 1 / 4, 1 / 16):
        images = pipeline(
            batch["captions"],
            budget=budget,
            num_inference_steps=args.steps,
            guidance=CheapCFG(args.scale),
            generator=[torch.Generator().manual_seed(i) for i in range(args.count)],
            output_type="pt",
        ).images  # (B, 3, H, W) in [0, 1]
        report(f"budget {budget:g}", images * 2 - 1)


if __name__ == "__main__":
    main()
