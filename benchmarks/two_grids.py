"""Train a run on at two grids, so that benchmarks/budgets_over_time.py can begin at half the grid.

    python benchmarks/two_grids.py runs/fashion-mnist runs/fashion-two-grids --steps 1000

Every other step has the pictures at half their size, by means of 2x2. The rate falls to 0.
"""

import argparse
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import Tensor

from elit import load_pipeline
from elit.data import load_dataset
from elit.flow.objective import SigmaDensity, flow_matching_loss
from elit.training.config_files import config_of_run


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipeline, config = load_pipeline(args.run), config_of_run(args.run)
    assert config is not None
    model = pipeline.transformer.train()
    data = load_dataset(config.data.name, "train", **config.data.options)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.99), weight_decay=0)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, args.steps)
    average = EMAModel(model.parameters(), decay=0.99)
    draw = torch.Generator().manual_seed(config.seed)
    settings = config.objective
    density = SigmaDensity(settings.density, settings.logit_mean, settings.logit_std)
    for step in range(args.steps):
        rows = torch.randint(len(data), (config.data.batch_size,), generator=draw)
        batch = data.batch(rows.tolist())
        images, labels = data.on_device(batch["images"]), batch["class_labels"]
        if step % 2:
            images = F.avg_pool2d(images, 2)
        dropped = torch.rand(len(labels), generator=draw) < settings.label_dropout
        labels = labels.masked_fill(dropped, pipeline.null_label)
        n = int(torch.randint(model.min_latents, model.max_latents + 1, (), generator=draw))

        def velocity(x: Tensor, s: Tensor, labels: Tensor = labels, n: int = n) -> Tensor:
            return model(x, s, class_labels=labels, num_latents=n, return_dict=False)[0]

        noise = torch.randn(images.shape, generator=draw)
        loss = flow_matching_loss(velocity, images, noise, density.sample(len(labels), draw)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.step(model.parameters())
        if step % 100 > 97:
            print(f"step {step + 1}, {images.shape[-1]} pixels: loss {loss:.4f}", flush=True)
    average.copy_to(model.parameters())
    pipeline.save_pretrained(args.out)
    shutil.copy(Path(args.run) / "config.yaml", args.out)


if __name__ == "__main__":
    main()
