"""Draw clips at several budgets and see whether the objects move where they were told to.

    python examples/clip_motion.py runs/moving-shapes

Needs a run of `elit train moving-shapes`, of classes or, with a video-mmdit preset, of captions.
"""

import argparse

import torch

from elit import CheapCFG, load_pipeline
from elit.data import load_dataset
from elit.data.moving_shapes import DIRECTIONS


def centres(clips: torch.Tensor) -> torch.Tensor:
    """Middle of what differs from the ground, (B, T, 2) as x, y, of clips (B, T, C, H, W)."""
    ground = clips.flatten(3).median(dim=3).values[..., None, None]  # of each frame
    ink = (clips - ground).abs().sum(2)  # (B, T, H, W)
    ink = torch.where(ink > 0.3 * ink.amax((2, 3), keepdim=True), ink, 0)
    place = torch.arange(clips.shape[-1]) + 0.5
    sums = torch.stack([(ink.sum(2) * place).sum(2), (ink.sum(3) * place).sum(2)], dim=2)
    return sums / ink.sum((2, 3))[..., None]


def main() -> None:
    """Print the share of right directions, of real clips and at each budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--count", type=int, default=50, help="clips of each direction")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1, 0.25, 1 / 32])
    args = parser.parse_args()
    pipeline = load_pipeline(args.run)
    pipeline.set_progress_bar_config(disable=True)
    if not pipeline.draws_clips:
        parser.error(f"{args.run} draws images, not clips; give a run of moving-shapes")
    ways = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)
    labels = list(range(len(ways))) * args.count

    def report(what: str, clips: torch.Tensor) -> None:
        moved = centres(clips)[:, -2] - centres(clips)[:, 1]  # (B, 2), in pixels
        right = ((moved @ ways.T).argmax(1) == torch.tensor(labels)).float().mean()
        print(f"{what}: {right:.3f} in their direction, {moved.norm(dim=1).mean():.1f} px")

    real = load_dataset("moving-shapes", "validation", count=len(labels)).batch(range(len(labels)))
    wanted = real["captions"] if pipeline.transformer.takes_text else labels
    report("real clips", real["images"].transpose(1, 2) / 2 + 0.5)
    for budget in args.budgets:
        clips = pipeline(
            wanted,
            budget=budget,
            num_inference_steps=args.steps,
            guidance=CheapCFG(3.0),
            generator=[torch.Generator().manual_seed(i) for i in range(len(labels))],
            output_type="pt",
        ).images  # (B, T, C, H, W)
        report(f"budget {budget:g}", clips)


if __name__ == "__main__":
    main()
