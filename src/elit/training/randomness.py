"""What a step draws for each row of its batch: a function of (seed, step, row) alone.

So a run may go on with another number of processes or micro-batches, and draws what it would have.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from elit._random import generator
from elit.flow.objective import SigmaDensity

ROWS_AT_ONCE = 16  # that one generator serves; a GPU would take long over one for each row


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
    """Draw for rows that are next to each other in the whole batch of a step.

    Args:
        rows: one or more, counted over all processes and micro-batches.
        shape: of one sample.
        device: to draw on; others draw other numbers.
        with_posterior: whether the data are moments of an autoencoder's posterior.
    """
    first, last = rows.start // ROWS_AT_ONCE, (rows.stop - 1) // ROWS_AT_ONCE
    blocks: list[list[Tensor]] = []
    for block in range(first, last + 1):
        draw = generator(seed, "noise", step, block, device=device)
        noise = torch.randn((ROWS_AT_ONCE, *shape), generator=draw, device=device)
        sigma = density.sample(ROWS_AT_ONCE, draw)
        drawn = [noise, sigma, torch.rand(ROWS_AT_ONCE, generator=draw, device=device)]
        if with_posterior:
            drawn.append(torch.randn((ROWS_AT_ONCE, *shape), generator=draw, device=device))
        blocks.append(drawn)
    start = rows.start - first * ROWS_AT_ONCE
    own = slice(start, start + len(rows))
    noise, sigma, dropout, *posterior = (
        torch.cat(block)[own] for block in zip(*blocks, strict=True)
    )
    return Draws(noise, sigma, dropout, posterior[0] if posterior else None)
