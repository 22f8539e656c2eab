"""Files that are never half there."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_ASIDE = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.part(\.\w+)?")
_NO_LONGER_WRITTEN = 24 * 3600  # seconds after the last change
_VARIABLE = re.compile(r"\$(\{[A-Za-z_]\w*\}|[A-Za-z_]\w*)")


def write_file(path: Path, write: Callable[[Path], Any], replace: bool = True) -> None:
    """Let `write` make a file aside, then rename it: a reader sees the old one or the new one.

    The disk holds it when this returns. Any number of processes may write the same file at once;
    not to `replace` leaves the file of the first of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers_once(path.parent.absolute())
    # In a folder, as safetensors writes into a file of its own beside the one that it is given
    folder = path.with_name(f".{path.stem[:150]}.{_mark()}.part")
    try:
        folder.mkdir()
        aside = folder / path.name
        write(aside)
        open_to_others(aside)
        sync(aside)
        try:
            if not replace:
                os.link(aside, path)
        except OSError as error:  # of a disk that has no links, too
            replace = not isinstance(error, FileExistsError)
        if replace:
            os.replace(aside, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # makes room on a full disk
    sync(path.parent)


@contextlib.contextmanager
def locked(folder: Path, message: str) -> Iterator[None]:
    """Keep a folder for this process; a ValueError with this message if another one has it.

    A folder that it made goes again if an error comes before anything is written there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl

            # Of this process alone: loader workers that outlive a killed one don't hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except OSError as error:
            raise ValueError(message) from error
        try:
            yield
        except BaseException:
            if made and [path.name for path in folder.iterdir()] == [".lock"]:
                (folder / ".lock").unlink()
                with contextlib.suppress(OSError):  # another process has made one there
                    for path in made:
                        path.rmdir()
            raise


def write_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a folder aside, then rename it to one that is not there, or empty.

    What killed processes left of their attempts is removed first.

    Raises:
        OSError: if the folder is not empty by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f".{path.name[:150]}.*.part")
    aside = path.with_name(f".{path.name[:150]}.{_mark()}.part")
    try:
        write(aside)
        rename_folder(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def replace_files(folder: Path, write: Callable[[Path], Any], keep: Sequence[str] = ()) -> None:
    """Let `write` fill a folder aside, then move its files over those of `folder` one by one.

    For a folder that readers may have open: each file is at any moment the old or the new one.
    Those named in `keep` stay as they are if they are there.
    """
    from safetensors import SafetensorError

    aside = folder / ".export.part"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write(aside)
        kept = {aside / name for name in keep if (folder / name).exists()}
        files = [file for file in aside.rglob("*") if file.is_file() and file not in kept]
        # Weights first and the index last: what the index names is there.
        for file in sorted(files, key=lambda f: (f.suffix == ".json", -len(f.parts), f)):
            open_to_others(file)
            sync(file)
            place = folder / file.relative_to(aside)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    except SafetensorError as error:
        raise as_os_error(error, folder) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def rename_folder(aside: Path, target: Path) -> None:
    """Give a folder that is complete its name, once the disk holds all of it."""
    for file in aside.rglob("*"):
        if file.is_file():
            sync(file)
    sync(aside)
    if os.name == "nt" and target.is_dir():
        target.rmdir()  # which renames onto no folder, even an empty one
    aside.rename(target)
    sync(target.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; one that is half removed no longer bears its name."""
    aside = path.with_name(f".{path.name}.removed")
    path.rename(aside)
    shutil.rmtree(aside)


def _mark() -> str:
    """Tells apart what is written aside, and by whom: see `remove_leftovers`."""
    return f"{_place()}-{os.getpid()}-{secrets.token_hex(4)}"


def open_to_others(path: Path) -> None:
    """Give a file the rights that new files have here: safetensors lets its owner alone read it."""
    path.chmod(0o666 & ~_umask())


@functools.cache
def _umask() -> int:
    mask = os.umask(0)  # there is no way to look at it alone
    os.umask(mask)
    return mask


def write_text(path: Path, text: str, replace: bool = True) -> None:
    """Write a text in UTF-8."""
    write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"), replace)


def write_json(path: Path, value: Any, replace: bool = True) -> None:
    """Write plain types as JSON."""
    write_text(path, json_text(value), replace)


def json_text(value: Any) -> str:
    """Plain types as we write them into files."""
    return json.dumps(value, indent=2) + "\n"


def output_folder(path: str | Path, flag: str) -> Path:
    """A folder to write into; an error now, not after the work, if that cannot be.

    Args:
        path: the folder, which need not exist yet, and is not made here.
        flag: the flag that chooses it, for the message.
    """
    folder = Path(path)
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        reason = f"{existing} is not a folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        reason = f"{existing} is read-only for you"
    else:
        return folder
    raise ValueError(f"cannot write into {folder}: {reason}; choose another folder with {flag}")


def save_tensors(path: Path, tensors: dict[str, Any], about: dict[str, str] | None = None) -> None:
    """Write tensors by name, and what is to be told with them, as safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        write_file(path, lambda aside: save_file(whole, aside, about))
    except SafetensorError as error:
        raise as_os_error(error, path) from error


def sync(path: Path) -> None:
    """Have the disk hold a file or, except on Windows, the names in a folder."""
    if os.name == "nt":
        return  # which syncs no file that is open for reading, and no folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def typed_path(path: str | os.PathLike[str]) -> str:
    """A path as a person types it, with `~` and `$VARIABLES` replaced, as a shell does.

    A name with a dollar in it that is there is taken as it is.

    Raises:
        ValueError: for a variable that is not set, or a user who is not known.
    """
    text = os.path.expanduser(os.fspath(path))
    if os.path.lexists(text):
        return text
    text = os.path.expandvars(text)
    unknown = _VARIABLE.search(text)
    if unknown or text.startswith("~"):
        what = f"the variable {unknown[0]} is not set" if unknown else "there is no such user"
        raise ValueError(f"path {os.fspath(path)}: {what}; write the path out, or begin with ./")
    return text


def cache_folder() -> Path:
    """Where what can be made again is kept: ELIT_CACHE, or elit in the user's cache."""
    given = os.environ.get("ELIT_CACHE")
    return Path(typed_path(given)) if given else _cache_of("elit")


def _cache_of(name: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.expanduser(home), name)


def cache_advice(path: str | os.PathLike[str]) -> str | None:
    """Which variable moves the cache that a path belongs to, or that it keeps from being made."""
    places = {
        "ELIT_CACHE": cache_folder(),
        "HF_HOME": Path(os.environ.get("HF_HOME") or _cache_of("huggingface")),
        "TORCH_HOME": Path(os.environ.get("TORCH_HOME") or _cache_of("torch")),
    }
    path = Path(path).absolute()
    variables = [name for name, place in places.items() if path.is_relative_to(place)]
    variables = variables or [name for name, place in places.items() if place.is_relative_to(path)]
    names = " and ".join(variables) if len(variables) < len(places) else "XDG_CACHE_HOME"
    return f"set {names} to a folder that you may write into" if variables else None


def remove_leftovers(folder: Path, pattern: str = ".*.part*") -> None:
    """Remove what killed processes left half written.

    Safe beside processes that write: a file goes if its process was of this machine and is gone,
    or if nobody has changed it for a day.
    """
    for path in folder.glob(pattern):
        match = _ASIDE.fullmatch(path.name)
        if match is None:
            continue
        ours = match[1] == _place()
        try:
            old = time.time() - path.stat().st_mtime > _NO_LONGER_WRITTEN
            if old or (ours and not _is_alive(int(match[2]))):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:
            pass  # it got its name, or another process removed it


_remove_leftovers_once = functools.cache(remove_leftovers)  # a large folder takes time to list


@functools.cache
def _place() -> str:
    """Where process numbers are unique: a machine or, within it, a container."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _is_alive(process: int) -> bool:
    if os.name == "nt":
        return True  # there, asking would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def digest_of(value: Any) -> str:
    """Short checksum of plain types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_os_error(error: Exception, path: Path) -> OSError:
    """The system's error behind one of safetensors, which names it by its number alone."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(errno.EIO, str(error), str(path))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
