"""What it means that the Hugging Face hub gave nothing: one wording for all that is asked of it."""

from collections.abc import Iterator

from elit._files import cache_advice


def hub_reason(error: BaseException) -> str | None:
    """Why the hub gave nothing, in words; None where the error says nothing of that.

    The libraries in between tell of a missing file also where the hub was never reached; the errors
    that theirs came from know better.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    errors = tuple(_behind(error))
    if any(isinstance(e, RepositoryNotFoundError) for e in errors):
        return "it knows no such repository, or does not show it to you"
    for e in (e for e in errors if isinstance(e, OSError)):
        if isinstance(e.filename, str) and (advice := cache_advice(e.filename)):
            return f"{e.filename}: {e.strerror}; {advice}"
    kinds = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
    if not any(isinstance(e, kinds) for e in errors):
        return None
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "it could not be reached"


def not_fetched(what: str, error: BaseException) -> str:
    """The message for a name that is no folder here and that the hub did not give."""
    reason = hub_reason(error) or " ".join(str(error).split())[:300].rstrip(". ")
    return (
        f"{what} is neither a folder nor can it be fetched from the Hugging Face hub ({reason}); "
        f"check its spelling and the network, log in by `hf auth login` if it is not public, or "
        f"give a folder"
    )


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
