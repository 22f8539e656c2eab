"""Words that a user may have misspelt: the error that names what is allowed and what is nearest."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

MOST = 20  # words that a message lists in full


def nearest(value: Any, allowed: Iterable[str]) -> str | None:
    """The allowed word most like `value`, upper or lower case, if any is."""
    by_lower = {word.lower(): word for word in allowed}
    near = difflib.get_close_matches(str(value).lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[near[0]] if near else None


def check_choice(value: Any, allowed: Iterable[str], what: str, where: str = "") -> None:
    """Raise a ValueError that names the nearest of the allowed words and lists them.

    Of more than MOST it lists those most like the value.
    """
    allowed = tuple(allowed)
    if isinstance(value, str) and value in allowed:
        return
    near = nearest(value, allowed)
    listed = ", ".join(map(repr, allowed))
    if len(allowed) > MOST:
        likest = difflib.get_close_matches(str(value), allowed, n=6, cutoff=0)
        listed = f"{', '.join(map(repr, likest))} or {len(allowed) - 6} others"
    if near and len(allowed) > 10:  # or the nearest would be lost behind them
        advice = f"did you mean {near!r}? Allowed: {listed}"
    else:
        advice = f"use one of {listed}" if allowed else f"no {what} is allowed"
        advice += f"; did you mean {near!r}?" if near and len(allowed) > 1 else ""
    raise ValueError(f"unknown {what} {value!r:.60}{where}: {advice}")


def label_of(label: Any, names: Mapping[str, int]) -> Any:
    """The number of a class that is given by its name, or by its number as text.

    What is no text stands for itself; text of digits is always a number.
    """
    if not isinstance(label, str):
        return label
    if label.isascii() and label.isdigit() and len(label) < 10:
        return int(label)
    if not names:
        raise ValueError(f"class {label!r:.60} is no number, and this model knows no names")
    check_choice(label, names, "class")
    return names[label]
