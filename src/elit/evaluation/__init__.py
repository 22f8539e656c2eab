"""How good a model's samples are, and what is inside."""
