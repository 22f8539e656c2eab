"""Ports of a block: where it takes in tokens and text, and where it gives them back."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Streams = tuple[Tensor, Tensor | None]
"""Tokens (B, N, D), and a text (B, S, D) where the block has a stream of it."""


@dataclass(frozen=True)
class BlockPort:
    """The streams among a block's arguments, and among the values that it returns."""

    names: tuple[str, ...]  # of the arguments, in order
    tokens: str  # argument with the tokens
    text: str | None = None  # argument with the text, if there is one
    tokens_out: int = 0  # index of the tokens in a tuple that is returned
    text_out: int | None = None  # the same of the text; None where the block gives none back

    @classmethod
    def of(cls, block: nn.Module, tokens: str | None = None, out: int | None = None) -> "BlockPort":
        """Find the port of a block, where the tokens' argument or index may be known.

        diffusers' registry knows those of its own blocks. Another one takes its tokens as
        `hidden_states`, or first, and its text as `encoder_hidden_states`; of two values that it
        returns, one is the tokens, by default the first, and the other the text.
        """
        names = argument_names(block)
        if not names:
            raise ValueError(f"{type(block).__name__} takes no arguments: it is no block")
        known = _registered(type(block))
        if known is None:
            text: str | None = "encoder_hidden_states"
            text_out = 1 - (out or 0) if (out or 0) < 2 else None
            tokens = tokens or ("hidden_states" if "hidden_states" in names else names[0])
        else:
            text = known.encoder_hidden_states_argument_name
            text_out = known.return_encoder_hidden_states_index
            tokens = tokens or known.hidden_states_argument_name
            out = known.return_hidden_states_index if out is None else out
        if text not in names or text_out is None:
            text = text_out = None
        return cls(names, tokens, text, out or 0, text_out)

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a call by name: models give them by position when they are checkpointed."""
        arguments = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        if not isinstance(arguments.get(self.tokens), Tensor):
            raise ValueError(
                f"a block got no tokens as {self.tokens!r}, but {', '.join(arguments)}; "
                f"name the right one: for elasticize by layout=Layout(hidden_states=...), for a "
                f"step cache by hidden_states in the block's own forward"
            )
        return arguments

    def streams_in(self, arguments: Mapping[str, Any]) -> Streams:
        """The streams among the arguments of a call."""
        return arguments[self.tokens], None if self.text is None else arguments.get(self.text)

    def streams_out(self, result: Any) -> Streams:
        """The streams in what a block returned."""
        if isinstance(result, Tensor):
            return result, None
        has_text = self.text_out is not None and self.text_out < len(result)
        return result[self.tokens_out], result[self.text_out] if has_text else None

    def rest(self, result: Any) -> Any:
        """Result of a block without the streams: the mould of a later one."""
        return None if isinstance(result, Tensor) else self.result(result, (None, None))

    def result(self, mould: Any, streams: tuple[Any, Any]) -> Any:
        """Result that a block would return: the streams, and the rest of one before."""
        if mould is None:
            return streams[0]
        items = list(mould)
        items[self.tokens_out] = streams[0]
        if self.text_out is not None and self.text_out < len(items):
            items[self.text_out] = streams[1]
        return type(mould)(items)


Block = tuple[nn.Module, BlockPort]


def _registered(block_class: type) -> Any:
    """Entry of diffusers' registry for a block of its own; None of others."""
    if block_class.__module__.startswith("elit."):  # without the hooks' import, which takes long
        return None
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        return TransformerBlockRegistry.get(block_class)
    except ValueError:
        return None


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the forward's arguments, in order."""
    parameters = inspect.signature(type(module).forward).parameters
    return tuple(n for n, p in parameters.items() if p.kind != p.VAR_KEYWORD)[1:]  # without self
