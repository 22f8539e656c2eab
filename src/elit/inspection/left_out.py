"""What a model says with its core left out: how much of the work is the core's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from elit.interface.grid import TokenGrid
from elit.interface.read import Read
from elit.interface.write import Write
from elit.models.elastic import ElasticMixin
from elit.models.sit import SiTRead, SiTWrite
from elit.retrofit.elastic import ElasticTransformer
from elit.retrofit.interface import LatentInterface, LosslessRead, LosslessWrite

LeftOut = Literal["core", "interface"]
PARTS: tuple[LeftOut, ...] = ("core", "interface")
AnyRead = Read | SiTRead | LosslessRead
AnyWrite = Write | SiTWrite | LosslessWrite


class HandOn(nn.Module):
    """Stands where a module was left out: gives back what it got.

    Args:
        streams: arguments that are given back: the first, or as many as there are streams.
    """

    def __init__(self, streams: int = 1):
        super().__init__()
        self.streams = streams

    def forward(self, *given: Any) -> Any:
        """The first arguments, as they came."""
        return given[0] if self.streams == 1 else given[: self.streams]


@contextmanager
def leave_out(model: Any, part: LeftOut) -> Iterator[None]:
    """Have an elastic model's calls run without its core, or without all of its interface.

    "core": latents go from Read straight to Write; a text passes the core as it came.
    "interface": tokens go from head to tail as if Read, core and Write were not there.

    Weights, budgets and arguments are as ever, and the core costs nothing where the model is one
    of ours; a retrofit's runs, and what it gives is put aside. Sharded models are called once
    before: their shards are counted then.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r} is unknown; leave out 'core' or 'interface'")
    found = find_interface(model)
    if found is None:
        raise ValueError(
            f"this {type(model).__name__} is a plain model: it has no core to leave out; give an "
            f"elastic one (elit-...)"
        )
    if isinstance(model, ElasticTransformer):
        with _retrofit_without(model, part):
            yield
        return
    before = list(model.blocks), model.read, model.write
    streams = 2 if model.takes_text else 1
    head, core, _ = model.split
    for index in range(head, head + core):
        model.blocks[index] = HandOn(streams)
    if part == "interface":
        model.read, model.write = HandOn(), HandOn()
    try:
        yield
    finally:
        blocks, model.read, model.write = before
        for index in range(head, head + core):
            model.blocks[index] = blocks[index]


@contextmanager
def _retrofit_without(model: ElasticTransformer, part: LeftOut) -> Iterator[None]:
    session, write = model._elit_session, model.elit.write
    session.leaves_out_core = True
    if part == "interface":
        model.elit.write = HandOn()
    try:
        yield
    finally:
        session.leaves_out_core, model.elit.write = False, write


def find_interface(model: nn.Module) -> tuple[AnyRead, AnyWrite] | None:
    """Read and Write of a model of ours or of a retrofit; None for a plain model."""
    owner = getattr(model, "elit", model)
    if not isinstance(owner, ElasticMixin | LatentInterface) or owner.read is None:
        return None
    return owner.read, owner.write  # type: ignore[return-value]


def has_original_core(model: nn.Module) -> bool:
    """Whether a retrofit's core is the original's own at full budget: whatever was learned."""
    found = find_interface(model)
    return found is not None and isinstance(found[0], LosslessRead)


@contextmanager
def watch_latents(model: nn.Module, see: Callable[[str, Tensor, int], Any]) -> Iterator[None]:
    """Show the latents of every call to `see`: where, latents (B, G * n, D), groups G.

    The first is where they are: "read", as they enter the core, or "core", as they leave it.
    """
    found = find_interface(model)
    if found is None:
        yield
        return

    def read_done(_: nn.Module, given: tuple[Any, ...], latents: Tensor) -> None:
        see("read", latents, _num_groups(given))

    def core_done(module: nn.Module, given: tuple[Any, ...]) -> None:
        latents = given[2] if isinstance(module, LosslessWrite) else given[1]
        see("core", latents, _num_groups(given))

    handles = (
        found[0].register_forward_hook(read_done),
        found[1].register_forward_pre_hook(core_done),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _num_groups(given: tuple[Any, ...]) -> int:
    """G, of the arguments of a Read or a Write."""
    grids = [value for value in given if isinstance(value, TokenGrid)]
    return grids[0].num_groups if grids else given[0].shape[1]  # (B, G, P, D)
