"""What a step draws for each row of its batch: a function of (seed, step, row) alone.

So a run may go on with another number of processes or micro-batches, and draws what it would have.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from elit.flow.objective import SigmaDensity
from elit.training.randomness import generator

BLOCK = 16  # rows that one generator serves; a GPU would take long over one for each row


class Draws(NamedTuple):
    """Random numbers of B rows.

    Attributes:
        noise: (B, ...), standard normal.
        sigma: (B,), noise levels in [0, 1].
        dropout: (B,), uniform in [0, 1): below the share of dropped labels, the label is dropped.
        posterior: (B, ...), standard normal, for the draw from an autoencoder's posterior; or None.
    """

    noise: Tensor
    sigma: Tensor
    dropout: Tensor
    posterior: Tensor | None


def draw_rows(
    rows: range,
    shape: Sequence[int],
    density: SigmaDensity,
    seed: int,
    step: int,
    device: torch.device,
    with_posterior: bool = False,
) -> Draws:
    """Draw for some rows of a step's batch.

    Args:
        rows: one or more in a row, counted over the whole batch of the step.
        shape: of one sample.
        density: of the noise levels.
        seed: of the run.
        step: number of the step.
        device: to draw on; others draw other numbers.
        with_posterior: whether the data are moments of an autoencoder's posterior.
    """
    first, last = rows.start // BLOCK, (rows.stop - 1) // BLOCK
    blocks: list[list[Tensor]] = []
    for block in range(first, last + 1):
        draw = generator(seed, "noise", step, block, device=device)
        noise = torch.randn((BLOCK, *shape), generator=draw, device=device)
        sigma = density.sample(BLOCK, draw)
        drawn = [noise, sigma, torch.rand(BLOCK, generator=draw, device=device)]
        if with_posterior:
            drawn.append(torch.randn((BLOCK, *shape), generator=draw, device=device))
        blocks.append(drawn)
    start = rows.start - first * BLOCK
    own = slice(start, start + len(rows))
    noise, sigma, dropout, *posterior = (torch.cat(b)[own] for b in zip(*blocks, strict=True))
    return Draws(noise, sigma, dropout, posterior[0] if posterior else None)
