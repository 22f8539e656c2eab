"""MM-DiT and ELIT-MM-DiT: text to image, or clip, with a stream of its own for each."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # diffusers looks it up here on loading
from torch import Tensor, nn

from elit._numbers import MOST, check_whole
from elit.interface import Read, TokenGrid, Write
from elit.interface.initial import init_weights, zero_
from elit.layers.sizes import head_dim
from elit.layers.text import WordEncoder
from elit.layers.transformer import (
    FinalLayer,
    HeadNorm,
    Rotary,
    TimestepEmbedding,
    TransformerBlock,
    attend,
    modulate,
    rotary_embedding,
    rotate,
)
from elit.models.base import PredictionType
from elit.models.checks import check_text
from elit.models.elastic import ElasticMixin, by_budget

_ANY = f"a whole number from 1 to {MOST}"


class MMDiT(ElasticMixin, ModelMixin, ConfigMixin):
    """Text-conditional diffusion transformer on images (h, w) or clips (t, h, w).

    Text and image have their own weights and attend as one sequence. With `group` it is elastic
    (ELIT): only the image stream goes through Read and Write; the text stays whole in the core.

    Its text is what a text encoder made of it, with `text_dim`; or, with `vocab_size`, numbers of
    words, which an encoder inside the model embeds and which is trained along with it.

    Args, beside those of a `DiT`:
        max_text_length: most tokens of a text.
        text_dim: width of a text encoder's states.
        vocab_size: numbers that words may have, instead of `text_dim`.
        pooled_dim: width of a vector that stands for the whole text, such as CLIP's; None for none.
    """

    takes_text = True

    _no_split_modules = ["JointBlock", "TextBlock", "Read", "Write"]
    _repeated_blocks = ["JointBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int],
        in_channels: int,
        patch_size: int | Sequence[int],
        hidden_size: int,
        num_heads: int,
        depth: int,
        max_text_length: int,
        text_dim: int | None = None,
        vocab_size: int | None = None,
        pooled_dim: int | None = None,
        group: int | Sequence[int] | None = None,
        head: int = 0,
        tail: int = 0,
        min_latents: int = 1,
        mlp_ratio: float = 4.0,
        rope_theta: float = 10_000.0,
        prediction_type: PredictionType = "velocity",
    ):
        super().__init__()
        self.set_geometry()
        if (text_dim is None) == (vocab_size is None):
            raise ValueError(
                f"text_dim={text_dim} and vocab_size={vocab_size}: give one of them, text_dim for "
                f"the states of a text encoder, vocab_size for words"
            )
        check_whole(max_text_length, "max_text_length", advice=_ANY)
        for name, value in (("text_dim", text_dim), ("pooled_dim", pooled_dim)):
            if value is not None:
                check_whole(value, name, advice=_ANY)

        self.patch_embed = nn.Linear(self.patch_dim, hidden_size)
        self.text_embed: nn.Module
        if text_dim is not None:
            norm = nn.RMSNorm(text_dim, eps=1e-6)
            self.text_embed = nn.Sequential(norm, nn.Linear(text_dim, hidden_size))
        else:
            self.text_embed = WordEncoder(hidden_size, num_heads, vocab_size, mlp_ratio, rope_theta)
        self.time_embed = TimestepEmbedding(hidden_size)
        if pooled_dim is not None:
            self.pooled_embed = nn.Sequential(
                nn.Linear(pooled_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
            )
        self.blocks = nn.ModuleList(
            JointBlock(hidden_size, num_heads, mlp_ratio, is_last=index == depth - 1)
            for index in range(depth)
        )
        sizes = (hidden_size, num_heads, self.max_latents)
        self.read = Read(*sizes) if self.is_elastic else None
        self.write = Write(*sizes) if self.is_elastic else None
        self.project = FinalLayer(hidden_size, self.patch_dim)

        self.apply(init_weights)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: None = None,
        encoder_hidden_states: Tensor | None = None,
        *,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        num_latents: int | Sequence[int] | None = None,
        latent_indices: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity, noise - data.

        Args:
            hidden_states, timestep, num_latents, latent_indices, return_dict: as `DiT.forward`.
            class_labels: of class-conditional models; an MM-DiT takes none.
            encoder_hidden_states: text, (B, S, text_dim), or (B, S) int64 numbers of words.
            encoder_attention_mask: (B, S) bool, False for padding; None has no padding.
            pooled_projections: (B, pooled_dim), where the model has one.
        """
        grid, levels, num_latents = self.check_inputs(
            hidden_states, timestep, num_latents, latent_indices
        )
        mask = encoder_attention_mask
        text = check_text(
            encoder_hidden_states if class_labels is None else None, mask, pooled_projections,
            self.config, hidden_states,
        )  # fmt: skip
        head, core, tail = self.split_blocks(self.blocks)

        tokens = self.patch_embed(grid.patchify(hidden_states, self.patch_size))  # (B, N, D)
        text = self.embed_text(text, mask)  # (B, S, D)
        condition = self.embed_condition(levels, pooled_projections)  # (B, D)
        rotary = self.rotary(grid, tokens)
        text_rotary = rotary_embedding(self.text_places(grid, text), *self.rotary_options)
        of_text = text_rotary, mask
        tokens, text = self.run_joint(head, tokens, text, condition, rotary, *of_text)
        if self.read is not None:

            def through_core(
                n: int, tokens: Tensor, text: Tensor, condition: Tensor, mask: Tensor | None
            ) -> tuple[Tensor, Tensor]:
                rotaries = self.rotary(grid, tokens, n), text_rotary
                latents = self.read(tokens, condition, grid, n, latent_indices)  # (B, G*n, D)
                latents, text = self.run_joint(core, latents, text, condition, *rotaries, mask)
                return self.write(tokens, latents, condition, grid), text

            streams = tokens, text, condition, mask
            tokens, text = by_budget(through_core, num_latents, *streams)
        tokens, _ = self.run_joint(tail, tokens, text, condition, rotary, *of_text)  # (B, N, D)
        output = grid.unpatchify(self.project(tokens, condition), self.patch_size)
        velocity = self.velocity_of(output, hidden_states, levels)

        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def embed_text(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """Text in the model's width, (B, S, D)."""
        if self.config.vocab_size is not None:
            return self.text_embed(text, mask)
        if mask is not None:  # weight 0 times infinity would be NaN
            text = text.masked_fill(~mask[..., None], 0)
        return self.text_embed(text.to(self.dtype))

    def embed_condition(self, levels: Tensor, pooled: Tensor | None) -> Tensor:
        """Condition (B, D) of all modulations, its nonlinearity applied once for all layers."""
        condition = self.time_embed(levels)
        if pooled is not None:
            condition = condition + self.pooled_embed(pooled.to(self.dtype))
        return F.silu(condition)

    def text_places(self, grid: TokenGrid, text: Tensor) -> Tensor:
        """Places of a text's tokens, (S, axes): on the grid's diagonal, behind its last corner."""
        numbers = torch.arange(text.shape[1], device=text.device, dtype=torch.float32)
        return (max(grid.size) + numbers)[:, None].expand(-1, len(grid.size))

    def run_joint(
        self, blocks: Iterable[nn.Module], x: Tensor, text: Tensor, condition: Tensor,
        rotary: Rotary, text_rotary: Rotary, text_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Run blocks on both streams, checkpointed where that is switched on."""
        mask = None
        if text_mask is not None:
            mask = torch.cat((text_mask, text_mask.new_ones(x.shape[:2])), dim=1)  # (B, S + N)
        for block in blocks:
            args = (x, text, condition, rotary, text_rotary, mask)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x, text = self._gradient_checkpointing_func(block, *args)
            else:
                x, text = block(*args)
        return x, text

    def example_condition(self, batch_size: int) -> dict[str, Tensor]:
        config, length = self.config, self.config.max_text_length
        if config.vocab_size is not None:
            text = torch.arange(batch_size * length).view(batch_size, -1) % config.vocab_size
        else:
            text = torch.zeros(batch_size, length, config.text_dim)
        condition = {"encoder_hidden_states": text}
        if config.pooled_dim is not None:
            condition["pooled_projections"] = torch.zeros(batch_size, config.pooled_dim)
        return condition


class JointBlock(nn.Module):
    """A transformer block for the image stream and one for the text, which attend as one sequence.

    Behind the last block nobody asks for the text: there it only offers keys and values.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, is_last: bool = False):
        super().__init__()
        self.image = TransformerBlock(dim, num_heads, mlp_ratio)
        self.text: TransformerBlock | TextContext = (
            TextContext(dim, num_heads) if is_last else TransformerBlock(dim, num_heads, mlp_ratio)
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        condition: Tensor,
        rotary: Rotary,
        text_rotary: Rotary,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run both streams; the last block leaves the text as it was.

        Args:
            hidden_states: (B, N, D), spatial tokens or latents; `rotary` is theirs.
            encoder_hidden_states: (B, S, D), text; `text_rotary` is its.
            condition: (B, D).
            mask: (B, S + N) bool, False for padding; the text comes first. None shows all.
        """
        image, text = hidden_states, encoder_hidden_states
        image_mod = attention, _ = self.image.modulation(condition)
        x = modulate(image, attention.shift, attention.scale)
        q, k, v = self.image.attention.project(x, rotary)  # (B, N, H, d) each
        if isinstance(self.text, TextContext):
            text_k, text_v = self.text(text, condition, text_rotary)  # (B, S, H, d) each
            update = attend(q, torch.cat((text_k, k), 1), torch.cat((text_v, v), 1), mask)
            return self.image.take_in(image, self.image.attention.to_out(update), *image_mod), text

        text_mod = attention, _ = self.text.modulation(condition)
        x = modulate(text, attention.shift, attention.scale)
        text_q, text_k, text_v = self.text.attention.project(x, text_rotary)  # (B, S, H, d) each
        q, k, v = (torch.cat(p, 1) for p in ((text_q, q), (text_k, k), (text_v, v)))
        update = attend(q, k, v, mask)  # (B, S + N, D)
        text_update, update = update.split((text.shape[1], image.shape[1]), dim=1)
        image = self.image.take_in(image, self.image.attention.to_out(update), *image_mod)
        text = self.text.take_in(text, self.text.attention.to_out(text_update), *text_mod)
        return image, text


class TextContext(nn.Module):
    """Keys and values of a text that is read for the last time."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.heads = (num_heads, head_dim(dim, num_heads))
        self.modulation = nn.Linear(dim, 2 * dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.k_norm = HeadNorm(self.heads[1], eps=1e-6)

    def reset_parameters(self) -> None:
        """Start without modulation."""
        zero_(self.modulation)

    def forward(self, text: Tensor, condition: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """(B, S, D), (B, D) and the text's rotation -> 2 x (B, S, H, d)."""
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)  # (B, 1, D)
        k, v = self.to_kv(modulate(text, shift, scale)).unflatten(-1, (2, *self.heads)).unbind(2)
        return rotate(self.k_norm(k), rotary).to(v.dtype), v
