"""What happens in a model's latent interface: where Read looks, where the loss is, what each
latent is worth.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elit.flow.objective import interpolate, velocity_target
from elit.inspection.left_out import PARTS, LeftOut, latent_moments, leave_out, watch_latents
from elit.interface.attention_maps import attention_entropy, watch_attention
from elit.interface.grid import TokenGrid
from elit.interface.raster import from_groups
from elit.pipelines.base import ElasticPipeline
from elit.retrofit.elastic import ElasticTransformer

MAX_COUNTS = 32  # latents that are left out one by one, and numbers of first latents: at most


@dataclass(frozen=True)
class Subject:
    """Images, conditions and noise that are looked at."""

    images: Tensor  # (N, C, *space), as the model sees them
    condition: Mapping[str, Tensor]  # the model's arguments that say what they show, (N, ...) each
    seed: int = 0  # of the noise: image i has draw d from (seed, i, d), whatever the batch
    draws: int = 4  # of noise for each image, an even number
    batch_size: int = 32  # samples of a forward

    def __post_init__(self) -> None:
        if self.draws < 2 or self.draws % 2:
            raise ValueError(f"draws={self.draws}: give an even number, of at least 2")

    def batches(self, device: torch.device, draws: int) -> Iterator["Batch"]:
        """Yield all images with their first draws of noise, in batches."""
        pairs = [(i, d) for i in range(len(self.images)) for d in range(draws)]
        for first in range(0, len(pairs), self.batch_size):
            part = pairs[first : first + self.batch_size]
            rows = torch.tensor([i for i, _ in part])
            shape = self.images.shape[1:]
            noise = [torch.randn(shape, generator=_generator(self.seed, i, d)) for i, d in part]
            yield Batch(
                rows,
                torch.tensor([d % 2 for _, d in part]),
                self.images[rows].to(device),
                torch.stack(noise).to(device),
                {name: value[rows].to(device) for name, value in self.condition.items()},
            )


@dataclass(frozen=True)
class Batch:
    """Numbers of some samples' images, halves of their draws, data, noise, condition."""

    rows: Tensor
    halves: Tensor
    images: Tensor
    noise: Tensor
    condition: dict[str, Tensor]


@dataclass
class Maps:
    """Maps of N images at one noise level and budget, group by group: (2, N, G, P) float32.

    The first axis has means over one half of the noise draws and over the other.
    """

    sigma: float  # noise level
    num_latents: int  # latents per group, n
    loss: Tensor  # mean squared error of the velocity in each token
    # what a token gets of Read's weights, summed over the latents, mean over heads; a group's
    # tokens share n. None where Read copies, as a retrofit's at full budget
    attention: Tensor | None = None
    # mean squared difference of the velocity from full budget's; None there
    difference: Tensor | None = None
    # (n, G, P) each latent's own weights, mean over images; None as above
    latents: Tensor | None = None
    shown: Tensor | None = None  # (S, n, G, P) the same of the first few images
    # (n,) of each latent's weights, in nats, mean over groups, heads and images
    entropy: Tensor | None = None

    def mean(self, name: str) -> Tensor | None:
        """A map over all draws, (N, G, P)."""
        value = getattr(self, name)
        return None if value is None else value.mean(0)


@dataclass(frozen=True)
class Worth:
    """Loss of N images with some latents only, mean over noise draws; always the same noise."""

    sigma: float  # noise level
    # number of first latents kept: losses (N,)
    first: dict[int, Tensor] = field(default_factory=dict)
    # number of the latent left out, from 0: losses (N,). Empty of a retrofit, whose latents
    # are cells of the group, and of a single latent
    without: dict[int, Tensor] = field(default_factory=dict)
    # losses (N,) at full budget without the core, and without the interface
    without_part: dict[LeftOut, Tensor] = field(default_factory=dict)
    # `latent_moments` at full budget, of latents that enter the core ("read") and that leave
    # it ("core")
    moments: dict[str, Tensor] = field(default_factory=dict)


