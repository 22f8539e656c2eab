"""What happens in a latent interface: where it looks, where the loss is, what latents are worth."""
