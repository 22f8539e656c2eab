"""Checkpoints of others, read into models of ours."""
