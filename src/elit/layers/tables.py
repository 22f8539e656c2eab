"""Tables that depend on sizes alone, kept between calls."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch

Maker = TypeVar("Maker", bound=Callable)


def kept(make: Maker) -> Maker:
    """Keep what `make` gave of the last 32 of its arguments: sizes and a device that say all of it.

    Nobody may change what it gives. Where tensors stand for others, in a trace, a compiled graph,
    under a mode such as FakeTensorMode or in the capture of a CUDA graph, it is made anew.
    """
    # Training may meet what sampling made: tensors of inference mode have no backward.
    remembered = lru_cache(maxsize=32)(torch.inference_mode(False)(make))

    @wraps(make)
    def tables(*sizes):  # type: ignore[no-untyped-def]
        return (remembered if _is_eager() else make)(*sizes)

    tables.cache_clear = remembered.cache_clear  # type: ignore[attr-defined]
    return tables  # type: ignore[return-value]


def _is_eager() -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    is_captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return not (is_captured or torch._C._len_torch_dispatch_stack())
