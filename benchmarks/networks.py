"""Feature networks: images a second with what prepares them, beside the bare network.

    python benchmarks/networks.py
    python benchmarks/networks.py --device cuda --batch-size 64 --size 512

Weights are random, which changes no time. Runs with and without the preparation stand side by side,
and the ratio is the median of neighbouring pairs.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn

from elit._devices import pick_device
from elit.networks import inception
from elit.networks.feature_network import FeatureNetwork, load_network


class _Bare(nn.Module):
    """A network that is given what another one would be made for it."""

    def __init__(self, given: Tensor, module: nn.Module):
        super().__init__()
        self.given, self.module = given, module

    def forward(self, _: Tensor) -> Tensor:
        return self.module(self.given)


def networks(device: torch.device) -> dict[str, FeatureNetwork]:
    """Inception and DINOv2 ViT-L/14 of random weights."""
    from transformers import Dinov2Config, Dinov2Model

    own = load_network(nn.Flatten(), device=device)  # the form of a network
    found = replace(
        own, name="inception", module=inception.Inception().eval().to(device),
        prepare=inception.prepare, outputs=("pool", "spatial", "logits"),
    )  # fmt: skip
    config = Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518
    )
    with tempfile.TemporaryDirectory() as folder:
        Dinov2Model(config).save_pretrained(folder)
        dino = load_network("dinov2", weights=folder, device=device)
    return {"inception": found, "dinov2": dino}


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Of one call."""
    started = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8, help="images at once (default: 8)")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs (default: 5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    args = parser.parse_args()
    device = pick_device(args.device)
    shape = (args.batch_size, 3, args.size, args.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    print(f"{args.batch_size} images of {args.size} px, {device}, torch {torch.__version__}\n")
    print("| network | images/s | bare | ratio |\n| --- | ---: | ---: | ---: |")
    for name, network in networks(device).items():
        given = network.prepare(images.to(device).float())
        bare = replace(network, module=_Bare(given, network.module), prepare=lambda x: x)
        pairs = []
        for _ in range(args.repeats + 1):
            whole = seconds_of(lambda n=network: n.features(images), device)
            alone = seconds_of(lambda b=bare: b.features(images), device)
            pairs.append((whole, alone))
        whole, alone = (statistics.median(x) for x in zip(*pairs[1:], strict=True))
        ratio = statistics.median(alone / whole for whole, alone in pairs[1:])
        rates = args.batch_size / whole, args.batch_size / alone
        print(f"| {name} | {rates[0]:.2f} | {rates[1]:.2f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
