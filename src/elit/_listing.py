"""Which files a folder holds, and whether they are still the same."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from elit._files import cache_folder, digest_of, sha256_of, write_json

_LITTER = ("__MACOSX", "@eaDir")  # what systems keep beside pictures: hidden by another name
_TICK = 2_000_000_000  # ns: within it a file may change twice at what a disk takes for one time


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no one's data."""
    return name.startswith(".") or name in _LITTER


def files_of(folder: Path) -> tuple[list[Path], list[str]]:
    """All files below a folder in the order of their paths, and what was left out.

    Links are followed, round and round excepted; names are names, whatever signs they hold.

    Raises:
        OSError: if a folder cannot be read.
    """
    files: list[Path] = []
    left: list[str] = []

    def walk(place: Path, above: tuple[tuple[int, int], ...]) -> None:
        about = place.stat()
        if (about.st_dev, about.st_ino) in above:
            left.append(f"{place.relative_to(folder)}, which leads back to a folder above it")
            return
        with os.scandir(place) as there:
            entries = sorted((entry.name, entry.is_dir(), entry.is_file()) for entry in there)
        for name, is_folder, is_file in entries:
            path = place / name
            if is_hidden(name):
                left.append(f"{path.relative_to(folder)}, hidden")
            elif is_folder:
                walk(path, (*above, (about.st_dev, about.st_ino)))
            elif is_file or not path.exists():  # a link to nothing is told when it is read
                files.append(path)
            else:
                left.append(f"{path.relative_to(folder)}, no regular file")

    walk(folder, ())
    return files, left


def stamp(files: Iterable[str | Path]) -> str | None:
    """Sizes and times of files in short; None where their times cannot be trusted yet."""
    digest, newest = hashlib.sha256(), 0
    for file in files:
        try:
            about = os.stat(file)
        except OSError as error:
            digest.update(f"{error.errno}\n".encode())
            continue
        # Who keeps the time of a file's change still moves that of its entry
        digest.update(f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}\n".encode())
        newest = max(newest, about.st_mtime_ns, about.st_ctime_ns)
    return None if time.time_ns() - newest < _TICK else digest.hexdigest()[:32]


def checksums(folder: Path, files: Sequence[Path]) -> list[str]:
    """SHA-256 of files in a folder, read again only if they may have changed.

    The cache remembers them by size, times and inode. Nobody can set the time of a file's last
    change (ctime): contents that were replaced under their old size and date are noticed. What
    changed just now is not remembered, as its clock may not have moved on since.
    """
    memory = cache_folder() / "contents" / f"{digest_of(os.path.realpath(folder))}.json"
    try:
        before = dict(json.loads(memory.read_text()))
    except (OSError, ValueError, TypeError):
        before = {}
    now, digests, settled = time.time_ns(), [], dict(before)
    for file in files:
        name, at = str(file.relative_to(folder)), file.stat()
        state = [at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_dev, at.st_ino]
        remembered: Any = before.get(name)
        is_same = isinstance(remembered, list) and remembered[:-1] == state
        digests.append(remembered[-1] if is_same else sha256_of(file))
        if os.name != "nt" and max(at.st_mtime_ns, at.st_ctime_ns) < now - _TICK:
            settled[name] = [*state, digests[-1]]
    if settled != before:
        with contextlib.suppress(OSError):  # then they are read again
            write_json(memory, settled)
    return digests
