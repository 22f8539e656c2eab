"""Low-rank adapters that act only below full budget: ours, beyond the paper.

The blocks of a pretrained model have never seen latents. Adapters on their linear layers let them
learn to work on those, while the weights stay as they were: each adds up(down(x)) + bias below
full budget, and nothing at it. The original model is then still in there, whatever the adapters
have learned.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elit._numbers import is_whole


class LowRankAdapter(nn.Module):
    """up(down(x)) + bias, zero at first (LoRA, Hu et al. 2021, with a bias)."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features))

    def reset_parameters(self) -> None:
        """Add nothing."""
        nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        nn.init.zeros_(self.up)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return (x.to(self.down.dtype) @ self.down.T) @ self.up.T + self.bias


def make_adapters(blocks: list[nn.Module], rank: int) -> nn.ModuleList:
    """Make an adapter for every linear layer of every block, by the layer's name in it."""
    layers = [linear_layers(block) for block in blocks]
    if not any(layers) or any("" in by_name for by_name in layers):
        what = "are linear layers themselves" if any(layers) else "have no linear layers"
        raise ValueError(
            f"rank={rank} asks for adapters within the blocks, but these {what}; leave rank at 0"
        )
    return nn.ModuleList(
        nn.ModuleDict(
            {
                _key(name): LowRankAdapter(layer.in_features, layer.out_features, rank)
                for name, layer in by_name.items()
            }
        )
        for by_name in layers
    )


def linear_layers(block: nn.Module) -> dict[str, Any]:
    """The linear layers of a block by name, also quantised ones, but not those of a LoRA.

    A layer that peft has wrapped in a LoRA is the one within, under its own name.
    """
    return {
        name.removesuffix(".base_layer"): module
        for name, module in block.named_modules()
        if is_whole(getattr(module, "in_features", None))
        and is_whole(getattr(module, "out_features", None))
        and not any(part.startswith("lora_") for part in name.split("."))
        and not hasattr(module, "base_layer")
    }


def _key(name: str) -> str:
    """A module's name as a ModuleDict takes it."""
    return name.replace(".", "-")


def install_adapters(
    blocks: list[nn.Module], adapters: Iterable[nn.Module], session: Any
) -> list[RemovableHandle]:
    """Add what the adapters give to what the layers give, while the session runs a call."""

    def add(adapter: nn.Module, _: nn.Module, args: tuple, output: Tensor) -> Tensor:
        call = session.call
        if call is None or call.leaves_out:
            return output
        return output + (call.places.reduced * adapter(args[0])).to(output.dtype)

    handles = []
    for block, by_name in zip(blocks, adapters, strict=True):
        layers = {_key(name): layer for name, layer in linear_layers(block).items()}
        for key, adapter in by_name.named_children():
            handles.append(layers[key].register_forward_hook(partial(add, adapter)))
    return handles
