"""A transformer of your own made elastic: say where its blocks are and what follows the tokens.

python examples/elasticize_own.py
"""

import torch
from torch import Tensor, nn

from elit import Layout, PerToken, elasticize, unelasticize


class Block(nn.Module):
    """Self-attention with one place vector for each token, and an MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        x = self.norm1(tokens) + places
        tokens = tokens + self.attention(x, x, x, need_weights=False)[0]
        return tokens + self.mlp(self.norm2(tokens))


class MyTransformer(nn.Module):
    """Images (B, 3, H, W) to velocities of the same shape, in patches of 4 pixels."""

    def __init__(self, dim: int = 64, depth: int = 8):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 4, 4)
        self.layers = nn.ModuleList(Block(dim) for _ in range(depth))
        self.places = nn.Parameter(torch.randn(64, dim))
        self.project = nn.Linear(dim, 3 * 16)

    def forward(self, images: Tensor, timestep: Tensor) -> Tensor:
        del timestep  # a real one is told the noise level
        height, width = images.shape[2] // 4, images.shape[3] // 4
        tokens = self.embed(images).flatten(2).transpose(1, 2)  # (B, N, D), row by row
        for layer in self.layers:
            tokens = layer(tokens, self.places)
        patches = self.project(tokens).transpose(1, 2).unflatten(2, (height, width))
        return nn.functional.pixel_shuffle(patches.flatten(2).unflatten(2, (height, width)), 4)


LAYOUT = Layout(
    blocks="layers",
    grid=lambda _, arguments: [n // 4 for n in arguments["images"].shape[2:]],
    hidden_size=64,
    num_heads=4,
    per_token={"places": PerToken(axis=0)},
    time_scale=1,  # the timestep of pure noise
)


def main() -> None:
    """Show that nothing is lost at full budget, and what each budget is off before training."""
    torch.manual_seed(0)
    model = MyTransformer().eval()
    images, timestep = torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        wanted = model(images, timestep)
        elasticize(model, head=2, tail=2, group=(4, 4), layout=LAYOUT)
        for budget in (1.0, 0.5, 0.25, 1 / 16):
            kept = model.resolve_budget(budget)
            found = model(images, timestep, num_latents=kept)
            off = ((found - wanted).norm() / wanted.norm()).item()
            print(f"budget {budget:g}: {kept} latents per group, {off:.1e} off the original")
        unelasticize(model)
        assert torch.equal(model(images, timestep), wanted)


if __name__ == "__main__":
    main()
