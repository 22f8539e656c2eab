"""A CLIP of random weights and its tokenizer, in the files that transformers reads."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers


def save_word_tokenizer(folder: Path, words: list[str]) -> None:
    """A tokenizer of words between spaces, whose first two are of padding and unknown."""
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=words[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=words[0], unk_token=words[1]
    ).save_pretrained(folder)


def save_tiny_clip(folder: Path) -> None:
    """It knows the words a, red, blue and disc."""
    words = ["[pad]", "[unk]", "a", "red", "blue", "disc", "[begin]", "[end]"]
    save_word_tokenizer(folder, words)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=small | {
            "vocab_size": 8, "hidden_size": 16, "eos_token_id": 7, "bos_token_id": 6,
            "max_position_embeddings": 12,
        },
        vision_config=small | {"hidden_size": 24, "image_size": 32, "patch_size": 8},
        projection_dim=10,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(folder)
