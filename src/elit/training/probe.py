"""What happens in a model's latent interface while it is validated, seen by hooks."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from elit.inspection.left_out import (
    find_interface,
    has_original_core,
    latent_moments,
    latent_spread,
    watch_latents,
)
from elit.interface.attention_maps import (
    attention_coverage,
    attention_entropy,
    watch_attention,
)
from elit.interface.read import Read
from elit.training.distributed import World


class InterfaceProbe:
    """Means over the calls of a model, for each number of latents; a plain model shows nothing."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, tuple[Tensor, int]]] = {}
        self._kept: int | None = None
        self.tells_spread = True

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

    def add_latents(self, where: str, latents: Tensor, num_groups: int) -> None:
        """Take note of latents (B, G * n, D) as they enter the core, or as they leave it."""
        end = "_read" if where == "read" else ""
        self.add(f"latent_norm{end}", _root_mean_square(latents))
        if self.tells_spread and latents.shape[1] > num_groups:
            self.add(f"latent_spread{end}", latent_moments(latents, num_groups))

    def begin(self, num_latents: int | None) -> None:
        """Say at how many latents the next call runs."""
        self._kept = num_latents

    def values(self, world: World) -> dict[int, dict[str, float]]:
        """Means over the calls of all processes, which must ask together.

        `read_entropy` is in nats, `read_entropy_share` that of the largest entropy,
        `read_coverage` the share of a group's tokens that Read looks at; `latent_norm_read` and
        `latent_norm` are root mean squares of the latents after Read and after the core,
        `latent_spread_read` and `latent_spread` what of their variance is between the latents of
        a group: see `latent_spread`.
        """
        sums = [total / count for of in self._sums.values() for total, count in of.values()]
        if not sums:
            return {}
        means = iter(
            world.mean(torch.cat([x.flatten() for x in sums])).split([x.numel() for x in sums])
        )
        return {
            kept: _numbers({name: next(means) for name in of}) for kept, of in self._sums.items()
        }


def _numbers(means: Mapping[str, Tensor]) -> dict[str, float]:
    """Plain numbers of the means at one number of latents; what is undefined is left out."""
    numbers = {}
    for name, value in means.items():
        if not name.startswith("latent_spread"):
            numbers[name] = value.item()
        elif (spread := latent_spread(value)) is not None:
            numbers[name] = spread
    return numbers


@contextmanager
def watch_interface(model: nn.Module) -> Iterator[InterfaceProbe]:
    """See what Read and the core do in the calls of a model that name their `num_latents`.

    A retrofit that starts lossless shows its latents alone: they begin as means of tokens, and
    what its Read attends to only adds to them.
    """
    probe, found = InterfaceProbe(), find_interface(model)

    def call_begins(_: nn.Module, __: Any, named: dict[str, Any]) -> None:
        probe.begin(named.get("num_latents"))

    with ExitStack() as stack:
        if found is not None:
            handle = model.register_forward_pre_hook(call_begins, with_kwargs=True)
            stack.callback(handle.remove)
            # Cells of one group are as alike as the image is.
            probe.tells_spread = not has_original_core(model)
            stack.enter_context(watch_latents(model, probe.add_latents))
            if isinstance(found[0], Read):
                stack.enter_context(watch_attention(found[0].attention, probe.add_weights))
        yield probe


def _root_mean_square(x: Tensor) -> Tensor:
    return x.detach().float().square().mean().sqrt()
