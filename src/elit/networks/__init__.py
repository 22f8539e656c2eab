"""Networks by whose features images are compared, and where their weights come from."""

NETWORKS = ("inception", "dinov2", "clip", "i3d", "classifier")
"""Names that a user gives; here they need no torch."""
