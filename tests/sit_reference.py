"""The public SiT and ELIT-SiT format, computed from its formulas alone, in float64.

Under the public keys, tokens in raster order, groups by loops, explicit softmax: no line of it is
shared with the library.
"""

import math

import torch
from torch import Tensor

READ = "input_token_editor.adapters.0."
WRITE = "output_token_editor.adapters.0."


def sincos(side: int, width: int) -> Tensor:
    """(1, N, D) float32: sines and cosines of the column, then of the row."""
    rows = []
    for row in range(side):
        for col in range(side):
            line = []
            for place in (col, row):
                angles = [place * 10000 ** (-k / (width // 4)) for k in range(width // 4)]
                line += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(line)
    return torch.tensor(rows, dtype=torch.float32)[None]


def make_state(
    side: int = 8, patch: int = 2, channels: int = 4, width: int = 64, heads: int = 4,
    depth: int = 6, classes: int = 10, ratio: int = 4, group: int | None = 4, writes: int = 1,
    qk_norm: bool = False, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """A random state dict under the public keys, nothing in it zero."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def add(name: str, *shape: int, std: float | None = None, mean: float = 0.0) -> None:
        std = (
            (1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.2) if std is None else std
        )
        state[name] = mean + std * torch.randn(shape, generator=generator)

    def linear(name: str, out: int, inside: int, bias: bool = True) -> None:
        add(f"{name}.weight", out, inside)
        if bias:
            add(f"{name}.bias", out)

    def cross(name: str) -> None:
        linear(f"{name}.q_proj", width, width)
        linear(f"{name}.kv_proj", 2 * width, width)
        linear(f"{name}.proj", width, width)
        add(f"{name}.q_norm.scale", width, mean=1.0)
        add(f"{name}.k_norm.scale", width, mean=1.0)

    state["pos_embed"] = sincos(side, width)
    add("x_embedder.proj.weight", width, channels, patch, patch)
    add("x_embedder.proj.bias", width)
    linear("t_embedder.mlp.0", width, 256)
    linear("t_embedder.mlp.2", width, width)
    add("y_embedder.embedding_table.weight", classes + 1, width, std=0.5)
    for i in range(depth):
        linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        if qk_norm:
            for norm in ("q_norm", "k_norm"):
                add(f"blocks.{i}.attn.{norm}.weight", width // heads, mean=1.0)
                add(f"blocks.{i}.attn.{norm}.bias", width // heads)
        linear(f"blocks.{i}.attn.proj", width, width)
        linear(f"blocks.{i}.mlp.fc1", ratio * width, width)
        linear(f"blocks.{i}.mlp.fc2", width, ratio * width)
        linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
    linear("final_layer.linear", patch * patch * channels, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    if group:
        for name in ("learned_query_embed", "pos_embed"):
            add(f"{READ}{name}", group * group, width, std=0.5)
        add(f"{READ}latent_pos_embed", 4096, width, std=0.5)
        cross(f"{READ}fit_layer.latents_attend_to_patches.0")
        linear(f"{READ}fit_layer.read_ff.0.fc1", width, width, bias=False)
        linear(f"{READ}fit_layer.read_ff.0.fc2", width, width, bias=False)
        linear(f"{READ}fit_layer.adaLN_modulation.1", 7 * width, width)
        add(f"{WRITE}pos_embed", group * group, width, std=0.5)
        for w in range(writes):
            cross(f"{WRITE}patches_attend_to_latents.{w}")
            linear(f"{WRITE}write_ff.{w}.fc1", width, width, bias=False)
            linear(f"{WRITE}write_ff.{w}.fc2", width, width, bias=False)
    return state


class ReferenceSiT:
    """Plain and elastic SiT on square inputs."""

    def __init__(
        self, state: dict[str, Tensor], heads: int, encoder_depth: int, decoder_depth: int
    ):
        self.weights = {name: value.double() for name, value in state.items()}
        self.heads, self.encoder, self.decoder = heads, encoder_depth, decoder_depth
        self.depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        self.elastic = any(name.startswith(READ) for name in state)

    def linear(self, name: str, x: Tensor) -> Tensor:
        x = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return x if bias is None else x + bias

    def mlp(self, name: str, x: Tensor) -> Tensor:
        x = self.linear(f"{name}.fc1", x)
        x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return self.linear(f"{name}.fc2", x)

    @staticmethod
    def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, norm: str = "") -> Tensor:
        """(B, S, D), (B, T, D) twice; heads one after the other."""
        out, width = [], q.shape[-1] // self.heads
        for head in range(self.heads):
            at = slice(head * width, (head + 1) * width)
            queries, keys = q[..., at], k[..., at]
            if f"{norm}.q_norm.weight" in self.weights:
                queries, keys = (
                    self.norm(x, 1e-5) * self.weights[f"{norm}.{n}_norm.weight"]
                    + self.weights[f"{norm}.{n}_norm.bias"]
                    for n, x in (("q", queries), ("k", keys))
                )
            scores = (queries @ keys.transpose(1, 2) / math.sqrt(width)).exp()
            out.append(scores / scores.sum(-1, keepdim=True) @ v[..., at])
        return torch.cat(out, -1)

    def rms(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.scale"] * x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-5)

    def cross(self, name: str, queries: Tensor, context: Tensor) -> Tensor:
        q = self.rms(f"{name}.q_norm", self.linear(f"{name}.q_proj", queries))
        k, v = self.linear(f"{name}.kv_proj", context).chunk(2, -1)
        return self.linear(f"{name}.proj", self.attend(q, self.rms(f"{name}.k_norm", k), v))

    def block(self, i: int, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.linear(f"blocks.{i}.adaLN_modulation.1", condition)[:, None].chunk(6, -1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        qkv = self.linear(f"blocks.{i}.attn.qkv", self.norm(x) * (1 + scale) + shift)
        update = self.attend(*qkv.chunk(3, -1), norm=f"blocks.{i}.attn")
        x = x + gate * self.linear(f"blocks.{i}.attn.proj", update)
        return x + mlp_gate * self.mlp(
            f"blocks.{i}.mlp", self.norm(x) * (1 + mlp_scale) + mlp_shift
        )

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor, kept: int | None = None) -> Tensor:
        weights = self.weights
        patches = weights["x_embedder.proj.weight"]
        patch, side = patches.shape[-1], x.shape[-1] // patches.shape[-1]
        at = [
            (slice(r * patch, (r + 1) * patch), slice(c * patch, (c + 1) * patch))
            for r in range(side) for c in range(side)
        ]  # fmt: skip
        x = x.double()
        tokens = torch.stack(
            [torch.einsum("dcij,bcij->bd", patches, x[:, :, rows, cols]) for rows, cols in at], 1
        )
        tokens = tokens + weights["x_embedder.proj.bias"] + weights["pos_embed"]
        exponents = -math.log(10000) * torch.arange(128, dtype=torch.float32) / 128
        angles = sigma.float()[:, None] * exponents.exp()
        time = torch.cat((angles.cos(), angles.sin()), -1).double()
        time = self.linear("t_embedder.mlp.0", time)
        time = self.linear("t_embedder.mlp.2", time * time.sigmoid())
        condition = time + weights["y_embedder.embedding_table.weight"][labels]
        condition = condition * condition.sigmoid()

        first_tail = self.depth - self.decoder if self.elastic else 0
        for i in range(self.encoder if self.elastic else 0):
            tokens = self.block(i, tokens, condition)
        if self.elastic:
            tokens = self.interface(tokens, condition, side, kept)
        for i in range(first_tail, self.depth):
            tokens = self.block(i, tokens, condition)

        shift, scale = self.linear("final_layer.adaLN_modulation.1", condition)[:, None].chunk(
            2, -1
        )
        out = self.linear("final_layer.linear", self.norm(tokens) * (1 + scale) + shift)
        velocity = x.new_empty(len(x), out.shape[-1] // patch**2, *x.shape[2:])
        for n, (rows, cols) in enumerate(at):
            pixels = out[:, n].view(len(x), patch, patch, -1)  # channels fastest
            velocity[:, :, rows, cols] = pixels.permute(0, 3, 1, 2)
        return velocity

    def interface(self, tokens: Tensor, condition: Tensor, side: int, kept: int | None) -> Tensor:
        """Read, core on the first `kept` latents of each group, Write."""
        queries = self.weights[f"{READ}learned_query_embed"]
        size = math.isqrt(len(queries))
        groups = [
            [(u + i) * side + v + j for i in range(size) for j in range(size)]
            for u in range(0, side, size) for v in range(0, side, size)
        ]  # fmt: skip
        name = f"{READ}fit_layer"
        parts = self.linear(f"{name}.adaLN_modulation.1", condition)[:, None].chunk(7, -1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, _ = parts
        residual, latents = torch.empty_like(tokens), torch.empty_like(tokens)
        for group in groups:
            inside = tokens[:, group] + self.weights[f"{READ}pos_embed"]
            residual[:, group] = inside
            context = self.norm(inside) * (1 + scale) + shift
            z = queries.expand(len(tokens), -1, -1)
            z = z + gate * self.cross(f"{name}.latents_attend_to_patches.0", z, context)
            z = z + mlp_gate * self.mlp(
                f"{name}.read_ff.0", self.norm(z) * (1 + mlp_scale) + mlp_shift
            )
            latents[:, group] = z
        latents = latents + self.weights[f"{READ}latent_pos_embed"][: side * side]

        alive = sorted(n for group in groups for n in group[:kept])
        core = latents[:, alive]
        for i in range(self.encoder, self.depth - self.decoder):
            core = self.block(i, core, condition)
        latents[:, alive] = core
        writes = {
            name.split(".")[4] for name in self.weights if name.startswith(f"{WRITE}write_ff")
        }
        for group in groups:
            inside = residual[:, group] + self.weights[f"{WRITE}pos_embed"]
            for w in sorted(writes):
                attention = f"{WRITE}patches_attend_to_latents.{w}"
                inside = inside + self.cross(attention, inside, latents[:, group])
                inside = inside + self.mlp(f"{WRITE}write_ff.{w}", inside)
            residual[:, group] = inside
        return residual
