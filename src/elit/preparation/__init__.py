"""Your own images, clips and texts, encoded once into a folder that training streams from."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elit.preparation.records import verify
    from elit.preparation.run import PrepareResult, prepare
    from elit.preparation.settings import PrepareSettings

__all__ = ["PrepareResult", "PrepareSettings", "prepare", "verify"]

_LAZY = {
    "PrepareResult": "elit.preparation.run",
    "PrepareSettings": "elit.preparation.settings",
    "prepare": "elit.preparation.run",
    "verify": "elit.preparation.records",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: the settings alone need no torch."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