def check_elastic(model: Any, name: str = "this") -> None:
    """Raise a ValueError for a model without a latent interface."""
    if not model.is_elastic:
        raise ValueError(
            f"{name} is a plain {type(model).__name__} without a latent interface: there "
            f"are no latents to look into; give an elastic model (elit-...)"
        )


class Inspector:
    """Looks into an elastic model, one of ours or a retrofit, on its device."""

    def __init__(self, model: Any, subject: Subject):
        check_elastic(model)
        self.model, self.subject = model.eval(), subject
        self.device = next(model.parameters()).device
        self.is_retrofit = isinstance(model, ElasticTransformer)
        self.grid = token_grid(model, subject.images)

    @torch.no_grad()
    def maps(self, sigma: float, num_latents: Sequence[int], shown: int = 0) -> list[Maps]:
        """Maps at a noise level for each number of latents, and latents' own of `shown` images."""
        most, count = self.model.max_latents, len(self.subject.images)
        shape = (2, count, self.grid.num_groups, self.grid.tokens_per_group)
        by_latents = {n: Maps(sigma, n, torch.zeros(shape)) for n in dict.fromkeys(num_latents)}
        attention = getattr(getattr(self.model, "elit", self.model).read, "attention", None)
        for batch in self.subject.batches(self.device, self.subject.draws):
            full = self._predict(batch, sigma, most) if any(n < most for n in by_latents) else None
            for n, maps in by_latents.items():
                seen: list[Tensor] = []
                with (
                    nullcontext() if attention is None else watch_attention(attention, seen.append)
                ):
                    velocity = self._predict(batch, sigma, n)
                target = velocity_target(batch.images, batch.noise)
                self._add(maps, "loss", batch, self._per_token(velocity - target))
                if full is not None and n < most:
                    self._add(maps, "difference", batch, self._per_token(velocity - full))
                if seen:
                    weights = seen[0][:, :, :n]  # of those kept: a SiT reads all of them
                    self._add_attention(maps, batch, weights, shown)
        return list(by_latents.values())

    @torch.no_grad()
    def worth(self, sigma: float) -> Worth:
        """Losses with the first latents only, with one latent left out, and without the core.

        Half of the draws do: the noise is the same for all, and differences are what counts.
        """
        most, draws = self.model.max_latents, self.subject.draws // 2
        alone = [] if self.is_retrofit or most == 1 else spread(0, most - 1)

        def zeros(keys: Iterable[Any]) -> dict[Any, Tensor]:
            return {key: torch.zeros(len(self.subject.images)) for key in keys}

        result = Worth(sigma, zeros(spread(1, most)), zeros(alone), zeros(PARTS))

        def see(where: str, latents: Tensor, num_groups: int) -> None:
            sums = latent_moments(latents, num_groups).cpu()
            result.moments[where] = result.moments.get(where, torch.zeros_like(sums)) + sums

        for batch in self.subject.batches(self.device, draws):
            target = velocity_target(batch.images, batch.noise)

            def loss(n: int, batch: Batch = batch, target: Tensor = target, **more: Any) -> Tensor:
                error = self._predict(batch, sigma, n, **more) - target
                return error.square().flatten(1).mean(1).cpu() / draws

            for n, total in result.first.items():
                with watch_latents(self.model, see) if n == most else nullcontext():
                    total.index_add_(0, batch.rows, loss(n))
            for i, total in result.without.items():
                others = torch.tensor([k for k in range(most) if k != i], device=self.device)
                total.index_add_(0, batch.rows, loss(most - 1, latent_indices=others))
            for part, total in result.without_part.items():
                with leave_out(self.model, part):
                    total.index_add_(0, batch.rows, loss(most))
        return result

    def _predict(self, batch: Batch, sigma: float, num_latents: int, **more: Any) -> Tensor:
        """Velocity (B, C, *space), float32."""
        level = torch.full((len(batch.rows),), sigma, device=self.device)
        x = interpolate(batch.images, batch.noise, level).to(self.model.dtype)
        arguments = {**batch.condition, "num_latents": num_latents, **more}
        return self.model(x, level, **arguments, return_dict=False)[0].float()

    def _per_token(self, error: Tensor) -> Tensor:
        return squares_of_tokens(error, self.grid, self.model).cpu()

    def _add(self, maps: Maps, name: str, batch: Batch, values: Tensor) -> None:
        """Add a batch's maps (B, G, P) to the means of their images and halves."""
        if getattr(maps, name) is None:
            setattr(maps, name, torch.zeros_like(maps.loss))
        share, total = values / (self.subject.draws // 2), getattr(maps, name)
        total.index_put_((batch.halves, batch.rows), share, accumulate=True)

    def _add_attention(self, maps: Maps, batch: Batch, weights: Tensor, shown: int) -> None:
        """Add Read's weights (B * G, H, n, P) of a batch."""
        count, draws = len(self.subject.images), self.subject.draws
        groups = (-1, self.grid.num_groups)
        by_latent = weights.mean(1).unflatten(0, groups).transpose(1, 2).cpu()  # (B, n, G, P)
        if maps.latents is None or maps.shown is None or maps.entropy is None:
            maps.latents = torch.zeros(by_latent.shape[1:])
            maps.shown = torch.zeros(min(shown, count), *by_latent.shape[1:])
            maps.entropy = torch.zeros(by_latent.shape[1])
        self._add(maps, "attention", batch, by_latent.sum(1))
        maps.latents += by_latent.sum(0) / (count * draws)
        is_shown = batch.rows < len(maps.shown)
        maps.shown.index_add_(0, batch.rows[is_shown], by_latent[is_shown] / draws)
        entropy = attention_entropy(weights).mean(1).unflatten(0, groups).mean(1).cpu()  # (B, n)
        maps.entropy += entropy.sum(0) / (count * draws)


def token_grid(model: Any, images: Tensor) -> TokenGrid:
    """Grid and groups of the tokens that Read sees of images (N, C, *space)."""
    grid = model.token_grid(images)
    if isinstance(model, ElasticTransformer):
        return TokenGrid(grid.size, tuple(model.elastic_settings.group))
    return grid


def in_raster_order(maps: Tensor, grid: TokenGrid) -> Tensor:
    """Maps (..., G, P) as they lie on the image, (..., *grid.size)."""
    flat = from_groups(grid, maps.reshape(-1, *maps.shape[-2:], 1))  # (M, N, 1)
    return flat.reshape(*maps.shape[:-2], *grid.size)


def draw_at_budgets(
    pipeline: ElasticPipeline, subject: Subject, num_latents: Sequence[int], steps: int, count: int
) -> dict[int, Tensor]:
    """Samples (count, C, *space) of the first images' conditions at each number of latents.

    All are from the same noise: image i draws from its seed, i and draw 0.
    """
    device = next(pipeline.transformer.parameters()).device
    condition = {name: x[:count].to(device) for name, x in subject.condition.items()}
    samples = {}
    for n in num_latents:
        samples[n] = pipeline.draw(
            condition, condition, num_latents=n, num_inference_steps=steps, output_type="latent",
            generator=[_generator(subject.seed, i, 0) for i in range(count)], return_dict=False,
        )[0].float().cpu()  # fmt: skip
    return samples


def squares_of_tokens(error: Tensor, grid: TokenGrid, model: Any) -> Tensor:
    """Mean square of an error (B, C, *space) in each token, (B, G, P)."""
    tokens = grid.patchify(error, model.patch_size).square().mean(-1)  # (B, N)
    return tokens.unflatten(1, (grid.num_groups, -1))  # (B, G, P)


def spread(first: int, last: int, most: int = MAX_COUNTS) -> list[int]:
    """List the whole numbers from `first` to `last`; of many, `most` of them, evenly."""
    count = min(most, last - first + 1)
    return np.unique(np.linspace(first, last, count).round().astype(int)).tolist()


def _generator(seed: int, *place: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
