"""A pretrained SD3 made elastic, on your own VAE latents and texts.

python examples/elasticize_sd3.py --base stabilityai/stable-diffusion-3.5-medium --data my.st

A safetensors file with latents (K, 16, h, w), encoder_hidden_states (K, T, D) and
pooled_projections (K, P) is the data. Without arguments a tiny random SD3 shows the steps.
"""

import argparse
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from elit import TailDropping, elasticize, save_interface

TINY = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 6,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12,
    "caption_projection_dim": 32, "pooled_projection_dim": 8, "pos_embed_max_size": 16,
}  # fmt: skip
TEXTS = {"encoder_hidden_states": (32, 5, 12), "pooled_projections": (32, 8)}
SHAPES = {"latents": (32, 4, 16, 16), **TEXTS}


def main() -> None:
    """Distil the original into its own lower budgets, and save the interface alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="pipeline's folder or hub name")
    parser.add_argument("--data", type=Path, help="safetensors file")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", default="interface.safetensors")
    args = parser.parse_args()

    torch.manual_seed(0)
    kind, where = SD3Transformer2DModel, {"subfolder": "transformer"}
    model = kind.from_pretrained(args.base, **where) if args.base else kind(**TINY)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    data = load_file(args.data) if args.data else {k: torch.randn(s) for k, s in SHAPES.items()}

    # 1. One line. At full budget the model is the original, before and after training.
    elasticize(model, head=2, tail=2, group=4, rank=16)
    model.requires_grad_(False)
    model.elit.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.elit.parameters(), lr=1e-3)
    dropping = TailDropping(1, model.max_latents - 1, total=model.max_latents)
    draw = torch.Generator().manual_seed(0)

    # 2. Its own full budget teaches the lower ones: no second model, no labels.
    for step in range(1, args.steps + 1):
        rows = torch.randint(len(data["latents"]), (args.batch_size,), generator=draw)
        clean = data["latents"][rows]
        noise = torch.randn(clean.shape, generator=draw)
        sigma = torch.rand(len(rows), generator=draw)  # 1 is noise
        given = {
            "hidden_states": torch.lerp(clean, noise, sigma[:, None, None, None]),
            "timestep": 1000 * sigma,
            **{name: data[name][rows] for name in TEXTS},
        }
        given = {name: value.to(model.device, model.dtype) for name, value in given.items()}
        with torch.no_grad():
            wanted = model(**given).sample
        found = model(**given, num_latents=dropping.draw(draw)).sample
        loss = (found - wanted).square().mean() / wanted.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == args.steps:
            print(f"step {step}: {loss.item():.3%} off the original")

    # 3. The interface alone, to ship beside the base as a LoRA is.
    save_interface(model, args.out)
    print(f"elit.load_interface(pipe.transformer, {args.out!r}).set_budget(1.0, guide=0.25)")


if __name__ == "__main__":
    main()
