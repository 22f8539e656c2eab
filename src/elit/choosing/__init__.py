"""The choice of a way to draw: what a sweep measured, what it costs here, what a cap allows."""
