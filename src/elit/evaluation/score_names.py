"""Scores by the names that files and flags use."""

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
