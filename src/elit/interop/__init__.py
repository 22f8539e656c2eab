"""Checkpoints of others, read into pipelines: SiT and ELIT-SiT as ours, DiT as diffusers'."""
