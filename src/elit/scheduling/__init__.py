"""Budgets over the steps of a sampler: what fewer latents cost at each noise level, and plans."""
