"""Muon (Jordan et al. 2024): momentum of the matrices inside the blocks, made orthogonal."""

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from elit.training.distributed import World, shard_like, whole

_INSIDE = re.compile(r"blocks\.|(^|\.)(read|write)\.")
_OUTSIDE = re.compile(r"modulation|_mod\.|norm|lora_")
_STACKED = {"to_qkv": 3, "to_kv": 2}


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """The matrices that Muon takes, and how many are stacked in each: queries, keys and values.

    Those of the linear layers in the blocks, Read and Write. What embeds, modulates or makes the
    output is AdamW's, as are factors of low rank.
    """
    return {
        cast(nn.Parameter, module.weight): _STACKED.get(name.rpartition(".")[2], 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _INSIDE.search(name) and not _OUTSIDE.search(name)
    }


class Muon(torch.optim.Muon):
    """PyTorch's Muon, of matrices that may be stacked, or shards.

    PyTorch's step would multiply shards as they lie, with messages in each product, and round
    otherwise with each number of processes. Here each matrix is gathered, made orthogonal by one
    process, and sent to all. Its step is as large as AdamW's of the same rate (Liu et al. 2025).
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        stacked: dict[nn.Parameter, int],
        world: World,
        lr: float,
        weight_decay: float,
    ):
        super().__init__(groups, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        self.stacked, self.world = stacked, world
        # On a CPU 16 bits are no faster.
        self.dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        for group in self.param_groups:
            for matrix in group["params"]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change the weights; all processes call this together."""
        assert closure is None
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for start in range(0, len(matrices), self.world.size):  # one for each process
                self._step(matrices[start : start + self.world.size], group)

    def _step(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        updates = []
        for owner, matrix in enumerate(matrices):
            gradient, momentum = matrix.grad, self.state[matrix]["momentum_buffer"]
            assert gradient is not None
            momentum.lerp_(gradient, 1 - group["momentum"])
            update = whole(gradient.lerp(momentum, group["momentum"])).to(self.dtype)
            if owner == self.world.rank:
                update = self._orthogonal(update, self.stacked[matrix], group)
            else:
                update = torch.empty_like(update)
            updates.append(update)
        for owner, (matrix, update) in enumerate(zip(matrices, updates, strict=True)):
            self.world.send(update, owner)
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            size = max(len(update) // self.stacked[matrix], update.shape[1])
            step = shard_like(update.to(matrix.dtype), matrix)
            matrix.add_(step, alpha=-group["lr"] * 0.2 * size**0.5)

    def _orthogonal(self, update: Tensor, stacked: int, group: dict[str, Any]) -> Tensor:
        parts = update.unflatten(0, (stacked, -1))
        return newton_schulz(parts, group["ns_coefficients"], group["ns_steps"]).flatten(0, 1)


def newton_schulz(x: Tensor, coefficients: Sequence[float], steps: int) -> Tensor:
    """Matrices (..., m, n) with all singular values near 1, and the same singular vectors.

    Each step is p(X X^T) X of an odd polynomial that lifts small singular values first.
    """
    a, b, c = coefficients
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT


def step_flops(model: nn.Module) -> float:
    """FLOPs of making all matrices of a model orthogonal once, with PyTorch's five steps."""
    total = 0.0
    for matrix, stacked in hidden_matrices(model).items():
        m, n = sorted((len(matrix) // stacked, matrix.shape[1]))
        total += stacked * 5 * (4 * m * m * n + 2 * m**3)
    return total
