"""A page to feel the budget: a slider, the picture, what it cost, where Read looks."""
