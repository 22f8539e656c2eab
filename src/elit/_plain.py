"""Plain values, as JSON and YAML have them, checked against the types that are wanted."""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, Literal

from elit._choices import check_choice
from elit._numbers import is_real

_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_UNIONS, _LISTS = (typing.Union, types.UnionType), (list, tuple, Sequence)


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file, or a ValueError that says why there is none and what to do."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; {advice}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}), perhaps cut off; {advice}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.60} instead of a JSON object; {advice}")
    return content


def from_plain(hint: Any, value: Any, where: str = "", wrong: ValueError | None = None) -> Any:
    """A value of a type, dataclasses included, or a ValueError that says what doesn't fit.

    Args:
        hint: the type.
        value: of plain types.
        where: what is in front of the names in messages.
        wrong: error of the whole that the value is a part of, where that is clearer.
    """
    if wrong is None:
        wrong = ValueError(f"{where} is {value!r:.80}; give {describe_type(hint)}")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in _UNIONS:
        if value is None and type(None) in args:
            return None
        for kind in (arg for arg in args if arg is not type(None)):
            try:
                return from_plain(kind, value, where, wrong)
            except ValueError as error:
                reason = error if dataclasses.is_dataclass(kind) else wrong
        raise reason
    if origin is Literal:
        check_choice(value, args, "value", f" of {where}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _object(typing.cast(type, hint), value, where)
    if origin is dict and isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {key: from_plain(args[1], one, _under(where, key)) for key, one in value.items()}
    if origin in _LISTS and isinstance(value, (list, tuple)):
        fixed = origin is tuple and args[-1] is not Ellipsis
        kinds = args if fixed else args[:1] * len(value)
        if len(kinds) == len(value):
            items = [
                from_plain(k, v, f"{where}[{i}]", None if dataclasses.is_dataclass(k) else wrong)
                for i, (k, v) in enumerate(zip(kinds, value, strict=True))
            ]
            return items if origin is list else tuple(items)
    elif hint is float:
        if is_real(value):
            return float(value)
    elif hint is int:
        if isinstance(value, Integral) and not isinstance(value, bool):
            return int(value)
    elif type(value) is hint:
        return value
    raise wrong


def _object(kind: type, value: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    for name in value:
        check_choice(name, hints, "key", f" of {where.strip(' :')}" if where else "")
    for field in dataclasses.fields(kind):
        optional = field.default, field.default_factory
        if field.name not in value and optional == (dataclasses.MISSING,) * 2:
            raise ValueError(f"{_under(where, field.name)} is missing")
    return kind(
        **{name: from_plain(hints[name], one, _under(where, name)) for name, one in value.items()}
    )


def _under(where: str, name: str) -> str:
    return f"{where}.{name}" if where and where[-1] not in " -" else f"{where}{name}"


def fits_type(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type."""
    try:
        from_plain(hint, value)
    except ValueError:
        return False
    return True


def describe_type(hint: Any) -> str:
    """A type in words: int | None -> 'a whole number, or null'."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _TYPES:
        return _TYPES[hint]
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple and args[-1] is not Ellipsis:
        return f"{len(args)} numbers, such as [0.9, 0.99]"
    if origin in _LISTS:
        examples: dict[Any, str] = {
            int: "whole numbers, such as [4, 4]",
            float: "numbers, such as [1, 0.5]",
            float | str: "budgets, such as [1, 1/4]",
        }
        return f"a list of {examples.get(args[0], 'its own kind')}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "keys with values, such as {count: 500}"
    if origin in _UNIONS:
        inner = [describe_type(arg) for arg in args if arg is not type(None)]
        return " or ".join(inner) + (", or null" if len(inner) < len(args) else "")
    return str(hint)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which values a field may hold beside what its type says: a part of `Annotated[type, Rule]`.

    Attributes:
        allows: tells whether a value is allowed.
        words: what is allowed.
    """

    allows: Callable[[Any], Any]
    words: str


def check_fields(value: Any, where: str = "") -> None:
    """Raise a ValueError for a value in a tree of dataclasses that its words or rules exclude."""
    for name, hint in typing.get_type_hints(type(value), include_extras=True).items():
        held, key = getattr(value, name), _under(where, name)
        if dataclasses.is_dataclass(held):
            check_fields(held, key)
        else:
            _check_field(hint, held, key)


def _check_field(hint: Any, held: Any, key: str, end: str = "") -> None:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS and held is not None:
        for kind in args:
            _check_field(kind, held, key, ", or null" if type(None) in args else "")
    elif origin is Literal:
        check_choice(held, args, key)
    elif origin is Annotated:
        for rule in args[1:]:
            if not rule.allows(held):
                raise ValueError(f"{key}={held!r} is not allowed; give {rule.words}{end}")
