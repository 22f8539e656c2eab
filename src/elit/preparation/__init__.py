"""Your own images, clips and texts, encoded once into a folder that training streams from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elit.preparation.prepare import PrepareResult, prepare
    from elit.preparation.settings import PrepareSettings
    from elit.preparation.verify import verify

__all__ = ["PrepareResult", "PrepareSettings", "prepare", "verify"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: the settings alone need no torch."""
    if name == "PrepareSettings":
        from elit.preparation.settings import PrepareSettings

        return PrepareSettings
    if name == "verify":
        from elit.preparation.verify import verify

        return verify
    if name in __all__:
        import elit.preparation.prepare as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
