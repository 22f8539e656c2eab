"""Scores of samples against real images, at one budget and over sweeps."""
