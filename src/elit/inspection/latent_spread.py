"""How much the latents of a group differ in what they say: the sign of a core that is used.

Each latent has a mean of its own, over samples and groups: there its learned vector is, which says
nothing of the sample. What varies about it is cut in two: what all latents of a group have in
common, and what is between them.
"""

import torch
from torch import Tensor

_LEAST = 1e-5  # share of the mean square that must vary: float32 tells no less


def latent_moments(latents: Tensor, num_groups: int) -> Tensor:
    """Sums over samples and groups that `latent_spread` needs, float32: add those of all calls.

    Args:
        latents: (B, G * n, D), group by group.
        num_groups: G.

    Returns:
        (4 + n * D,): groups, latents, squares of latents, squares of groups' means, and latents.
    """
    groups = latents.detach().float().unflatten(1, (num_groups, -1)).flatten(0, 1)  # (B*G, n, D)
    counts = groups.new_tensor([len(groups), len(groups) * groups.shape[1]])
    squares = torch.stack((groups.square().sum(), groups.mean(1).square().sum()))
    return torch.cat((counts, squares, groups.sum(0).flatten()))


def latent_spread(moments: Tensor) -> float | None:
    """Share of the latents' variance that is between the latents of a group; None if n is 1.

    1 - var(mean of a group) / var(latent), times n / (n - 1): 0 are latents that all say the
    same, whatever their learned vectors are, 1 are latents that say independent things. None too
    where they hardly vary.

    Args:
        moments: of `latent_moments`, added up or averaged over calls.
    """
    groups, latents, squares, of_means = (moments := moments.cpu().double())[:4].tolist()
    n = round(latents / groups)
    if n == 1:
        return None
    means = (moments[4:] / groups).unflatten(0, (n, -1))  # (n, D)
    variance = squares / latents - float(means.square().sum(-1).mean())
    if variance <= _LEAST * squares / latents:
        return None
    shared = of_means / groups - float(means.mean(0).square().sum())
    return (1 - shared / variance) * n / (n - 1)
