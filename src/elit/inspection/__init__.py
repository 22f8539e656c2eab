"""A look into a latent interface: its attention, its loss, the worth of its latents."""
