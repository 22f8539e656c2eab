"""What the tests share: tiny models whose every weight counts, and an independent DiT.

`ReferenceDiT` computes what the docstrings and the paper say, in float64 and from the state dict
alone: tokens in raster order, groups by loops, explicit softmax, rotary positions as complex
numbers. It shares no line with the library and is slow; it is what a plain and an elastic model
must agree with.
"""

import itertools
import math
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elit import create_model
from elit.models.dit import DiT

TINY = {
    "sample_size": 8,
    "in_channels": 2,
    "patch_size": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 3,
    "num_classes": 3,
}
TINY_ELASTIC = TINY | {"patch_size": 1, "group": 4, "head": 1, "tail": 1}


def randomise(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Fills every parameter with normal noise, so that no gate is closed; weights of norms near 1.

    A parameter's values hang on its name and shape alone: two models that differ in one setting
    have the same weights wherever the shapes agree.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if "norm" in name:
                parameter += 1
            if name == "skip_weight":  # HDiT's: at 0 its inner level would not count
                parameter.fill_(0.7)
    return model.eval()


def tiny_dit(**changes) -> DiT:
    """A plain DiT of 8x8 inputs and 4x4 tokens, every parameter random."""
    return randomise(DiT(**TINY | changes))


def tiny_elastic(**changes) -> DiT:
    """An elastic DiT of 8x8 inputs, 8x8 tokens in four groups of 16, every parameter random."""
    return randomise(DiT(**TINY_ELASTIC | changes))


ELASTIC = {
    "dit": lambda: tiny_elastic(depth=5),
    "sit": lambda: randomise(create_model("elit-sit-tiny/2", hidden_size=32, num_heads=2)),
    "hdit": lambda: randomise(create_model("elit-hdit-tiny/2", hidden_size=32, num_heads=4)),
    "uvit": lambda: randomise(create_model("elit-uvit-tiny/2", hidden_size=32, num_heads=2)),
    "mmdit": lambda: randomise(create_model("elit-mmdit-tiny/2", hidden_size=32, num_heads=2)),
    "clips": lambda: tiny_elastic(sample_size=(2, 4, 8), group=(1, 2, 2), hidden_size=36),
}
"""Small elastic models, one of each backbone."""


def make_inputs(model: nn.Module, batch: int = 2, size: tuple[int, ...] | None = None) -> tuple:
    """(samples, noise levels, labels) of a model; the labels run over all, the null one first.

    Of a model of texts (samples, noise levels, None, texts).
    """
    generator = torch.Generator().manual_seed(1)
    shape = (batch, model.config.in_channels, *(size or model.sample_size))
    samples = torch.randn(shape, generator=generator)
    levels = torch.linspace(0.2, 0.9, batch)
    if model.takes_text:
        config, length = model.config, model.config.max_text_length
        if config.vocab_size is not None:
            texts = config.vocab_size - 1 - torch.arange(batch * length) % config.vocab_size
            texts = texts.view(batch, length)
        else:
            texts = torch.randn(batch, length, config.text_dim, generator=generator)
        return samples, levels, None, texts
    labels = model.config.num_classes - torch.arange(batch) % (model.config.num_classes + 1)
    return samples, levels, labels


def make_generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class ReferenceDiT:
    """Plain and elastic DiT in float64, written from the formulas."""

    def __init__(self, model: DiT):
        self.weights = {name: value.double() for name, value in model.state_dict().items()}
        self.config = model.config
        self.axes = len(model.sample_size)
        self.patch = model.patch_size
        self.group = model.group
        self.heads = model.config.num_heads
        self.dim = model.config.hidden_size
        self.seen: dict[str, list[Tensor]] = {}  # weights of each attention, group by group

    # ---- parts ----

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def mlp(self, name: str, x: Tensor) -> Tensor:
        x = self.linear(f"{name}.0", x)
        x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return self.linear(f"{name}.2", x)

    @staticmethod
    def norm(x: Tensor) -> Tensor:
        variance = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-6)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, H, S, d)."""
        parts = x.split(self.dim // self.heads, dim=-1)
        return torch.stack(parts, dim=1)

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * self.weights[f"{name}.weight"]

    def rotate(self, x: Tensor, places: Tensor) -> Tensor:
        """Feature i and i + d/2 are one complex number, turned by place times frequency."""
        pairs = x.shape[-1] // 2
        frequencies, axis_of = [], []
        for axis in range(self.axes):
            count = pairs // self.axes + (1 if self.axes - axis <= pairs % self.axes else 0)
            frequencies += [self.config.rope_theta ** (-k / count) for k in range(count)]
            axis_of += [axis] * count
        angles = places[:, axis_of] * torch.tensor(frequencies, dtype=torch.float64)
        turned = torch.complex(x[..., :pairs], x[..., pairs:]) * torch.exp(1j * angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, places: Tensor | None) -> Tensor:
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        q, k = self.rms_norm(f"{name}.q_norm", q), self.rms_norm(f"{name}.k_norm", k)
        if places is not None:
            q, k = self.rotate(q, places), self.rotate(k, places)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        self.seen.setdefault(name, []).append(weights)
        out = torch.einsum("bhij,bhjd->bhid", weights, v)
        return self.linear(f"{name}.to_out", torch.cat(out.unbind(1), dim=-1))

    def modulation(self, name: str, condition: Tensor, number: int) -> list[Tensor]:
        return [c[:, None] for c in self.linear(name, condition).chunk(number, dim=-1)]

    def block(self, index: int, x: Tensor, condition: Tensor, places: Tensor) -> Tensor:
        name = f"blocks.{index}"
        mods = self.modulation(f"{name}.modulation.linear", condition, 6)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mods
        qkv = self.linear(f"{name}.attention.to_qkv", self.norm(x) * (1 + scale) + shift)
        x = x + gate * self.attend(f"{name}.attention", *qkv.chunk(3, dim=-1), places)
        return x + mlp_gate * self.mlp(f"{name}.mlp", self.norm(x) * (1 + mlp_scale) + mlp_shift)

    # ---- the latent interface ----

    def groups(self, size: tuple[int, ...]) -> list[list[int]]:
        """Raster indices of each group's tokens."""
        members: dict[tuple, list[int]] = {}
        for index, place in enumerate(itertools.product(*map(range, size))):
            corner = tuple(p // g for p, g in zip(place, self.group, strict=True))
            members.setdefault(corner, []).append(index)
        return [members[corner] for corner in sorted(members)]

    def read(self, tokens: Tensor, condition: Tensor, groups: list, num_latents: int) -> Tensor:
        shift, scale, gate = self.modulation("read.modulation.linear", condition, 3)
        latents = self.weights["read.latents"][:num_latents].expand(len(tokens), -1, -1)
        index = self.weights["read.latent_index"][:num_latents]
        query = self.linear("read.attention.to_q", self.norm(latents))
        read = []
        for members in groups:
            inside = self.norm(tokens[:, members]) * (1 + scale) + shift
            inside = inside + self.weights["read.token_place"]
            key, value = self.linear("read.attention.to_kv", inside).chunk(2, dim=-1)
            update = self.attend("read.attention", query, key, value, None)
            kept = latents + index + gate * update
            update = self.mlp("read.mlp", self.norm(kept) * (1 + scale) + shift)
            read.append(kept + gate * update)
        return torch.cat(read, dim=1)

    def write(self, tokens: Tensor, latents: Tensor, condition: Tensor, groups: list) -> Tensor:
        shift, scale, gate = self.modulation("write.modulation.linear", condition, 3)
        written = tokens.clone()
        for members, kept in zip(groups, latents.chunk(len(groups), dim=1), strict=True):
            place = self.weights["write.token_place"]
            inside = tokens[:, members]
            key, value = self.linear("write.attention.to_kv", self.norm(kept)).chunk(2, dim=-1)
            query = self.norm(inside) * (1 + scale) + shift + place
            query = self.linear("write.attention.to_q", query)
            inside = inside + gate * self.attend("write.attention", query, key, value, None)
            update = self.mlp("write.mlp", self.norm(inside) * (1 + scale) + shift + place)
            written[:, members] = inside + gate * update
        return written

    # ---- the model ----

    def patches(self, x: Tensor) -> list[tuple[slice, ...]]:
        """Where each token's patch lies, in raster order."""
        counts = [n // p for n, p in zip(x.shape[2:], self.patch, strict=True)]
        return [
            tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, self.patch, strict=True))
            for place in itertools.product(*map(range, counts))
        ]

    def condition(self, sigma: Tensor, labels: Tensor) -> Tensor:
        frequencies = 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        angles = 1000 * sigma.double()[:, None] * frequencies
        time = self.linear("time_embed.linear_in", torch.cat((angles.cos(), angles.sin()), dim=-1))
        time = self.linear("time_embed.linear_out", time * torch.sigmoid(time))
        total = time + self.weights["label_embed.table.weight"][labels]
        return total * torch.sigmoid(total)

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor, num_latents: int = 0) -> Tensor:
        x, self.seen = x.double(), {}
        patches = self.patches(x)
        size = tuple(n // p for n, p in zip(x.shape[2:], self.patch, strict=True))
        places = torch.tensor(list(itertools.product(*map(range, size))), dtype=torch.float64)
        condition = self.condition(sigma, labels)

        tokens = torch.stack([x[(..., *patch)].flatten(1) for patch in patches], dim=1)
        tokens = self.linear("patch_embed", tokens)
        depth, tail = self.config.depth, self.config.depth - self.config.tail
        for index in range(self.config.head if self.group else 0):
            tokens = self.block(index, tokens, condition, places)
        if self.group:
            groups = self.groups(size)
            centres = torch.cat([places[g].mean(0, keepdim=True) for g in groups])
            latents = self.read(tokens, condition, groups, num_latents)
            for index in range(self.config.head, tail):
                centre = centres.repeat_interleave(num_latents, 0)
                latents = self.block(index, latents, condition, centre)
            tokens = self.write(tokens, latents, condition, groups)
        for index in range(tail if self.group else 0, depth):
            tokens = self.block(index, tokens, condition, places)

        shift, scale = self.modulation("project.modulation", condition, 2)
        out = self.linear("project.linear", self.norm(tokens) * (1 + scale) + shift)
        velocity = torch.empty_like(x)
        for i, patch in enumerate(patches):
            inside = velocity[(..., *patch)]
            velocity[(..., *patch)] = out[:, i].reshape(inside.shape)
        if self.config.get("prediction_type") == "sample":
            velocity = (x - velocity) / sigma.double().clamp(min=0.05).view(
                -1, *(1,) * self.axes, 1
            )
        return velocity


def refuses(message: str, call: Callable[..., Any], /, *args: Any, **options: Any) -> None:
    """Check that a call is a user's mistake, by what it says."""
    with pytest.raises(ValueError, match=message):
        call(*args, **options)
