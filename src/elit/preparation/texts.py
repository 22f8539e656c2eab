"""Texts encoded once: what a transformer's forward takes of them, all of one length."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from elit._choices import check_choice
from elit._portable import plain_index
from elit.data.manifest import RESERVED
from elit.pipelines.folder import INDEX, loading_error, read_index
from elit.pipelines.text_encoder import encode, encoder_settings, load_text_encoder
from elit.preparation.autoencoder import weights_sha256
from elit.preparation.settings import DTYPES

Encoding = dict[str, Tensor]
_LONGEST = 256  # tokens, of an encoder that knows no limit
_STATES, _MASK, _POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"
_QWEN, _QWEN_MASK = "QwenImagePipeline", "encoder_hidden_states_mask"
# Pipeline: arguments of its transformer, in the order in which its encode_prompt gives them; None
# is left out. They are those of retrofit.known.FLOW_TRANSFORMERS.
PIPELINES: dict[str, tuple[str | None, ...]] = {
    "StableDiffusion3Pipeline": (_STATES, None, _POOLED, None),
    "FluxPipeline": (_STATES, _POOLED, None),
    _QWEN: (_STATES, _QWEN_MASK),
    "WanPipeline": (_STATES, None),
    "CogView4Pipeline": (_STATES, None),
}


# Of an encode_prompt that has them.
_OPTIONS = {"do_classifier_free_guidance": False, "prompt_2": None, "prompt_3": None}


class TextEncoder:
    """Encodes texts, alike whatever else is in the batch."""

    def __init__(
        self,
        name: str,  # that it was loaded by; a folder's full path
        max_length: int,  # tokens that texts are padded to, and cut at
        sha256: str,  # of its weights
        make: Callable[[Sequence[str]], Encoding],
        store: torch.dtype,  # type that its numbers are stored in
        tokenizers: Sequence["_Watched"] = (),
    ):
        self.name, self.max_length, self.sha256 = name, max_length, sha256
        self._make, self.store, self._tokenizers = make, store, tokenizers

    def __call__(self, texts: Sequence[str]) -> Encoding:
        """Tensors (B, ...) on the processor, by the argument of the model that takes them."""
        self._texts = len(texts)
        with torch.inference_mode():
            return {name: x.cpu() for name, x in self._make(texts).items()}

    def cut(self) -> dict[str, list[bool]]:
        """Texts of the last call that were cut off, by where."""
        return {tokenizer.where: tokenizer.cut[: self._texts] for tokenizer in self._tokenizers}

    def stored(self, encoding: Encoding) -> Encoding:
        """Convert to the type that is stored."""
        return {
            name: (x.to(self.store) if x.is_floating_point() else x).contiguous()
            for name, x in encoding.items()
        }


class _Watched:
    """A tokenizer that remembers which texts it cut off, at `longest` tokens after `dropped`."""

    def __init__(self, tokenizer: Any, name: str, longest: int | None, dropped: int = 0):
        self._tokenizer, self._name = tokenizer, name
        self._longest, self._dropped = longest, dropped
        self.cut: list[bool] = []  # whether it did, of each text of its last call
        self.where = ""  # at how many tokens of which

    def __call__(self, texts: Sequence[str], **options: Any) -> Any:
        if options.get("truncation"):
            longest = self._longest or options["max_length"]
            whole = self._tokenizer(texts, verbose=False)["input_ids"]
            self.cut = [len(ids) - self._dropped > longest for ids in whole]
            self.where = f"{longest} tokens of {self._name}"
        return self._tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def load_texts(
    name: str, max_length: int | None, device: torch.device, dtype: str, store: str
) -> TextEncoder:
    """A text encoder of transformers, or the ones of a diffusers pipeline, by name or folder."""
    computes, stores = (getattr(torch, DTYPES[word]) for word in (dtype, store))
    full = str(Path(name).absolute()) if Path(name).is_dir() else name
    kind = _pipeline_kind(name)
    if kind is None:
        settings = encoder_settings(name)
        tokenizer, model = load_text_encoder(name)
        sha256 = weights_sha256(model)
        model = model.to(device, computes)
        most = getattr(model.config, "max_position_embeddings", None) or _LONGEST
        length = min(most, max_length or _LONGEST)
        if max_length is not None and max_length > most:
            raise ValueError(f"max_text_length={max_length} is beyond the {most} of {name}")
        config = {**settings, "max_text_length": length}
        watched = _Watched(tokenizer, "its tokenizer", length)

        def make(texts: Sequence[str]) -> Encoding:
            encoding = encode(texts, config, watched, model, truncate=True, device=device)
            return _padded(encoding, length, _MASK)

        return TextEncoder(full, length, sha256, make, stores, [watched])
    check_choice(kind, PIPELINES, "kind of pipeline", f" in {name}")
    pipe = _load_pipeline(name, kind)
    given = PIPELINES[kind]
    assert not set(filter(None, given)) & set(RESERVED)
    signature = inspect.signature(pipe.encode_prompt).parameters
    length = max_length or int(signature["max_sequence_length"].default)
    models = [m for n, m in pipe.components.items() if n.startswith("text_encoder") and m]
    sha256 = " ".join(weights_sha256(model) for model in models)
    for model in models:
        model.to(device, computes).eval().requires_grad_(False)

    # Qwen-Image cuts what follows its template
    limits = (length, pipe.prompt_template_encode_start_idx) if kind == _QWEN else (None,)
    tokenizers = [
        (n, _Watched(t, n, *limits)) for n, t in pipe.components.items() if "tokenizer" in n and t
    ]
    for n, watching in tokenizers:
        object.__setattr__(pipe, n, watching)  # past the check for a class of a known library
    options: dict[str, Any] = {"device": device, "max_sequence_length": length}
    options |= {n: v for n, v in _OPTIONS.items() if n in signature and n not in options}

    def make_by_pipeline(texts: Sequence[str]) -> Encoding:
        # CogView4 pads to the longest text, and its transformer reads the padding: one that is
        # too long makes that length one and the same.
        filler = ["word " * 2 * length] if kind == "CogView4Pipeline" else []
        out = pipe.encode_prompt(prompt=[*texts, *filler], **options)
        encoding = {
            n: x[: len(texts)] for n, x in zip(given, out, strict=True) if n and x is not None
        }
        if kind != _QWEN:
            return encoding
        mask = encoding.get(_QWEN_MASK)  # None where all texts are of one length
        states = encoding[_STATES]
        encoding[_QWEN_MASK] = states.new_ones(states.shape[:2]) if mask is None else mask
        return _padded(encoding, length, _QWEN_MASK)

    return TextEncoder(full, length, sha256, make_by_pipeline, stores, [t for _, t in tokenizers])


def _padded(encoding: Encoding, length: int, mask: str) -> Encoding:
    """States and mask at that length; where the mask is False, the states are 0."""
    more = length - encoding[mask].shape[1]
    is_token = encoding[mask].bool()
    states = torch.where(is_token[..., None], encoding[_STATES], 0)
    return {**encoding, _STATES: pad(states, (0, 0, 0, more)), mask: pad(is_token, (0, more))}


def _pipeline_kind(name: str) -> str | None:
    """Class of the pipeline of that name, None if it is none of a pipeline."""
    if Path(name).is_dir():
        is_pipeline = Path(name, INDEX).exists()
        return str(read_index(Path(name)).get("_class_name")) if is_pipeline else None
    from diffusers import DiffusionPipeline

    try:
        return str(plain_index(DiffusionPipeline.load_config(name)).get("_class_name"))
    except (OSError, ValueError):
        return None  # what loads the encoder says what is wrong with its name


def _load_pipeline(name: str, kind: str) -> Any:
    import diffusers

    try:
        index = diffusers.DiffusionPipeline.load_config(name)
        absent = {n: None for n, value in index.items() if value == [None, None]}
        absent |= {"transformer": None, "vae": None}
        pipe = getattr(diffusers, kind).from_pretrained(name, **absent, dtype=torch.float32)
        if kind == "StableDiffusion3Pipeline" and pipe.text_encoder_3 is None:
            # Without T5 its place is zeros, as wide as the transformer wants
            config = diffusers.SD3Transformer2DModel.load_config(name, subfolder="transformer")
            stand_in = SimpleNamespace(config=SimpleNamespace(**config))
            object.__setattr__(pipe, "transformer", stand_in)
    except (OSError, ValueError, ImportError) as error:
        raise loading_error(name, error) from error
    return pipe
