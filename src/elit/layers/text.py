"""Text without a download: words are hashed to numbers and embedded by a small transformer."""

import re
import unicodedata
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from elit._numbers import MOST, check_whole
from elit.layers.sizes import head_dim
from elit.layers.transformer import MLP, SelfAttention, rotary_embedding

PADDING, BEGIN = 0, 1  # numbers that no word has
MIN_VOCAB = 8


def tokenize(texts: Sequence[str], vocab_size: int) -> list[list[int]]:
    """Numbers of each text's words, hashes of their lower-case letters, BEGIN first."""
    first = BEGIN + 1
    return [
        [BEGIN] + [first + zlib.crc32(word.encode()) % (vocab_size - first) for word in words(text)]
        for text in texts
    ]


def words(text: str) -> list[str]:
    """Words and signs of a text, the same for all ways to write it in Unicode."""
    letters = []
    for letter in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(letter)
        if kind.startswith("M"):  # a vowel sign of Hindi, say: part of its word
            letters.append(f"_{ord(letter):x}")
        elif kind != "Cf":  # such as a space of no width
            letters.append(letter)
    return re.findall(r"\w+|[^\w\s]", "".join(letters))


def pad(tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token numbers (B, S) int64 and a mask (B, S) bool, as long as the longest text."""
    length = max(map(len, tokens))
    ids = torch.full((len(tokens), length), PADDING)
    mask = torch.zeros(len(tokens), length, dtype=torch.bool)
    for row, text in enumerate(tokens):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = True
    return ids, mask


class TextBlock(nn.Module):
    """A pre-norm transformer block on words."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, num_heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """(B, S, D), rotations of the S, what is no padding (B, S) -> (B, S, D)."""
        x = x + self.attention(self.norm_attention(x), rotary, mask)
        return x + self.mlp(self.norm_mlp(x))


class WordEncoder(nn.Module):
    """Embeds words in their context; trained along with what reads them."""

    def __init__(
        self, dim: int, num_heads: int, vocab_size: int | None, mlp_ratio: float, theta: float
    ):
        super().__init__()
        advice = f"a whole number from {MIN_VOCAB} to {MOST}, thousands are usual"
        check_whole(vocab_size, "vocab_size", MIN_VOCAB, advice=advice)
        self.rotary_options = (head_dim(dim, num_heads), theta)
        self.table = nn.Embedding(int(vocab_size or 0), dim)
        self.blocks = nn.ModuleList(TextBlock(dim, num_heads, mlp_ratio) for _ in range(2))
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Word numbers (B, S) and what is no padding (B, S) -> (B, S, D)."""
        places = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)[:, None]
        rotary = rotary_embedding(places, *self.rotary_options)
        x = self.table(ids)  # (B, S, D)
        for block in self.blocks:
            x = block(x, rotary, mask)
        return self.norm(x)
