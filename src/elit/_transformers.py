"""transformers, for those who load encoders of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError

from elit._extras import missing
from elit._hub import hub_reason


@contextmanager
def loading(what: str, place: str, advice: str) -> Iterator[Any]:
    """transformers, quiet; what goes wrong within is a ValueError.

    Args:
        what: is loaded, in words.
        place: where from, in words; may be empty.
        advice: what to do where it fails.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(missing(f"{what} needs transformers", "text")) from error
    logs = transformers.utils.logging
    level, shows_bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield transformers
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if (of_hub := hub_reason(error)) is not None:
            reason = f"the Hugging Face hub was asked, but {of_hub}"
        raise ValueError(f"{what} cannot be loaded{place}: {reason}; {advice}") from error
    finally:
        logs.set_verbosity(level)
        if shows_bars:
            logs.enable_progress_bar()


def load_frozen(kind: Any, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers with all its weights, which transformers would leave random."""
    model, report = kind.from_pretrained(name, dtype=dtype, output_loading_info=True)
    absent = sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])})
    if absent:
        raise ValueError(f"it lacks {len(absent)} of its weights, such as {absent[0]}")
    return model.eval().requires_grad_(False)
