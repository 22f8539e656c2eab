"""Rectified flow: objective, guidance, and the schedulers that diffusers lacks.

Sigma 1 is noise, 0 is data; velocity = noise - data. (The paper's time runs the other way.)
Nothing here knows a model: it sees a callable.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elit.flow.sampling import sample

__all__ = ["sample"]


def __getattr__(name: str) -> object:  # torch takes seconds to import
    if name != "sample":
        raise AttributeError(f"module 'elit.flow' has no attribute {name!r}")
    from elit.flow.sampling import sample

    return sample
