"""Texts to what an MM-DiT reads: by transformers' encoders, loaded by name, or as plain words."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from elit._files import typed_path
from elit._transformers import load_frozen, loading
from elit.layers.text import pad, tokenize

logger = logging.getLogger(__name__)

# model_type of a transformers config: class of its encoder.
ENCODERS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "qwen2_5_vl": "Qwen2_5_VLModel",
}


def load_text_encoder(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Tokenizer and frozen text encoder of transformers, by name on the hub or folder."""
    name = typed_path(name)
    with _loading(name) as transformers:
        kind = _encoder_class(transformers, transformers.AutoConfig.from_pretrained(name))
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return tokenizer, load_frozen(kind, name, dtype)


def encoder_settings(name: str) -> dict[str, Any]:
    """Arguments of a model that reads an encoder's states; looks at the encoder's config alone."""
    name = typed_path(name)
    with _loading(name) as transformers:
        config = transformers.AutoConfig.from_pretrained(name)
        kind, width = _encoder_class(transformers, config), text_width(config)
    # CLIP has a vector for the whole text
    pooled = width if "CLIP" in kind.__name__ else None
    return {"vocab_size": None, "text_dim": width, "pooled_dim": pooled}


def _loading(name: str) -> AbstractContextManager[Any]:
    advice = "give a folder, or a name on the hub such as openai/clip-vit-large-patch14"
    return loading(f"the text encoder {name!r}", "", f"{advice} or google/t5-v1_1-xxl")


def _encoder_class(transformers: Any, encoder_config: Any) -> Any:
    kind = encoder_config.model_type
    if kind not in ENCODERS:
        raise ValueError(f"its model type {kind!r} is none of {', '.join(ENCODERS)}")
    return getattr(transformers, ENCODERS[kind])


def text_width(encoder_config: Any) -> int:
    """Width of an encoder's states."""
    return encoder_config.get_text_config().hidden_size


def check_text_encoder(text_encoder: Any, model_config: Any) -> None:
    """Raise a ValueError if a model was not made for an encoder's states."""
    width, wanted = text_width(text_encoder.config), model_config.text_dim
    if wanted is not None and width != wanted:
        raise ValueError(
            f"the text encoder's states are {width} wide, but the model takes {wanted} (text_dim); "
            f"use the encoder that the model was trained with"
        )


def tokens_of(
    texts: Sequence[str],
    model_config: Mapping[str, Any],
    tokenizer: Any = None,
    text_encoder: Any = None,
    *,
    truncate: bool = False,
) -> list[list[int]]:
    """Token numbers of texts; the arguments are those of `encode`."""
    longest, limited_by = model_config["max_text_length"], "the model takes"
    if model_config["vocab_size"] is not None:
        tokens = tokenize(texts, model_config["vocab_size"])
    else:
        config = text_encoder.config.get_text_config()
        most = getattr(config, "max_position_embeddings", longest)  # T5 knows no limit
        if most < longest:
            longest, limited_by = most, "the text encoder takes"
        tokens = [list(ids) for ids in tokenizer(list(texts))["input_ids"]]
    for text, ids in zip(texts, tokens, strict=True):
        if len(ids) > longest and not truncate:
            raise ValueError(
                f"a text of {len(ids)} tokens is too long, {limited_by} {longest} at most; "
                f"shorten {text[:60]!r}"
            )
        if len(ids) > longest:
            _warn_of_cut(longest)
    return [ids[:longest] for ids in tokens]


@cache  # once: training would say so in every step
def _warn_of_cut(longest: int) -> None:
    logger.warning("texts of more than %d tokens are cut off", longest)


def encode(
    texts: Sequence[str],
    model_config: Mapping[str, Any],
    tokenizer: Any = None,
    text_encoder: Any = None,
    *,
    truncate: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """An MM-DiT's condition of texts: `encoder_hidden_states`, `encoder_attention_mask`, and more.

    A text that comes several times is encoded once.

    Args:
        texts: B texts.
        model_config: the model's, with max_text_length, vocab_size, text_dim and pooled_dim.
        tokenizer: of a text encoder; a model with vocab_size needs none.
        text_encoder: likewise.
        truncate: whether to cut long texts off, and warn once, instead of raising a ValueError.
        device: where the condition is needed.
    """
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    once = list(rows)
    tokens = tokens_of(once, model_config, tokenizer, text_encoder, truncate=truncate)
    if model_config["vocab_size"] is not None:
        words, mask = pad(tokens)
        condition = {"encoder_hidden_states": words, "encoder_attention_mask": mask}
    else:
        pooled = model_config["pooled_dim"] is not None
        condition = _encoder_states(once, max(map(len, tokens)), tokenizer, text_encoder, pooled)
    order = [rows[text] for text in texts]
    return {name: value[order].to(device) for name, value in condition.items()}


def _encoder_states(
    texts: list[str], longest: int, tokenizer: Any, text_encoder: Any, pooled: bool
) -> dict[str, Tensor]:
    """What a text encoder makes of texts, on its device."""
    # Some texts have no token at all (Qwen's empty one): they get one of padding.
    batch = tokenizer(
        texts, padding="max_length", max_length=max(1, longest), truncation=True,
        return_tensors="pt", padding_side="right",
    ).to(text_encoder.device)  # fmt: skip
    mask = batch["attention_mask"]
    mask[:, 0] = 1
    with torch.no_grad():
        out = text_encoder(input_ids=batch["input_ids"], attention_mask=mask)
    condition = {
        "encoder_hidden_states": out.last_hidden_state,
        "encoder_attention_mask": mask.bool(),
    }
    if pooled:
        vector = getattr(out, "pooler_output", None)
        if vector is None:
            raise ValueError(
                f"a {type(text_encoder).__name__} gives no vector for a whole text, but the model "
                f"takes one (pooled_dim); use a CLIP, or a model with pooled_dim=None"
            )
        condition["pooled_projections"] = vector
    return condition
