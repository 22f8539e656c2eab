"""How weights start."""

from torch import nn


def init_weights(module: nn.Module) -> None:
    """Initialise one module; for `model.apply`, which visits children before their parents.

    Xavier-uniform matrices with zero biases and N(0, 0.02) embeddings; after those, a parent's
    own `reset_parameters` has the last word (zero gates, learned latents).
    """
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return  # there is nothing to fill, and trying takes longer than making the model
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()


def zero_(linear: nn.Linear) -> None:
    """Make a linear layer give zero."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
