"""Pipelines in the manner of diffusers: load, call, save."""
