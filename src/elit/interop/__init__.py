"""Checkpoints of others, read into pipelines: SiT and ELIT-SiT as ours, DiT as diffusers'."""

# Words that a user gives; here they need no torch.
FORMATS = ("official", "dit")
WEIGHTS = ("ema", "model")
