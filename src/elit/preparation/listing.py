"""Which files a folder holds, and whether they are still the same."""

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

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
        with os.scandir(place) as found:
            entries = sorted((entry.name, entry.is_dir(), entry.is_file()) for entry in found)
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
