"""Random wrong inputs: values, mutated trees of JSON and mutated folders, each from its seed."""

import copy
import json
import math
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SECONDS = 30  # more is a hang
HUGE = 10**400  # beyond every float

VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 4, 7, 16, 100, 2**31, 2**63, -(2**70), 10**80, HUGE, 0.0,
    0.5, -0.5, 1.0, 1.5, 1e-320, 1e308, math.inf, -math.inf, math.nan, "", " ", "a", "1", "0.5",
    "nan", "1e400", "true", "null", "digits", "shapes", "elit-dit-tiny/2", "../x", "a/b", "\0",
    "x" * 300, "žluť", "train", "32x32", "axb", "-1x4", [], [1], [0.5], [1, 0.5], [2, 2], [4, 4],
    [0, 0], [-1, 4], [2, 2, 2], [None], ["a"], [[]], [[1, 2], 3], [HUGE], [math.nan, 0.9],
    [True, False], {}, {"a": 1}, {"count": 5}, {"depth": "2"}, {"a": {"b": [None]}}, {"": []},
)  # fmt: skip


class TookTooLongError(BaseException):
    """A case that hangs; no handler for errors of a kind may catch it."""


@contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """End what takes longer."""

    def stop(*_: Any) -> None:
        raise TookTooLongError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def places(tree: Any) -> list[tuple[Any, ...]]:
    """Paths to everything in a tree of JSON."""
    found: list[tuple[Any, ...]] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        found.append((key,))
        if isinstance(value, (dict, list)):
            found += [(key, *rest) for rest in places(value)]
    return found


def mutate(draw: random.Random, tree: Any) -> tuple[Any, list[str]]:
    """A tree with one to three things changed, and the names of what was changed."""
    tree, names = copy.deepcopy(tree), []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not (paths := places(tree)):
            break
        *way, key = draw.choice(paths)
        parent = tree
        for step in way:
            parent = parent[step]
        names += [str(step) for step in (*way, key) if isinstance(step, str)]
        kind = draw.choice(("value",) * 4 + ("near", "near", "drop", "copy", "rename", "swap"))
        if kind == "value":
            parent[key] = copy.deepcopy(draw.choice(VALUES))
        elif kind == "near":
            parent[key] = _near(draw, parent[key])
        elif kind == "drop":
            del parent[key]
        elif kind == "swap":
            *other, last = draw.choice(paths)
            from_there = tree
            for step in (*other, last):
                from_there = from_there[step] if _has(from_there, step) else 0
            parent[key] = copy.deepcopy(from_there)
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            name = key + "_" if kind == "copy" else draw.choice((key.upper(), "x", key[:-1]))
            parent[name] = copy.deepcopy(parent[key])
            if kind == "rename" and name != key:
                del parent[key]
    return tree, names


def _has(tree: Any, step: Any) -> bool:
    return step in tree if isinstance(tree, dict) else isinstance(tree, list) and step < len(tree)


def _near(draw: random.Random, value: Any) -> Any:
    """A value like this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return draw.choice(
            (value + 1, value - 1, -value, 2 * value, value / 2, str(value), [value])
        )
    if isinstance(value, str):
        return draw.choice((value + "x", value[1:], value.upper(), value[::-1], [value]))
    if isinstance(value, list):
        return draw.choice((value[1:], value[::-1], value + value, [value], tuple(value[:1])))
    return draw.choice(([], {}, [value], "", 0))


def damage_file(draw: random.Random, path: Path) -> None:
    """Cut off, empty, remove, rename, extend or overwrite a part of a file."""
    content = path.read_bytes()
    size = len(content)
    kind = draw.choice(("cut", "cut", "empty", "remove", "rename", "extend", "noise"))
    if kind == "remove":
        path.unlink()
    elif kind == "rename":
        path.rename(path.with_name("x" + path.name))
    else:
        at = draw.randrange(size + 1)
        head = draw.randrange(min(size, 400) + 1)  # where a header is
        path.write_bytes(
            {
                "cut": content[:at],
                "empty": b"",
                "extend": content + b"\0" * draw.randrange(1, 9),
                "noise": content[:head] + draw.randbytes(4) + content[head + 4 :],
            }[kind]
        )


def damage_tensors(draw: random.Random, path: Path) -> None:
    """Change names, shapes, types or values of what is in a safetensors file."""
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = draw.choice(("drop", "rename", "shape", "longer", "dtype", "nan", "swap"))
    if kind == "rename":
        tensors[name + "x"] = tensor
    elif kind == "shape":
        tensors[name] = tensor.reshape(-1)
    elif kind == "longer":
        tensors[name] = torch.cat([tensor.reshape(-1)] * 2)
    elif kind == "dtype":
        tensors[name] = tensor.to(draw.choice((torch.int32, torch.float64, torch.bool)))
    elif kind == "nan":
        tensors[name] = torch.full_like(tensor.float(), math.nan)
    elif kind == "swap":
        other = draw.choice(sorted(tensors) or [name])
        tensors[name] = tensors.get(other, tensor).clone()
    save_file(tensors or {"x": torch.zeros(1)}, path, {"format": "pt"})


def write_tree(draw: random.Random, path: Path, tree: Any) -> list[str]:
    """Write a mutated tree as JSON, seldom a damaged file; the names of what was changed."""
    if draw.random() < 0.08:
        path.write_text(json.dumps(tree))
        damage_file(draw, path)
        return []
    changed, names = mutate(draw, tree)
    if draw.random() < 0.03:
        changed = draw.choice(VALUES)
    path.write_text(json.dumps(changed))
    return names


def run_cases(
    case: Callable[[random.Random, Path], str | None], seeds: Iterable[int], folder: Path
) -> list[str]:
    """Run a case for each seed, in a folder of its own; what went wrong, by its seed."""
    wrong = []
    for seed in seeds:
        (place := folder / str(seed)).mkdir()
        try:
            with time_limit():
                fault = case(random.Random(seed), place)
        except (Exception, TookTooLongError) as error:
            frames = traceback.extract_tb(error.__traceback__)
            at = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
            fault = f"{type(error).__name__}: {str(error)[:300]} ({', '.join(at[-4:])})"
        if fault is not None:
            wrong.append(f"seed {seed}: {fault}")
        shutil.rmtree(place)
    return wrong
