"""Columns of pictures, labels and texts in a source, and its classes."""

from collections.abc import Sequence
from typing import Any

from elit._choices import check_choice
from elit.preparation.settings import NONE

IMAGE_NAMES = (
    "image", "images", "img", "jpg", "jpeg", "png", "webp", "video", "mp4", "gif", "clip"
)  # fmt: skip
LABEL_NAMES = ("label", "labels", "class", "cls", "fine_label", "category")
CAPTION_NAMES = ("caption", "text", "captions", "txt", "prompt", "description")
_STORED = ("binary", "large_binary", "string", "large_string")  # pictures, or their paths
MOST_CLASSES = 100_000


def find_image(features: Any, name: str | None) -> str:
    """The column of pictures, by its type or name."""
    if name is not None:
        check_choice(name, features, "image_column")
    typed = [n for n, f in features.items() if _is_shown(f)]
    named = [n for n in features if n.lower() in IMAGE_NAMES]
    candidates = [name] if name is not None else typed or named
    if len(candidates) != 1:
        what = f"several columns of pictures: {', '.join(candidates)}"
        if not candidates:
            what = f"no column of pictures among {', '.join(features) or 'no columns'}"
        raise ValueError(f"the source has {what}; name it with --image-column")
    feature = features[candidates[0]]
    dtype = str(getattr(feature, "dtype", ""))
    has_bytes = isinstance(feature, dict) and "bytes" in feature
    if not (_is_shown(feature) or has_bytes or dtype in _STORED):
        raise ValueError(
            f"image_column {candidates[0]!r} holds {feature}; give a column of pictures"
        )
    return candidates[0]


def _is_shown(feature: Any) -> bool:
    """Tell whether a column's type alone says that it holds pictures."""
    return type(feature).__name__ in ("Image", "Video") or (
        isinstance(feature, dict) and "offset" in feature  # of a tar file
    )


def find_column(features: Any, name: str | None, what: str) -> str | None:
    """The column of labels or captions that is named, or the first of a usual name; or None."""
    if name == NONE:
        return None
    if name is None:
        lower = {column.lower(): column for column in features}
        usual = LABEL_NAMES if what == "label" else CAPTION_NAMES
        name = next((lower[usual_name] for usual_name in usual if usual_name in lower), None)
        if name is None:
            return None
    check_choice(name, features, f"{what}_column")
    feature = features[name]
    item = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    dtype, of_item = (str(getattr(kind, "dtype", "")) for kind in (feature, item))
    if what == "label":
        fits = any(kind in dtype for kind in ("int", "string", "bool", "float"))
    else:  # perhaps several texts of one picture
        fits = "int" in dtype or "string" in of_item
    if not fits:
        raise ValueError(
            f"{what}_column {name!r} holds {feature}; give one of a fitting type, or {NONE} to "
            f"leave it out"
        )
    return name


def in_order(names: set[Any]) -> list[Any]:
    """Sort names of classes; where all are numbers, 2 is before 10."""
    is_counted = all(isinstance(name, str) and name.isdecimal() for name in names)
    return sorted(names, key=(lambda name: (len(name), name)) if is_counted else None)


def find_classes(tables: list[Any], label: str | None) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Names of the classes and, where the column has names and not numbers, their numbers."""
    if label is None:
        return (), {}
    feature, *others = (table.features[label] for table in tables)
    for other in others:
        if other != feature and (hasattr(feature, "names") or hasattr(other, "names")):
            raise ValueError(
                f"the splits number the classes of {label!r} in different ways, {feature} and "
                f"{other}; give splits that agree"
            )
    if hasattr(feature, "names"):
        return tuple(feature.names), {}
    values = {v for table in tables for v in table.unique(label) if v not in (None, "") and v == v}
    kinds = {type(v) if isinstance(v, str | bool) else float: v for v in values}
    if len(kinds) > 1:
        first, other, *_ = map(repr, kinds.values())
        raise ValueError(
            f"label_column {label!r} holds values of several types, such as {first} and {other}; "
            f"give all of all splits one type, such as text"
        )
    if not kinds.keys() & {float}:
        ordered = in_order({False, True} if bool in kinds else values)
        names: Sequence[Any] = ordered
        numbers: dict[Any, int] = {value: number for number, value in enumerate(ordered)}
    elif any(value % 1 for value in values):
        raise ValueError(
            f"label_column {label!r} holds numbers such as {next(v for v in values if v % 1)}; "
            f"give one of whole numbers or names, or {NONE} to leave it out"
        )
    else:
        names, numbers = range(int(max(values, default=-1)) + 1), {}
    if len(names) > MOST_CLASSES:
        raise ValueError(
            f"the column {label!r} makes {len(names)} classes; name another with --label-column, "
            f"or leave labels out with --label-column {NONE}"
        )
    return tuple(map(str, names)), numbers
