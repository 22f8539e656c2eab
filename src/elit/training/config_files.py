"""The config of a run: defaults < base of the YAML file < the file < the command line."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import elit
from elit._choices import ADVICE, SYNONYMS, hint_at, nearest
from elit._files import typed_path
from elit._plain import describe_type, fits_type, from_plain
from elit.training.config import TrainConfig

FROM_BASE = ("seed", "data", "text", "objective")  # what a fine-tuning takes from its base's run
_ODD = re.compile(r"[-+]?0_*[0-7]|.*:")  # 010 is 8, and 1:30 is 90
BASE = "base"  # key of a YAML file: another one, whose values hold where this one has none


@dataclasses.dataclass(frozen=True)
class Field:
    """A leaf of the tree of dataclasses: its dotted key, type, default and description."""

    key: str
    hint: Any
    default: Any
    about: str

    @property
    def is_mapping(self) -> bool:
        """Whether keys of the user's choice may follow."""
        return typing.get_origin(self.hint) is dict


def config_fields(config_class: type = TrainConfig, prefix: str = "") -> Iterator[Field]:
    """The leaves of a tree of dataclasses, in order."""
    hints, about = typing.get_type_hints(config_class), _attribute_docs(config_class)
    defaults = config_class()
    for field in dataclasses.fields(config_class):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from config_fields(typing.cast(type, hint), f"{key}.")
        else:
            yield Field(key, hint, getattr(defaults, field.name), about[field.name])


def find_config(name: str, of: Path | None = None) -> Path:
    """A YAML file by its path, or a built-in one by its name; the base of a file lies beside it."""
    path = (of.parent if of is not None else Path()) / typed_path(name)
    built_in = built_in_configs()
    if path.is_file():
        return path
    if name in built_in:
        return built_in[name]
    what = f"config {name}" if of is None else f"{of}: {BASE} {name}"
    if path.is_dir():
        raise ValueError(f"{what} is a folder; give the YAML file in it")
    near = _near_built_in(name)
    names = f"ones: did you mean {near}? They are {built_in_names()}" if near else built_in_names()
    raise ValueError(f"{what} is neither a file nor one of the built-in {names}")


def built_in_configs() -> dict[str, Path]:
    """The configs that come with the package, or lie beside it in a checkout, by name.

    The name is the path without `.yaml`. What begins with `_` only serves others as their base.
    """
    package = Path(elit.__file__).parent
    for folder in (package / "configs", package.parents[1] / "configs"):
        found = [path for path in folder.rglob("*.yaml") if not path.name.startswith("_")]
        names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}
        if names:
            return dict(sorted(names.items(), key=lambda item: ("/" in item[0], item[0])))
    return {}


def built_in_names() -> str:
    """The names of the built-in configs, those of a folder in braces."""
    folders: dict[str, list[str]] = {}
    for name in built_in_configs():
        folder, slash, stem = name.rpartition("/")
        folders.setdefault(folder + slash, []).append(stem)
    parts = [
        f"{folder}{{{','.join(stems)}}}" if folder and len(stems) > 1 else folder + ", ".join(stems)
        for folder, stems in folders.items()
    ]
    return ", ".join(parts)


def _near_built_in(name: str) -> str | None:
    """The built-in config that is meant by a name or a path, if any is."""
    named: dict[str, list[str]] = {}
    for known in built_in_configs():
        named.setdefault(known.rpartition("/")[2], []).append(known)
    meant = named.get(nearest(Path(name).stem, named) or "", [])
    return (nearest(name, meant) if "/" in name else None) or next(iter(meant), None)


