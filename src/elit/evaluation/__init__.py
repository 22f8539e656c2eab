"""How good samples are: scores against real images, at one budget and over sweeps."""
