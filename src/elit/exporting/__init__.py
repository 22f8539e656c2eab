"""A trained model as one file that another program runs, at any budget, without elit."""
