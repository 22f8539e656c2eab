"""What happens in a model's latent interface while it is validated, seen by hooks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from elit.interface.attention_maps import (
    attention_coverage,
    attention_entropy,
    watch_attention,
)
from elit.interface.read import Read
from elit.interface.write import Write
from elit.retrofit.interface import LatentInterface
from elit.retrofit.lossless import LosslessRead, LosslessWrite
from elit.training.distributed import World


class InterfaceProbe:
    """Means over the calls of a model, for each number of latents; a plain model shows nothing."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, tuple[Tensor, int]]] = {}
        self._kept: int | None = None

    def add(self, name: str, value: Tensor) -> None:
        """Take note of a number of the running call; it stays on its device."""
        if self._kept is not None:
            of_kept = self._sums.setdefault(self._kept, {})
            total, count = of_kept.get(name, (torch.zeros_like(value), 0))
            of_kept[name] = total + value, count + 1

    def add_weights(self, weights: Tensor) -> None:
        """Take note of Read's attention weights, (B * G, H, n, P)."""
        entropy, tokens = attention_entropy(weights).mean(), weights.shape[-1]
        self.add("read_entropy", entropy)
        if tokens > 1:
            self.add("read_entropy_share", entropy / torch.log(entropy.new_tensor(tokens)))
            self.add("read_coverage", attention_coverage(weights).mean())

    def begin(self, num_latents: int | None) -> None:
        """Say at how many latents the next call runs."""
        self._kept = num_latents

    def values(self, world: World) -> dict[int, dict[str, float]]:
        """Means over the calls of all processes, which must ask together.

        `read_entropy` is in nats, `read_entropy_share` that of the largest entropy,
        `read_coverage` the share of a group's tokens that Read looks at; `latent_norm_read` and
        `latent_norm` are root mean squares of the latents after Read and after the core.
        """
        means = [total / count for of in self._sums.values() for total, count in of.values()]
        flat = iter(world.mean(torch.stack(means)).tolist() if means else [])
        return {kept: {name: next(flat) for name in of} for kept, of in self._sums.items()}


@contextmanager
def watch_interface(model: nn.Module) -> Iterator[InterfaceProbe]:
    """See what Read and the core do in the calls of a model that name their `num_latents`.

    A retrofit that starts lossless shows its latents alone: they begin as means of tokens, and
    what its Read attends to only adds to them.
    """
    probe, found = InterfaceProbe(), find_interface(model)
    with ExitStack() as stack:
        if found is not None:
            read, write = found

            def call_begins(_: nn.Module, __: Any, named: dict[str, Any]) -> None:
                probe.begin(named.get("num_latents"))

            def latents_made(_: nn.Module, __: Any, latents: Tensor) -> None:
                probe.add("latent_norm_read", _root_mean_square(latents))

            def core_done(module: nn.Module, given: tuple[Any, ...]) -> None:
                latents = given[2] if isinstance(module, LosslessWrite) else given[1]
                probe.add("latent_norm", _root_mean_square(latents))

            for handle in (
                model.register_forward_pre_hook(call_begins, with_kwargs=True),
                read.register_forward_hook(latents_made),
                write.register_forward_pre_hook(core_done),
            ):
                stack.callback(handle.remove)
            if isinstance(read, Read):
                stack.enter_context(watch_attention(read.attention, probe.add_weights))
        yield probe


def find_interface(
    model: nn.Module,
) -> tuple[Read | LosslessRead, Write | LosslessWrite] | None:
    """Read and Write of a model of ours or of a retrofit; None for a plain model."""
    owner = getattr(model, "elit", model)
    if not (isinstance(owner, LatentInterface) or getattr(model, "is_elastic", False)):
        return None
    return owner.read, owner.write  # type: ignore[return-value]


def _root_mean_square(x: Tensor) -> Tensor:
    return x.detach().float().square().mean().sqrt()
