"""Numbers of an inspection: correlations with their controls, and costs of latents."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from elit.inspection.correlation import controlled, correlation_matrix, position_share
from elit.inspection.inspector import Maps, Worth
from elit.inspection.left_out import PARTS, latent_spread

# name: arguments of `correlation_matrix`
KINDS: dict[str, dict[str, bool]] = {
    "pearson": {},
    "spearman": {"rank": True},
    "pearson_in_groups": {"within_groups": True},
    "spearman_in_groups": {"rank": True, "within_groups": True},
}


def numbers_of_maps(maps: Maps, budget: float, seed: int = 0) -> dict[str, Any]:
    """Plain types of the maps of two images or more at one level and budget; null is undefined."""
    loss, attention, difference = (maps.mean(n) for n in ("loss", "attention", "difference"))
    assert loss is not None
    shares: dict[str, Any] = {"loss": position_share(loss.flatten(1))}
    # The last is of a place within its group, whichever group it is.
    for name, axes in (("attention", (1, 2)), ("attention_in_groups", (0, 1))):
        shares[name] = None if attention is None else position_share(attention.flatten(*axes))
    return {
        "sigma": maps.sigma,
        "budget": budget,
        "num_latents": maps.num_latents,
        "loss": float(loss.mean()),
        "position_share": shares,
        "attention_loss": correlations(maps.attention, maps.loss, seed),
        "latent_entropy": None if maps.entropy is None else maps.entropy.tolist(),
        "difference": None if difference is None else float(difference.mean()),
        "difference_loss": correlations(maps.difference, maps.loss, seed),
    }


def correlations(one: Tensor | None, other: Tensor | None, seed: int) -> dict[str, Any] | None:
    """Correlations of maps (2, N, G, P), whose first axis are halves of the noise draws.

    Two maps of one image may agree on its noise alone, which a shuffle takes from them together
    with the image. So there is `other_noise`, the same with its own control of one map's half with
    the other map's other half: what they agree on where they have seen different noise.
    """
    if one is None or other is None:
        return None
    result = {}
    for name, options in KINDS.items():
        same_noise = controlled(correlation_matrix(one.mean(0), other.mean(0), **options), seed)
        crossed = [correlation_matrix(one[i], other[1 - i], **options) for i in (0, 1)]
        other_noise = controlled(torch.stack(crossed).mean(0), seed)
        result[name] = {**asdict(same_noise), "other_noise": asdict(other_noise)}
    return result


def numbers_of_worth(worths: Sequence[Worth]) -> dict[str, Any]:
    """Costs of latents: losses with the first ones only, and what leaving one out adds.

    Costs are differences on the same images and noise, with their standard error over images.
    """
    lines: dict[str, list[dict[str, Any]]] = {"first": [], "without": []}
    for worth in worths:
        full = worth.first[max(worth.first)]
        of_kind = (("first", "num_latents", worth.first), ("without", "latent", worth.without))
        for kind, what, by_number in of_kind:
            for number, losses in by_number.items():
                line = {"sigma": worth.sigma, what: number, "loss": float(losses.mean())}
                lines[kind].append({**line, **_cost(losses - full)})
    return lines


def numbers_of_core(worth: Worth) -> dict[str, Any]:
    """The worth of the whole core at one noise level, and how much its latents differ.

    `share` is the cost over the loss: how much the loss rises, where 1 is twice the loss.
    """
    full = worth.first[max(worth.first)]
    loss = float(full.mean())
    result: dict[str, Any] = {"sigma": worth.sigma, "loss": loss}
    for part, losses in worth.without_part.items():
        cost = _cost(losses - full)
        share = cost["cost"] / loss if loss else None
        result[f"without_{part}"] = {"loss": float(losses.mean()), **cost, "share": share}
    spread = {"latent_spread_read": "read", "latent_spread": "core"}
    return result | {n: latent_spread(worth.moments[where]) for n, where in spread.items()}


def mean_over_levels(worths: Sequence[Worth]) -> Worth:
    """The mean over noise levels, each counting as much as any other; its sigma is their mean.

    The latents' moments are those of all levels together, as in training.
    """
    return Worth(
        sum(worth.sigma for worth in worths) / len(worths),
        {n: torch.stack([w.first[n] for w in worths]).mean(0) for n in worths[0].first},
        {i: torch.stack([w.without[i] for w in worths]).mean(0) for i in worths[0].without},
        {p: torch.stack([w.without_part[p] for w in worths]).mean(0) for p in PARTS},
        {m: torch.stack([w.moments[m] for w in worths]).sum(0) for m in worths[0].moments},
    )


def _cost(differences: Tensor) -> dict[str, Any]:
    count = len(differences)
    error = float(differences.std() / count**0.5) if count > 1 else None
    return {"cost": float(differences.mean()), "cost_error": error}
