"""DiT and ELIT-DiT: one class is the plain diffusion transformer and the elastic one."""

from collections.abc import Sequence

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # diffusers looks it up here on loading
from torch import Tensor, nn

from elit.interface import Read, Write
from elit.interface.initial import init_weights
from elit.layers.transformer import FinalLayer, LabelEmbedding, TimestepEmbedding, TransformerBlock
from elit.models.base import PredictionType
from elit.models.elastic import ElasticMixin, by_budget


class DiT(ElasticMixin, ModelMixin, ConfigMixin):
    """Class-conditional diffusion transformer on images (h, w) or clips (t, h, w).

    With `group` it is elastic (ELIT): `head` blocks on the spatial tokens, a Read into the
    latents of every group, most blocks on those, a Write back, `tail` blocks on the tokens.
    Without, it is the plain DiT of the same blocks. Both name the parameters that they share
    alike. Sizes are in `presets.py`.

    Args:
        sample_size: input size, (t,) h, w, that the model was made for; it takes any other that
            patches and groups divide. One number is a square image.
        in_channels: channels of input and output.
        patch_size: input elements per token along each axis.
        hidden_size: D.
        num_heads: attention heads.
        depth: blocks in all.
        num_classes: classes; a label of `num_classes` is the null label.
        group: tokens of one group along each axis; None makes a plain DiT.
        head: blocks before Read.
        tail: blocks after Write.
        min_latents: fewest latents per group that training keeps, and the default guide's number.
        mlp_ratio: hidden width of the blocks' MLPs, over D.
        rope_theta: base of the rotary wavelengths.
        prediction_type: what the last layer gives: the velocity, or the clean sample.
    """

    _no_split_modules = ["TransformerBlock", "Read", "Write"]
    _repeated_blocks = ["TransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int],
        in_channels: int,
        patch_size: int | Sequence[int],
        hidden_size: int,
        num_heads: int,
        depth: int,
        num_classes: int,
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

        self.patch_embed = nn.Linear(self.patch_dim, hidden_size)
        self.time_embed = TimestepEmbedding(hidden_size)
        self.label_embed = LabelEmbedding(hidden_size, num_classes)
        self.blocks = nn.ModuleList(
            self.block_class(index)(hidden_size, num_heads, mlp_ratio) for index in range(depth)
        )
        sizes = (hidden_size, num_heads, self.max_latents)
        self.read = Read(*sizes) if self.is_elastic else None
        self.write = Write(*sizes) if self.is_elastic else None
        self.project = FinalLayer(hidden_size, self.patch_dim)

        self.apply(init_weights)

    def block_class(self, index: int) -> type[TransformerBlock]:
        """Class of block number `index`: here they are all alike."""
        return TransformerBlock

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: None = None,
        *,
        num_latents: int | Sequence[int] | None = None,
        latent_indices: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity, noise - data.

        Args:
            hidden_states: (B, C, *space), the noisy samples.
            timestep: noise level sigma in [0, 1], (B,) or one number for all.
            class_labels: (B,) labels; None is the null label.
            encoder_hidden_states: of text-conditional models; a DiT takes none.
            num_latents: latents kept per group, `model.resolve_budget(budget)`; None keeps all.
                One number, or one for each sample.
            latent_indices: (num_latents,) latents to keep instead of the first ones, the same in
                all groups (the paper's ablation of tail dropping).
            return_dict: whether to wrap the velocity in a Transformer2DModelOutput.
        """
        grid, levels, num_latents = self.check_inputs(
            hidden_states, timestep, num_latents, latent_indices
        )
        labels = self.check_labels(class_labels, encoder_hidden_states, hidden_states)
        head, core, tail = self.split_blocks(self.blocks)

        tokens = self.patch_embed(grid.patchify(hidden_states, self.patch_size))  # (B, N, D)
        condition = F.silu(self.time_embed(levels) + self.label_embed(labels))  # (B, D)
        rotary = self.rotary(grid, tokens)
        tokens = self.run(head, tokens, condition, rotary)  # (B, N, D)
        if self.read is not None:

            def through_core(n: int, tokens: Tensor, condition: Tensor) -> Tensor:
                rotary = self.rotary(grid, tokens, n)
                latents = self.read(tokens, condition, grid, n, latent_indices)
                latents = self.run(core, latents, condition, rotary)  # (B, G*n, D)
                return self.write(tokens, latents, condition, grid)

            tokens = by_budget(through_core, num_latents, tokens, condition)  # (B, N, D)
        tokens = self.run(tail, tokens, condition, rotary)  # (B, N, D)
        output = grid.unpatchify(self.project(tokens, condition), self.patch_size)
        velocity = self.velocity_of(output, hidden_states, levels)

        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
