"""The latent interface: all that ELIT adds to a diffusion transformer.

tokens -> head -> Read -> core, on a budget of latents -> Write -> tail -> tokens

`grid.py` cuts the tokens into groups, `read_write.py` has the two grouped cross-attentions,
`budget.py` says how many latents are kept.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elit.interface.budget import TailDropping, resolve_budget
    from elit.interface.grid import TokenGrid
    from elit.interface.read_write import Read, Write

_HOME = {
    "Read": "read_write", "TailDropping": "budget", "TokenGrid": "grid", "Write": "read_write",
    "resolve_budget": "budget",
}  # fmt: skip

__all__ = ["Read", "TailDropping", "TokenGrid", "Write", "resolve_budget"]


def __getattr__(name: str) -> object:
    """Names when they are used: budgets and grids need no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
