"""Train an elastic DiT on handwritten digits from Python, then draw with it.

python examples/train_digits.py --steps 800
"""

import argparse

from elit import CheapCFG, ElitPipeline
from elit.training.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from elit.training.loop import train


def main() -> None:
    """Train, then draw four images at a quarter of the latents."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", default="runs/example", help="folder of the run")
    args = parser.parse_args()

    config = TrainConfig(
        output_dir=args.out,
        model=ModelConfig(preset="elit-dit-tiny/2"),
        data=DataConfig(name="digits", batch_size=32),
        optimizer=OptimizerConfig(
            lr=8e-3, betas=(0.9, 0.99), warmup_steps=40, schedule="cosine", ema=0.99
        ),
        train=LoopConfig(
            steps=args.steps, log_every=20, validate_every=200, sample_every=400,
            checkpoint_every=200,
        ),
        sample=SampleConfig(steps=20),
    )  # fmt: skip
    result = train(config)  # the same config again resumes
    print(f"step {result.step} after {result.seconds:.0f} s: {result.folder}")

    pipe = ElitPipeline.from_pretrained(result.folder)
    labels = [2, 0, 2, 6]
    images = pipe(labels, budget=0.25, num_inference_steps=20, guidance=CheapCFG(2.0)).images
    for place, (label, image) in enumerate(zip(labels, images, strict=True)):
        image.save(result.folder / f"{place}-a-{label}.png")


if __name__ == "__main__":
    main()
