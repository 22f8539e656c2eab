"""MM-DiT and ELIT-MM-DiT: text to image, or clip, with a stream of its own for each."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # diffusers looks it up here on loading
from torch import Tensor, nn

from elit._numbers import MOST, is_whole
from elit.interface import Read, TokenGrid, Write
from elit.layers.block import FinalLayer
from elit.layers.embeddings import TimestepEmbedding
from elit.layers.initialisation import init_weights
from elit.layers.joint import JointBlock
from elit.layers.positions import Rotary
from elit.layers.text import WordEncoder
from elit.models.elastic import ElasticMixin, check_range


class MMDiT(ElasticMixin, ModelMixin, ConfigMixin):
    """Text-conditional diffusion transformer on images (h, w) or clips (t, h, w).

    Text and image have their own weights and attend as one sequence. With `group` it is elastic
    (ELIT): only the image stream goes through Read and Write; the text stays whole in the core.

    Its text is what a text encoder made of it, with `text_dim`; or, with `vocab_size`, numbers of
    words, which an encoder inside the model embeds and which is trained along with it.

    Args:
        sample_size: input size, (t,) h, w, that the model was made for; it takes any other that
            patches and groups divide. One number is a square image.
        in_channels: channels of input and output.
        patch_size: input elements per token along each axis.
        hidden_size: D.
        num_heads: attention heads.
        depth: blocks in all.
        max_text_length: most tokens of a text.
        text_dim: width of a text encoder's states.
        vocab_size: numbers that words may have, instead of `text_dim`.
        pooled_dim: width of a vector that stands for the whole text, such as CLIP's; None for none.
        group: tokens of one group along each axis; None makes a plain MM-DiT.
        head: blocks before Read.
        tail: blocks after Write.
        min_latents: fewest latents per group that training keeps, and the default guide's number.
        mlp_ratio: hidden width of the blocks' MLPs, over D.
        rope_theta: base of the rotary wavelengths.
    """

    takes_text = True

    _supports_gradient_checkpointing = True
    _no_split_modules = ["JointBlock", "TextBlock", "Read", "Write"]
    _repeated_blocks = ["JointBlock"]
    _skip_layerwise_casting_patterns = ["embed", "norm", "modulation", "project"]

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
    ):
        super().__init__()
        self.set_geometry(sample_size, in_channels, patch_size, group, min_latents)
        self.set_split(depth, head, tail)
        self.set_rotary(hidden_size, num_heads, rope_theta)
        if (text_dim is None) == (vocab_size is None):
            raise ValueError(
                f"text_dim={text_dim} and vocab_size={vocab_size}: give one of them, text_dim for "
                f"the states of a text encoder, vocab_size for words"
            )
        for name, value in (
            ("max_text_length", max_text_length),
            ("text_dim", text_dim),
            ("pooled_dim", pooled_dim),
        ):
            optional = name != "max_text_length"
            if not is_whole(value) and not (optional and value is None):
                raise ValueError(
                    f"{name}={value!r} is not allowed; give a whole number from 1 to {MOST}"
                )

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
        if self.is_elastic:
            self.read = Read(hidden_size, num_heads, self.max_latents)
            self.write = Write(hidden_size, num_heads, self.max_latents)
        self.project = FinalLayer(hidden_size, self.patch_dim)

        self.gradient_checkpointing = False
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
        num_latents: int | None = None,
        latent_indices: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity, noise - data.

        Args:
            hidden_states: (B, C, *space), the noisy samples.
            timestep: noise level sigma in [0, 1], (B,) or one number for all.
            class_labels: of class-conditional models; an MM-DiT takes none.
            encoder_hidden_states: text, (B, S, text_dim), or (B, S) int64 numbers of words.
            encoder_attention_mask: (B, S) bool, False for padding; None has no padding.
            pooled_projections: (B, pooled_dim), where the model has one.
            num_latents: latents kept per group, `model.resolve_budget(budget)`; None keeps all.
            latent_indices: (num_latents,) latents to keep instead of the first ones.
            return_dict: whether to wrap the velocity in a Transformer2DModelOutput.
        """
        self.check_input(hidden_states)
        mask = encoder_attention_mask
        text = self.check_text(
            class_labels, encoder_hidden_states, mask, pooled_projections, hidden_states
        )
        num_latents = self.check_num_latents(num_latents, latent_indices)
        head, core, tail = self.split_blocks(self.blocks)
        grid = self.token_grid(hidden_states)

        tokens = self.patch_embed(grid.patchify(hidden_states, self.patch_size))  # (B, N, D)
        text = self.embed_text(text, mask)  # (B, S, D)
        condition = self.embed_condition(timestep, pooled_projections, hidden_states)  # (B, D)
        rotary = self.rotary(grid.token_places(tokens.device))
        of_text = self.rotary(self.text_places(grid, text)), mask
        tokens, text = self.run_joint(head, tokens, text, condition, rotary, *of_text)
        if self.is_elastic:
            core_rotary = self.rotary(grid.latent_places(num_latents, tokens.device))
            latents = self.read(tokens, condition, grid, num_latents, latent_indices)
            latents, text = self.run_joint(core, latents, text, condition, core_rotary, *of_text)
            tokens = self.write(tokens, latents, condition, grid)  # (B, N, D)
        tokens, _ = self.run_joint(tail, tokens, text, condition, rotary, *of_text)  # (B, N, D)
        velocity = grid.unpatchify(self.project(tokens, condition), self.patch_size)

        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def embed_text(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """Text in the model's width, (B, S, D)."""
        if self.config.vocab_size is not None:
            return self.text_embed(text, mask)
        if mask is not None:  # weight 0 times infinity would be NaN
            text = text.masked_fill(~mask[..., None], 0)
        return self.text_embed(text.to(self.dtype))

    def embed_condition(self, timestep: Tensor, pooled: Tensor | None, like: Tensor) -> Tensor:
        """Condition (B, D) of all modulations, its nonlinearity applied once for all layers."""
        condition = self.time_embed(self.noise_levels(timestep, like))
        if pooled is not None:
            condition = condition + self.pooled_embed(pooled.to(self.dtype))
        return F.silu(condition)

    def text_places(self, grid: TokenGrid, text: Tensor) -> Tensor:
        """Places of a text's tokens, (S, axes): on the grid's diagonal, behind its last corner."""
        numbers = torch.arange(text.shape[1], device=text.device, dtype=torch.float32)
        return (max(grid.size) + numbers)[:, None].expand(-1, len(grid.size))

    def run_joint(
        self,
        blocks: Iterable[nn.Module],
        x: Tensor,
        text: Tensor,
        condition: Tensor,
        rotary: Rotary,
        text_rotary: Rotary,
        text_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
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

    def check_text(
        self,
        class_labels: Tensor | None,
        text: Tensor | None,
        mask: Tensor | None,
        pooled: Tensor | None,
        like: Tensor,
    ) -> Tensor:
        """The text, or a ValueError if it is not one that the model takes."""
        width, longest = self.config.text_dim, self.config.max_text_length
        batch, device = len(like), like.device
        if class_labels is not None or text is None:
            raise ValueError(
                "an MMDiT takes encoder_hidden_states, not class_labels; give it a text, as "
                "ElitTextPipeline.encode_prompt makes it"
            )
        wanted = f"({batch}, up to {longest}" + (")" if width is None else f", {width})")
        for name, value in (
            ("encoder_hidden_states", text),
            ("encoder_attention_mask", mask),
            ("pooled_projections", pooled),
        ):
            if value is not None and not isinstance(value, Tensor):
                raise ValueError(f"{name} {value!r:.60} are no tensor; a text is {wanted}")
            if value is not None and value.device != device:
                raise ValueError(
                    f"{name} on {value.device}, but the samples are on {device}; move one"
                )
        shape, axes = tuple(text.shape), 2 if width is None else 3
        if len(shape) != axes or shape[0] != batch or (width is not None and shape[2] != width):
            raise ValueError(f"a text of shape {shape} does not fit; this model takes {wanted}")
        if shape[1] > longest:
            raise ValueError(
                f"a text of {shape[1]} tokens is too long; this model takes {longest} at most"
            )
        if width is None and text.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"a text of {text.dtype}; this model takes numbers of words, int64")
        if width is None:
            check_range(text, 0, self.config.vocab_size - 1, "word", "see the tokenizer's size")
        elif not text.is_floating_point():
            raise ValueError(
                f"a text of {text.dtype}; this model takes states of an encoder, floats"
            )
        if mask is not None and (mask.shape != shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"encoder_attention_mask of {tuple(mask.shape)} {mask.dtype} does not fit a text "
                f"of {shape}; give {shape[:2]} bool, False for padding"
            )
        size = self.config.pooled_dim
        found = None if pooled is None else tuple(pooled.shape)
        if found != (None if size is None else (batch, size)):
            raise ValueError(
                f"pooled_projections of shape {found} do not fit; this model takes "
                f"{'none' if size is None else (batch, size)}"
            )
        return text

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
