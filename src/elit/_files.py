"""Files that are never half there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file aside, then rename it: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.part{path.suffix}")
    write(aside)
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """Write plain types as JSON."""
    text = json.dumps(value, indent=2) + "\n"
    write_file(path, lambda aside: aside.write_text(text))
