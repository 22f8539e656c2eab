"""An elastic DiT in a training loop of your own: nothing of elit.training is needed.

python examples/own_loop.py --steps 200 --out runs/own
"""

import argparse

import torch
from torch.utils.data import DataLoader, RandomSampler

from elit import (
    DiT,
    ElitPipeline,
    SigmaDensity,
    TailDropping,
    flow_matching_loss,
    load_dataset,
    make_scheduler,
)


def main() -> None:
    """Train with tail dropping, say what each budget's loss is, and save a pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", default="runs/own", help="folder of the pipeline")
    args = parser.parse_args()

    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    dataset = load_dataset("digits")
    model = DiT(
        sample_size=16, in_channels=1, patch_size=2, hidden_size=64, num_heads=2, depth=4,
        num_classes=10, group=4, head=1, tail=1,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99))
    density = SigmaDensity("logit_normal")
    dropping = TailDropping(1, model.max_latents, total=model.max_latents)

    count = args.steps * args.batch_size  # as many epochs as that takes
    order = RandomSampler(dataset, num_samples=count, generator=draw)
    for step, batch in enumerate(DataLoader(dataset, args.batch_size, sampler=order), start=1):
        data, labels = batch["images"], batch["class_labels"]
        noise = torch.randn(data.shape, generator=draw)
        sigma = density.sample(len(data), draw)  # 1 is noise, 0 is data
        no_label = torch.rand(len(data), generator=draw) < 0.1
        labels = labels.masked_fill(no_label, model.config.num_classes)
        num_latents = dropping.draw(draw)  # one number for the whole batch

        def velocity(x, s, labels=labels, num_latents=num_latents):
            return model(x, s, labels, num_latents=num_latents).sample

        loss = flow_matching_loss(velocity, data, noise, sigma).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.3f} with {num_latents} latents per group")

    ElitPipeline(model, make_scheduler("euler")).save_pretrained(args.out)
    print(f"elit sample {args.out} --budget 1 0.25")


if __name__ == "__main__":
    main()
