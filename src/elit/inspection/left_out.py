"""Tests of a core: the model without it, and how much its latents differ.

Each latent has a mean of its own, over samples and groups: there its learned vector is, which says
nothing of the sample. What varies about it is cut in two: what all latents of a group have in
common, and what is between them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from elit.interface import Read, Write
from elit.interface.grid import TokenGrid
from elit.models.elastic import ElasticMixin
from elit.models.sit import SiTRead, SiTWrite
from elit.retrofit.elastic import ElasticTransformer
from elit.retrofit.interface import LatentInterface, LosslessRead, LosslessWrite

_LEAST = 1e-5  # share of the mean square that must vary: float32 tells no less
LeftOut = Literal["core", "interface"]
PARTS: tuple[LeftOut, ...] = ("core", "interface")
AnyRead = Read | SiTRead | LosslessRead
AnyWrite = Write | SiTWrite | LosslessWrite


class HandOn(nn.Module):
    """Stands where a module was left out: gives back its first `streams` arguments."""

    def __init__(self, streams: int = 1):
        super().__init__()
        self.streams = streams

    def forward(self, *given: Any) -> Any:
        return given[0] if self.streams == 1 else given[: self.streams]


@contextmanager
def leave_out(model: Any, part: LeftOut) -> Iterator[None]:
    """Have an elastic model's calls run without its core, or without all of its interface.

    "core": latents go from Read straight to Write; a text passes the core as it came.
    "interface": tokens go from head to tail as if Read, core and Write were not there.

    The core then costs nothing where the model is one of ours; a retrofit's runs, and what it gives
    is put aside. Sharded models are called once before: their shards are counted then.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r} is unknown; leave out 'core' or 'interface'")
    if not model.is_elastic:
        raise ValueError(
            f"this {type(model).__name__} is a plain model: it has no core to leave out; give an "
            f"elastic one (elit-...)"
        )
    with ExitStack() as undo:

        def put(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        if isinstance(model, ElasticTransformer):
            put(model._elit_session, "leaves_out_core", True)
        else:
            head, core, _ = model.split
            for index in range(head, head + core):
                put(model.blocks, str(index), HandOn(2 if model.takes_text else 1))
        if part == "interface":
            interface = getattr(model, "elit", model)
            put(interface, "write", HandOn())
            if interface is model:  # where a retrofit reads, its tokens go on all the same
                put(model, "read", HandOn())
        yield


def find_interface(model: nn.Module) -> tuple[AnyRead, AnyWrite] | None:
    """Read and Write of a model of ours or of a retrofit; None for a plain model."""
    owner = getattr(model, "elit", model)
    if not isinstance(owner, ElasticMixin | LatentInterface) or owner.read is None:
        return None
    return owner.read, owner.write  # type: ignore[return-value]


def has_original_core(model: nn.Module) -> bool:
    """Tell whether a retrofit's core is the original's at full budget, whatever was learned."""
    interface = find_interface(model)
    return interface is not None and isinstance(interface[0], LosslessRead)


@contextmanager
def watch_latents(model: nn.Module, see: Callable[[str, Tensor, int], Any]) -> Iterator[None]:
    """Show the latents of every call to `see`: where, latents (B, G * n, D), groups G.

    The first is where they are: "read", as they enter the core, or "core", as they leave it.
    """
    interface = find_interface(model)
    if interface is None:
        yield
        return

    def read_done(_: nn.Module, given: tuple[Any, ...], latents: Tensor) -> None:
        see("read", latents, _num_groups(given))

    def core_done(module: nn.Module, given: tuple[Any, ...]) -> None:
        latents = given[2] if isinstance(module, LosslessWrite) else given[1]
        see("core", latents, _num_groups(given))

    read, write = interface
    with read.register_forward_hook(read_done), write.register_forward_pre_hook(core_done):
        yield


def _num_groups(given: tuple[Any, ...]) -> int:
    """G, of the arguments of a Read or a Write."""
    grids = [value for value in given if isinstance(value, TokenGrid)]
    return grids[0].num_groups if grids else given[0].shape[1]  # (B, G, P, D)


def latent_moments(latents: Tensor, num_groups: int) -> Tensor:
    """Sums over samples and groups that `latent_spread` needs, float32: add those of all calls.

    Of latents (B, G * n, D), group by group: (4 + n * D,) of groups, latents, squares of latents,
    squares of groups' means, and latents.
    """
    groups = latents.detach().float().unflatten(1, (num_groups, -1)).flatten(0, 1)  # (B*G, n, D)
    counts = groups.new_tensor([len(groups), len(groups) * groups.shape[1]])
    squares = torch.stack((groups.square().sum(), groups.mean(1).square().sum()))
    return torch.cat((counts, squares, groups.sum(0).flatten()))


def latent_spread(moments: Tensor) -> float | None:
    """Share of the latents' variance that is between the latents of a group; None if n is 1.

    1 - var(mean of a group) / var(latent), times n / (n - 1): 0 are latents that all say the
    same, whatever their learned vectors are, 1 are latents that say independent things. None too
    where they hardly vary. Moments may be added up or averaged over calls.
    """
    groups, latents, squares, of_means = (moments := moments.cpu().double())[:4].tolist()
    n = round(latents / groups)
    if n == 1:
        return None
    means = (moments[4:] / groups).unflatten(0, (n, -1))  # (n, D)
    variance = squares / latents - float(means.square().sum(-1).mean())
    if variance <= _LEAST * squares / latents:
        return None
    shared = of_means / groups - float(means.mean(0).square().sum())
    return (1 - shared / variance) * n / (n - 1)
