"""How weights start."""

from torch import nn

from elit.interface.read_write import Read, Write
from elit.layers.transformer import AdaLNZero, FinalLayer, TimestepEmbedding


def init_weights(module: nn.Module) -> None:
    """Initialise one module; for `model.apply`, which visits children before their parents.

    Xavier-uniform matrices with zero biases and N(0, 0.02) embeddings; after those, the layers
    that hold them have the last word, by a row here or by a `reset_parameters` of their own.
    """
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return  # there is nothing to fill, and trying takes longer than making the model
    match module:
        case nn.Linear():
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        case nn.Embedding():
            nn.init.normal_(module.weight, std=0.02)
        case AdaLNZero():  # gates everything off
            zero_(module.linear)
        case FinalLayer():  # predicts zero
            zero_(module.modulation)
            zero_(module.linear)
        case TimestepEmbedding():  # small, as the label embedding
            nn.init.normal_(module.linear_in.weight, std=0.02)
            nn.init.normal_(module.linear_out.weight, std=0.02)
        case Read():
            # Latents and places as far apart as normalised tokens are: small vectors make the
            # latents copies of one another. Two closed gates in a row, this one and Write's, hide
            # the core from its gradient: docs/paper.md has what that costs.
            for embedding in (module.latents, module.latent_index, module.token_place):
                nn.init.normal_(embedding)
            open_gates(module.modulation)
        case Write():
            # A closed gate gives the core no gradient until it has moved: docs/paper.md.
            nn.init.normal_(module.token_place)
            open_gates(module.modulation, 0.1)
        case _ if callable(reset := getattr(module, "reset_parameters", None)):
            reset()


def open_gates(modulation: AdaLNZero, gate: float = 1.0) -> None:
    """Start with gates of this value, whatever the condition."""
    nn.init.constant_(modulation.linear.bias.view(modulation.shape)[:, 2], gate)


def zero_(linear: nn.Linear) -> None:
    """Make a linear layer give zero."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
