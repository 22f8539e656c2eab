"""Ordinary transformer parts. Nothing here knows of latents, groups or budgets."""
