"""Scores by the names that files and flags use."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elit.viz.sweeps import ScoreInfo

SCORES: dict[str, tuple[str, bool]] = {
    "fid": ("FID", True),
    "sfid": ("sFID", True),
    "fdd": ("FDD (DINOv2)", True),
    "fd": ("Frechet distance (own network)", True),  # neither Inception nor DINOv2
    "kid": ("KID", True),
    "fvd": ("FVD", True),
    "is": ("Inception Score", False),
    "precision": ("precision", False),
    "recall": ("recall", False),
    "density": ("density", False),
    "coverage": ("coverage", False),
    "clip": ("CLIP score", False),
    "accuracy": ("classifier accuracy", False),
}
"""Title, and whether lower is better, in the order that tables show them."""


def score_infos() -> "dict[str, ScoreInfo]":
    """What tables and pages say of each score."""
    from elit.viz.sweeps import ScoreInfo

    return {name: ScoreInfo(*about) for name, about in SCORES.items()}
