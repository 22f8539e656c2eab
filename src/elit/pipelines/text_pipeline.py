"""Texts to images or clips, at any compute budget."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.models.autoencoders import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from elit.flow.guidance import Budget, Condition, Guidance
from elit.flow.sampling import Generators
from elit.pipelines.arguments import read_guidance
from elit.pipelines.base import ElasticPipeline
from elit.pipelines.text_encoder import check_text_encoder, encode, load_text_encoder, tokens_of


class ElitTextPipeline(ElasticPipeline):
    """Draws images, or clips, of texts with an elastic (or plain) MM-DiT.

    A model with `vocab_size` reads words itself. Another needs a text encoder of transformers:
    give it with its tokenizer, or give its name on the hub (or a folder), and the pipeline loads
    it when it is first needed, and keeps the name alone when it is saved.

    Args:
        transformer: a text-conditional model of ours: `MMDiT`.
        scheduler: a flow-matching scheduler; `elit.make_scheduler` has them by name.
        vae: the autoencoder in whose VAE latents the model works; None for pixels.
        text_encoder: CLIP's, T5's or Qwen's model of transformers.
        tokenizer: its tokenizer.
        text_encoder_name: name on the hub, or folder, of both.
    """

    draws = "texts"
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        text_encoder: Any | None = None,
        tokenizer: Any | None = None,
        text_encoder_name: str | None = None,
    ):
        super().__init__(
            transformer, scheduler, vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(text_encoder_name=text_encoder_name)
        if (text_encoder is None) != (tokenizer is None):
            raise ValueError("text_encoder and tokenizer go together; give both, or neither")
        words = transformer.config.vocab_size
        if words is not None and (text_encoder, text_encoder_name) != (None, None):
            raise ValueError(
                f"this {type(transformer).__name__} reads words itself (vocab_size={words}); "
                f"make the pipeline without a text encoder"
            )
        if text_encoder is not None:
            check_text_encoder(text_encoder, transformer.config)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        budget: float | Sequence[float] = 1.0,
        num_inference_steps: int | None = None,
        guidance: Guidance | str | None = None,
        generator: Generators = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        prompt_embeds: tuple[Condition, Condition] | None = None,
        guidance_scale: float | None = None,
        guide_budget: Budget | None = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image for each text; the arguments not named here are `draw`'s.

        Args:
            prompt: one text or several.
            negative_prompt: what a guide without the text sees: one for all, or one for each.
            prompt_embeds: what `encode_prompt` gave for the prompts and their negative ones,
                (condition, null condition), instead of both.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        if negative_prompt != "" and prompt_embeds is not None:
            raise ValueError(
                "negative_prompt has no effect beside prompt_embeds, which hold it already; "
                "give it to encode_prompt"
            )
        guidance = read_guidance(guidance, guidance_scale, guide_budget)
        reads_negative = guidance is not None and guidance.drop_label
        if negative_prompt != "" and not reads_negative:
            raise ValueError(
                f"negative_prompt has no effect with guidance={guidance}, which has no guide that "
                f"reads it; give CFG(3.0) or CheapCFG(3.0), or leave it out"
            )
        if prompt_embeds is None:
            texts = _texts(prompt, "prompt")
            negative = negative_prompt if reads_negative else texts  # encoded already
            prompt_embeds = self.encode_prompt(texts, negative)
        conditions = _check_embeds(prompt_embeds, self.transformer.config)
        return self.draw(*conditions, budget, num_inference_steps, guidance, generator, **options)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] = "",
        truncate: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The model's conditions of texts and of negative ones, of the same shapes.

        Args:
            prompt: B texts, or one.
            negative_prompt: one text for all, or B.
            truncate: whether to cut texts that are too long, instead of raising a ValueError.
        """
        texts = _texts(prompt, "prompt")
        negative = _texts(negative_prompt, "negative_prompt")
        if len(negative) not in (1, len(texts)):
            raise ValueError(
                f"{len(negative)} negative prompts for {len(texts)} prompts; "
                f"give one for all, or one for each"
            )
        negative = negative * len(texts) if len(negative) == 1 else negative
        config = self.transformer.config
        if config.vocab_size is None:
            self.load_text_encoder()
        both = encode(
            [*texts, *negative], config, self.tokenizer, self.text_encoder, truncate=truncate,
            device=self._execution_device,
        )  # fmt: skip
        halves = {name: value.split(len(texts)) for name, value in both.items()}
        condition = {name: half[0] for name, half in halves.items()}
        return condition, {name: half[1] for name, half in halves.items()}

    def check_prompt(self, prompt: str | Sequence[str]) -> int:
        """Tokens of the longest text, or a ValueError if it is too long; encodes nothing."""
        if self.transformer.config.vocab_size is None:
            self.load_text_encoder()
        tokens = tokens_of(
            _texts(prompt, "prompt"), self.transformer.config, self.tokenizer, self.text_encoder
        )
        return max(1, *map(len, tokens))

    def load_text_encoder(self) -> None:
        """Load the text encoder that the pipeline only has the name of."""
        if self.text_encoder is not None:
            return
        if self.config.text_encoder_name is None:
            raise ValueError(
                "this pipeline has no text encoder; make it with text_encoder= and tokenizer=, or "
                "with text_encoder_name='openai/clip-vit-large-patch14' or another"
            )
        name, dtype = self.config.text_encoder_name, self.transformer.dtype
        tokenizer, text_encoder = load_text_encoder(name, dtype)
        check_text_encoder(text_encoder, self.transformer.config)
        text_encoder.to(self._execution_device)
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Save as diffusers does; a text encoder that has a name stays out of the folder."""
        parts = self.tokenizer, self.text_encoder
        if self.config.text_encoder_name is not None:
            self.register_modules(tokenizer=None, text_encoder=None)
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.register_modules(tokenizer=parts[0], text_encoder=parts[1])


def _texts(value: Any, name: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    is_list = isinstance(texts, Sequence) and len(texts) > 0
    if not is_list or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} {value!r} is no text; give a str, or a list of one or more")
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{name} {text!r} is no valid Unicode; was it UTF-8 before?")
    return list(texts)


def _check_embeds(embeds: Any, model_config: Any) -> tuple[Condition, Condition]:
    """`prompt_embeds`, or a ValueError if it is not what `encode_prompt` gives."""
    states, *_ = known = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"
    is_pair = isinstance(embeds, Sequence) and len(embeds) == 2
    if not is_pair or not all(isinstance(one, Mapping) and states in one for one in embeds):
        raise ValueError(
            f"prompt_embeds is {embeds!r:.60}; give what encode_prompt returned: (condition, null "
            f"condition), each a dict with {states}"
        )
    # A mask of None hides nothing.
    pair = [{name: x for name, x in one.items() if x is not None} for one in embeds]
    for name, x in (item for one in pair for item in one.items()):
        if name not in known or not isinstance(x, Tensor) or not x.ndim:
            raise ValueError(
                f"prompt_embeds has {name}={x!r:.60}; give tensors, named {', '.join(known)}"
            )
    shapes = [{name: tuple(value.shape) for name, value in one.items()} for one in pair]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"prompt_embeds of shapes {shapes[0]} and {shapes[1]} differ; encode both in one call "
            f"of encode_prompt"
        )
    size = model_config.vocab_size
    numbers = [one[states] for one in pair] if size is not None else []
    if any(x.numel() and not 0 <= int(x.min()) <= int(x.max()) < size for x in numbers):
        raise ValueError(f"prompt_embeds has numbers of words outside 0..{size - 1}")
    return pair[0], pair[1]
