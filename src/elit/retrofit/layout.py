"""Layout of a foreign transformer: its blocks, its grid of tokens, what follows the tokens.

Which argument of a block holds the tokens, and which value it returns, diffusers' registry knows
(`caching/ports.py`). The rest is here; `known.py` has a few lines for each architecture.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elit._choices import nearest
from elit._numbers import check_whole, is_real, is_whole
from elit.caching.ports import BlockPort
from elit.retrofit.settings import interface_heads

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class PerToken:
    """An argument of the blocks with one entry for each token, such as rotary embeddings."""

    axis: int  # of the tokens, in the tensor or in each tensor of a tuple
    item: int | None = None  # of a tuple, that follows the tokens; None: the tensor, or all items
    ndim: int | None = None  # axes of a tensor that follows them; others are the same for all

    def select(self, value: Any, index: Tensor, num_tokens: int) -> Any:
        """The entries of the tokens at `index`; those before the tokens (a text's) stay."""
        if value is None:
            return None
        if isinstance(value, Tensor):
            return self._rows(value, index, num_tokens)
        items = [
            self._rows(x, index, num_tokens) if self.item in (None, i) else x
            for i, x in enumerate(value)
        ]
        is_named = isinstance(value, tuple) and hasattr(value, "_fields")
        return type(value)(*items) if is_named else type(value)(items)

    def _rows(self, value: Tensor, index: Tensor, num_tokens: int) -> Tensor:
        if value.shape[self.axis] == 1 or self.ndim not in (None, value.ndim):
            return value  # one for all tokens
        before = value.shape[self.axis] - num_tokens
        if before == 0:
            return value.index_select(self.axis, index)
        text = value.narrow(self.axis, 0, before)
        return torch.cat((text, value.index_select(self.axis, index + before)), dim=self.axis)


@dataclass(frozen=True)
class Layout:
    """Facts that `elasticize` has to know of a transformer.

    Attributes:
        blocks: names of the lists of blocks, in the order in which the tokens pass them.
        grid: gives the tokens along each axis, in raster order, from the model and the arguments
            of its forward by name. None takes a square.
        hidden_size: width of the tokens, and of the heads' sum; None looks in the model's config.
        num_heads: attention heads of Read and Write; None takes the model's, but at least 8.
        hidden_states: the blocks' argument with the tokens; None asks diffusers' registry, then
            takes `hidden_states`, or the first one.
        output: index of the tokens in what a block returns; None asks diffusers' registry, then
            takes all of it, or the first value.
        per_token: the blocks' arguments that follow the tokens.
        time_scale: what the forward's `timestep` is at pure noise: 1, or 1000.
        with_text: whether the blocks may get the text's tokens before the image's, in one tensor.
        not_elastic: arguments of the forward that act on the core's tokens between blocks: they
            must be None.
        num_axes: of the grid: 2 of images, 3 of clips.
        guide_half: where pipelines that run both branches of guidance as one batch put the guide:
            "first" or "second"; None where they call the model once for each.
    """

    blocks: str | Sequence[str] = "transformer_blocks"
    grid: Callable[[nn.Module, Arguments], Sequence[int]] | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    hidden_states: str | None = None
    output: int | None = None
    per_token: Mapping[str, PerToken] = field(default_factory=dict)
    time_scale: float = 1000.0
    with_text: bool = False
    not_elastic: Sequence[str] = ()
    num_axes: int = 2
    guide_half: str | None = None

    def __post_init__(self) -> None:
        names = (self.blocks,) if isinstance(self.blocks, str) else self.blocks
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"blocks={self.blocks!r} are no names of lists; give one or several")
        object.__setattr__(self, "blocks", tuple(names))
        for name in ("hidden_size", "num_heads", "num_axes"):
            if getattr(self, name) is not None or name == "num_axes":
                check_whole(getattr(self, name), name)
        if not is_real(self.time_scale) or self.time_scale <= 0:
            raise ValueError(f"time_scale={self.time_scale!r} is not allowed; give 1 or 1000")

    def find_blocks(self, model: nn.Module) -> list[nn.Module]:
        """All blocks in order, or a ValueError."""
        every: list[nn.Module] = []
        kind = type(model).__name__
        for name in self.blocks:
            try:
                blocks = model.get_submodule(name)
            except AttributeError:
                lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
                raise ValueError(
                    f"{kind} has no list of blocks {name!r}; {_suggest(name, lists)}"
                    f"its lists are {', '.join(map(repr, lists)) or 'none'}"
                ) from None
            if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
                raise ValueError(
                    f"{name!r} of {kind} is {type(blocks).__name__}, not a ModuleList with "
                    f"blocks; nothing can be patched there"
                )
            every += blocks
        if len({id(block) for block in every}) != len(every):
            raise ValueError(
                f"a block of {kind} comes twice in {self.blocks}: one that "
                f"is shared can't be in the core and outside of it; copy it"
            )
        return every

    def port(self, block: nn.Module) -> BlockPort:
        """Way of the tokens into a block and out of it, or a ValueError."""
        kind, parameters = type(block).__name__, inspect.signature(type(block).forward).parameters
        odd = [n for n, p in parameters.items() if p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY)]
        if odd or all(p.kind == p.VAR_KEYWORD for p in list(parameters.values())[1:]):
            raise ValueError(
                f"the blocks, {kind}, take their arguments without names "
                f"({', '.join(odd) or '**kwargs'}): tokens can't be found there; give them names"
            )
        port = BlockPort.of(block, self.hidden_states, self.output)
        for name in (port.tokens, *self.per_token):
            if name not in port.names:
                raise ValueError(
                    f"the blocks, {kind}, take no argument {name!r}; "
                    f"{_suggest(name, port.names)}they take {', '.join(port.names)}"
                )
        return port

    def width(self, model: nn.Module) -> int:
        """D, of the model's tokens."""
        if self.hidden_size is not None:
            return self.hidden_size
        settings = _settings_of(model)
        heads, width = settings.get("num_attention_heads"), settings.get("attention_head_dim")
        if is_whole(heads) and is_whole(width):
            return heads * width
        names = ("hidden_size", "inner_dim", "hidden_dim", "embed_dim", "dim")
        return _look_up(model, names, "hidden_size")

    def heads(self, model: nn.Module) -> int:
        """Attention heads of Read and Write."""
        if self.num_heads is not None:
            return self.num_heads
        heads = _look_up(model, ("num_attention_heads", "num_heads", "heads"), "num_heads")
        return interface_heads(heads, self.width(model))

    def size(
        self, model: nn.Module, arguments: Arguments, hidden_states: Tensor
    ) -> tuple[int, ...]:
        """Tokens along each axis, of a forward with these arguments."""
        if self.grid is not None:
            return tuple(int(n) for n in self.grid(model, arguments))
        tokens = hidden_states.shape[1] if hidden_states.ndim == 3 else 0
        side = math.isqrt(tokens)
        if self.num_axes != 2 or side * side != tokens or not tokens:
            raise ValueError(
                f"an input of shape {tuple(hidden_states.shape)} doesn't say how its tokens lie; "
                f"give layout=Layout(grid=lambda model, arguments: (height, width), ...)"
            )
        return side, side


def _suggest(name: str, allowed: Sequence[str]) -> str:
    near = nearest(name, allowed)
    return f"did you mean {near!r}? " if near else ""


def _settings_of(model: nn.Module) -> dict[str, Any]:
    """What a model says of itself in its config, and else in its attributes."""
    config = getattr(model, "config", None)
    config = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    return {**vars(model), **config}


def _look_up(model: nn.Module, names: Sequence[str], setting: str) -> int:
    settings = _settings_of(model)
    for name in names:
        if is_whole(settings.get(name)):
            return settings[name]
    raise ValueError(
        f"{type(model).__name__} doesn't say its {setting} (looked for {', '.join(names)}); "
        f"give layout=Layout({setting}=...)"
    )