def load_config(
    config: str | None, overrides: Mapping[str, Any], under: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The config of a file or a built-in name over its base, and the command line over it.

    Args:
        config: as for `find_config`; None starts from the defaults.
        overrides: dotted key: value, as typed where it is text.
        under: sections and keys that the file may change.
    """
    values: dict[str, Any] = {}
    _put(values, under or {}, "retrofit.base")
    for path, own in read_chain(find_config(config)) if config is not None else []:
        _put(values, own, str(path))
    fields = {field.key: field for field in config_fields()}
    for key, text in overrides.items():
        section, _, name = key.rpartition(".")
        if section in fields and fields[section].is_mapping:
            value = read_flag(key, text) if isinstance(text, str) else text
            values[section] = {**values.get(section, {}), name: value}
            continue
        if key not in fields:
            raise ValueError(f"unknown key {key}: {_meant(key, fields)}")
        hint = fields[key].hint
        typed = isinstance(text, str) and not _is_text(hint, text)
        value = read_flag(key, text) if typed else text
        values[key] = from_plain(hint, value, f"--{key}")
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return from_plain(TrainConfig, tree)


def _put(values: dict[str, Any], tree: Mapping[str, Any], where: str) -> None:
    """Put what a file holds over what is known, by dotted keys, or raise what is wrong with it."""
    fields = {field.key: field for field in config_fields()}
    sections = {key.rpartition(".")[0]: key for key in reversed(fields) if "." in key}
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in sections:
            leaves[name] = value
        elif isinstance(value, Mapping):
            leaves |= {f"{name}.{inner}": one for inner, one in value.items()}
        elif value is not None:  # a section with nothing under it
            raise ValueError(
                f"{where}: {name} is {value!r}, but it is a section; "
                f"write keys under it, such as {sections[name]}"
            )
    for key, value in leaves.items():
        if key not in fields:
            raise ValueError(f"{where}: unknown key {key}: {_meant(str(key), fields)}")
        field = fields[key]
        if field.is_mapping:
            given = from_plain(field.hint, {} if value is None else value, f"{where}: {key}")
            values[key] = {**values.get(key, {}), **given}
        elif value is None and not fits_type(None, field.hint):
            raise ValueError(
                f"{where}: {key} has no value; give {describe_type(field.hint)}, or leave it out"
            )
        else:
            values[key] = from_plain(field.hint, value, f"{where}: {key}")


def _meant(key: str, keys: Iterable[str]) -> str:
    """The nearest of the keys beside it, else of all keys, else what there is."""
    everywhere = {known.rpartition(".")[2]: known for known in keys}
    section, dot, name = key.rpartition(".")
    if key in everywhere:  # at the top, what belongs into a section
        return f"did you mean {everywhere[key]}?"
    if (name in SYNONYMS or name in ADVICE) and (hint := hint_at(name, keys, "")):
        return hint
    inside = [known for known in keys if dot and known.startswith(f"{section}.")]
    siblings = inside or [BASE, *(known.partition(".")[0] for known in keys)]
    beside = {known.removeprefix(f"{section}."): known for known in siblings}
    for names in (beside, everywhere):
        if near := nearest(name, names):
            return f"did you mean {names[near]}?"
    return f"use one of {', '.join(beside.values())}"


def settings_of_base(base: str) -> dict[str, Any]:
    """What a fine-tuning takes over from the run that trained its base, by `load_config`'s `under`.

    Args:
        base: folder of a pipeline, or its name on the hub.
    """
    from elit.pipelines.folder import may_be_on_hub

    if not (Path(base).is_dir() or may_be_on_hub(base)):
        raise ValueError(
            f"there is no folder {base}; give the output_dir of `elit train`, or a folder "
            f"that save_pretrained wrote; `hf download NAME --local-dir FOLDER` fetches one"
        )
    file = Path(base) / "config.yaml"
    trained = read_yaml(file) if file.exists() else {}
    taken = {key: trained[key] for key in FROM_BASE if key in trained}
    if isinstance(taken.get("objective"), Mapping):  # the base itself says what it predicts
        taken["objective"] = {k: x for k, x in taken["objective"].items() if k != "prediction_type"}
    return {**taken, "retrofit": {"base": base}}


def config_of_run(run: str) -> TrainConfig | None:
    """The config that a run was trained by; None where its folder has none."""
    file = Path(run) / "config.yaml"
    return load_config(str(file), {}) if file.is_file() else None


def _is_text(hint: Any, text: str) -> bool:
    """Whether what was typed stands for itself."""
    is_literal = typing.get_origin(hint) is Literal
    return is_literal or hint is str or (hint == (str | None) and text != "null")


def read_flag(key: str, text: str) -> Any:
    """The value of a flag, as YAML has it."""
    try:
        return _load_yaml(text)
    except ValueError as error:
        raise ValueError(f"--{key} is {text!r:.80}, which is not YAML: {error}") from error


def read_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A file and those that it stands on by `base`, the lowest first, each with its own values."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    while True:
        if any(path.resolve() == known.resolve() for known, _ in chain):
            around = " -> ".join(str(known) for known in (*(p for p, _ in reversed(chain)), path))
            raise ValueError(f"a config can't be its own base: {around}; remove one `{BASE}`")
        values = read_yaml(path)
        chain.insert(0, (path, values))
        if BASE not in values:
            return chain
        base = values.pop(BASE)
        if not isinstance(base, str) or not base:
            raise ValueError(
                f"{path}: {BASE} is {base!r}; give one file, relative to this one, or leave it out"
            )
        path = find_config(base, of=path)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a file, or a ValueError that says why there are none."""
    try:
        content = _load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds {content!r:.60} where a config is expected; "
            f"write keys and values, such as `train: {{steps: 1000}}`"
        )
    return content


def _load_yaml(text: str) -> Any:
    """Plain values of YAML, or a ValueError of one line."""
    import yaml

    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_object(node, deep=True)
    except RecursionError:
        raise ValueError("it is too deep; write it out") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date that is none, not UTF-8
        raise ValueError(" ".join(str(error).split())) from error


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses what YAML 1.1 takes for something else: of a key given twice it has the last."""

        def construct_scalar(self, node: Any) -> Any:
            if node.tag.endswith((":int", ":float")) and _ODD.match(node.value):
                raise ValueError(
                    f"{node.value} is no plain number; write it in decimals, or in quotes"
                )
            return super().construct_scalar(node)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"key {name} is given twice; remove one of them")
            return super().construct_mapping(node, deep)

    exponent = re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$")  # YAML 1.1 has 8e-3 for text
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, [*"-+0123456789"])
    return Loader


def _attribute_docs(config_class: type) -> dict[str, str]:
    """Descriptions of a dataclass's attributes, from its docstring."""
    lines = (inspect.getdoc(config_class) or "").partition("Attributes:\n")[2].splitlines()
    docs: dict[str, str] = {}
    for line in lines:
        name, colon, text = line.strip().partition(": ")
        if line.startswith("    ") and not line.startswith("     ") and colon:
            docs[name] = text
        elif docs and line.strip():
            docs[next(reversed(docs))] += f" {line.strip()}"
    return docs
