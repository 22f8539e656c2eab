"""Low-rank adapters that act only below full budget: ours, beyond the paper.

The blocks of a pretrained model have never seen latents. Adapters on their linear layers let them
learn to work on those, while the weights stay as they were: each adds missing * up(down(x)), and
`missing`, the share of latents that a call leaves out, is zero at full budget. The original model
is then still in there, number for number, whatever the adapters have learned.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elit._numbers import is_whole


class LowRankAdapter(nn.Module):
    """up(down(x)) with `up` zero at first (LoRA, Hu et al. 2021)."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))

    def reset_parameters(self) -> None:
        """Add nothing."""
        nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return (x.to(self.down.dtype) @ self.down.T) @ self.up.T


def make_adapters(blocks: list[nn.Module], rank: int) -> nn.ModuleList:
    """An adapter for every linear layer of every block, by the layer's name in it."""
    return nn.ModuleList(
        nn.ModuleDict(
            {
                _key(name): LowRankAdapter(layer.in_features, layer.out_features, rank)
                for name, layer in linear_layers(block).items()
            }
        )
        for block in blocks
    )


def linear_layers(block: nn.Module) -> dict[str, Any]:
    """The linear layers of a block by name, also quantised ones, but not those of a LoRA."""
    return {
        name: module
        for name, module in block.named_modules()
        if is_whole(getattr(module, "in_features", None))
        and is_whole(getattr(module, "out_features", None))
        and not any(part.startswith("lora_") for part in name.split("."))
    }


def _key(name: str) -> str:
    """A module's name as a ModuleDict takes it."""
    return name.replace(".", "-")


def install_adapters(
    blocks: list[nn.Module], adapters: nn.ModuleList, session: Any
) -> list[RemovableHandle]:
    """Add what the adapters give to what the layers give.

    Args:
        blocks: of the transformer.
        adapters: from `make_adapters`.
        session: whose `call`, if one is running, says how many latents are missing.
    """
    handles = []
    for block, by_name in zip(blocks, adapters, strict=True):
        layers = {_key(name): layer for name, layer in linear_layers(block).items()}
        for key, adapter in by_name.items():

            def add(
                layer: nn.Module, args: tuple, output: Tensor, adapter: Any = adapter
            ) -> Tensor:
                del layer
                call = session.call
                # A compiled graph multiplies by zero: a branch would be a graph more.
                if call is None or (call.is_full and not torch.compiler.is_compiling()):
                    return output
                return output + (call.places.missing * adapter(args[0])).to(output.dtype)

            handles.append(layers[key].register_forward_hook(add))
    return handles
