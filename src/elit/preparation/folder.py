"""Whether a folder may be written to: it is new, or was begun with the same settings."""

import json
from pathlib import Path
from typing import Any

from elit.data.manifest import SETTINGS

# Where things lie may differ from run to run; what they hold may not.
_FREE = (("source", "name"), ("autoencoder", "name"), ("text_encoder", "name"))


def json_types(value: Any) -> Any:
    """What reading it back from JSON would give."""
    return json.loads(json.dumps(value))


def check_same(folder: Path, content: dict[str, Any]) -> bool:
    """Whether a folder was begun with these settings; False if it is empty.

    Raises:
        ValueError: if it was begun with others, or holds something else.
    """
    path = folder / SETTINGS
    # Looked for first: the settings of a process that starts just now come before all else
    other = next((p.name for p in sorted(folder.iterdir()) if not p.name.startswith(".")), None)
    if not path.exists():
        if other is not None:
            raise ValueError(
                f"{folder} holds other things, such as {other}; give a new folder, or an empty one"
            )
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); prepare into another folder") from error
    differ = sorted(_differences(before, content, ()))
    if differ:
        name, was, now = differ[0]
        more = f", and {len(differ) - 1} more" if len(differ) > 1 else ""
        raise ValueError(
            f"{folder} was begun with {name}={was:.80}, not {now:.80}{more}; give the same source "
            f"and settings to go on, or another folder"
        )
    return True


def _differences(before: Any, now: Any, place: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Name, value before and value now of everything that differs."""
    if place in _FREE or before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for key in sorted({*before, *now})
            for difference in _differences(before.get(key), now.get(key), (*place, key))
        ]
    return [(".".join(place), json.dumps(before), json.dumps(now))]
