"""Layout of a folder of files, decided from their list alone."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from elit._listing import files_of
from elit.preparation.columns import in_order
from elit.preparation.images import picture_suffixes
from elit.preparation.settings import NONE, PrepareSettings
from elit.preparation.tables import (
    BUILDERS,
    TABLES,
    as_table,
    file_column,
    load_files,
    read_rows,
    read_tars,
)

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
_OF_NAME = {word: split for split, words in _SPLITS.items() for word in words}
_SHARD = re.compile(r"(?:.+-)?([a-z]+)-\d{5}-of-\d{5}|([a-z]+)(?:[-_.]?\d[\w.-]*)?")
_VIDEOS = frozenset((".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"))
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
PACKED = (".tar", *BUILDERS)
SUFFIXES = (*PACKED, *TABLES)
_TEXTS = (".txt", ".caption")
_ARCHIVES = frozenset((".zip", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"))
_UNREADABLE = frozenset((".heic", ".heif", ".jxl", ".avif", ".cr2", ".nef", ".arw", ".dng"))
Parts = dict[Path, tuple[str, ...]]


class Layout:
    """The tables of a source by split, and what there is to say of it."""

    def __init__(self, settings: PrepareSettings):
        self.settings = settings
        self.tables: dict[str, Any] = {}  # of datasets, by split
        self.files: list[Path] = []  # with all rows; none where each picture is a file of its own
        self.notes: list[str] = []  # what was decided
        self._left: list[str] = []
        videos = _VIDEOS if settings.frames else frozenset()
        self._pictures = picture_suffixes() | videos

    def read(self) -> None:
        """Read a folder, a file, or a pattern of them, as the list of the files says."""
        path = Path(self.settings.source).absolute()
        files, hidden = [path], list[str]()
        if path.is_dir():
            _refuse_configs(path)
            files, hidden = files_of(path)
        elif not path.exists():
            parts = path.parts
            fixed = next(i for i, part in enumerate(parts) if "*" in part)
            path = Path(*parts[:fixed])
            files = sorted(f for f in path.glob("/".join(parts[fixed:])) if not f.is_dir())
            if not files:
                raise ValueError(f"no file fits {self.settings.source}; give another pattern")
        self.root = path if path.is_dir() else path.parent
        self._refuse_unread(files)
        if pictures := [f for f in files if f.suffix.lower() in self._pictures]:
            self._read_pictures(files, pictures)
        else:
            self._read_tables(files)
        if left := self._left + hidden:
            self.notes.append(f"left out: {len(left)}, such as {_listed(left)}")

    def _refuse_unread(self, files: list[Path]) -> None:
        """Raise a ValueError for rows that would be left out: packed, or of an unknown kind."""
        for kinds, what, advice in (
            (_ARCHIVES, "archive", "unpack it, or move it elsewhere"),
            (_UNREADABLE - self._pictures, "picture that Pillow cannot read", "convert it to PNG"),
        ):
            if unread := [f for f in files if f.suffix.lower() in kinds]:
                raise ValueError(f"{self.root} has {self._count(unread, what)}; {advice}")

    # ---- pictures, each a file ----

    def _read_pictures(self, files: list[Path], pictures: list[Path]) -> None:
        metadata = [f for f in files if f.name.lower() in _METADATA]
        if packed := [f for f in files if f.suffix.lower() in PACKED and f not in metadata]:
            raise ValueError(
                f"{self.root} holds {self._count(pictures, 'picture')}, and "
                f"{self._count(packed, 'file of many rows')}; give one kind alone, such as "
                f"{str(self.root / ('*' + packed[0].suffix))!r}"
            )
        splits = self._by_split(pictures)
        texts = {}
        if self.settings.caption_column != NONE:
            texts = _texts_beside(files, pictures)
        if metadata and texts:
            raise ValueError(
                f"{self.root} has {self._count(list(texts.values()), 'text')}, beside pictures, "
                f"and {metadata[0].name}; put the captions into one of them, or leave them out "
                f"with --caption-column {NONE}"
            )
        if metadata:
            rows = self._by_metadata(metadata, pictures)
        else:
            rows = [(picture, {"image": str(picture)}) for picture in pictures]
            labels, captions = self._labels(splits), self._captions(pictures, texts)
            for picture, row in rows:
                row |= {"label": labels[picture]} if labels[picture] is not None else {}
                row |= {"caption": captions[picture]} if captions else {}
        for split, of_split in splits.items():
            of_them = [row for picture, row in rows if picture in of_split]
            where = metadata[0] if metadata else self.root
            self.tables[split] = as_table(of_them, where, self._left, "image")
        left = set(files) - {*pictures, *metadata, *texts.values()}
        spare = [f for f in files if f in left and f.suffix.lower() in TABLES]
        self._left += [self._name(f) for f in files if f in left and f not in spare]
        if spare:
            self.notes.append(
                f"{self._count(spare, 'table')}, not read: beside pictures only "
                f"{', '.join(_METADATA)} are"
            )

    def _by_split(self, pictures: list[Path]) -> dict[str, Parts]:
        """Pictures by the folders named like splits that they lie in, if all do; paths below."""
        above = len(self.root.parts)
        parts = _below_one({p: p.parts[above:] for p in pictures}, keep=True)
        tops = {names[0] if len(names) > 1 else "" for names in parts.values()}
        if not all(top.lower() in _OF_NAME for top in tops):
            flat = {names[0] for names in parts.values() if len(names) == 2}
            deep = {n[0] for n in parts.values() if len(n) > 2 and n[0].lower() in _OF_NAME} - flat
            if deep:
                others = [top or "pictures" for top in sorted(tops - deep)]
                raise ValueError(
                    f"{self.root} has the splits {_listed(sorted(deep))}, and beside them "
                    f"{_listed(others)}; move those into one, or elsewhere"
                )
            return {"train": parts}
        splits: dict[str, Parts] = {split: {} for split in _SPLITS}
        for picture, names in parts.items():
            splits[_OF_NAME[names[0].lower()]][picture] = names[1:]
        return {split: of_split for split, of_split in splits.items() if of_split}

    def _labels(self, splits: dict[str, Parts]) -> dict[Path, str | None]:
        """The class of each picture: the folder below its split that it lies in."""
        parts = _below_one({p: names for of in splits.values() for p, names in of.items()})
        labels = {p: names[0] if len(names) > 1 else None for p, names in parts.items()}
        classes = in_order({name for name in labels.values() if name is not None})
        if self.settings.label_column == NONE or not classes:
            root = len(self.root.parts)
            tops = {p.parts[root] if len(p.parts) > root + 1 else "" for p in labels}
            if len(tops) == 1 and "" not in tops and not tops & _OF_NAME.keys() and not classes:
                self.notes.append(f"one folder alone, {tops.pop()}, is no class")
            return dict.fromkeys(labels)
        for split, of_split in splits.items():
            without = [p for p in of_split if labels[p] is None]
            if without and len(without) < len(of_split):
                raise ValueError(
                    f"{split} has {self._count(without, 'picture')}, beside the folders of "
                    f"its classes, {_listed(classes)}; move them into one, or leave classes out "
                    f"with --label-column {NONE}"
                )
        self.notes.append(f"classes are the folders {_listed(classes)}")
        return labels

    def _captions(self, pictures: list[Path], texts: dict[Path, Path]) -> dict[Path, str]:
        """The text beside each picture; none at all if there are no texts."""
        if not texts:
            return {}
        lack = [p for p in pictures if p.with_suffix("") not in texts]
        kinds = " or ".join(sorted({file.suffix.lower() for file in texts.values()}))
        self.notes.append(f"captions, from the {kinds} file beside each picture")
        if lack:
            self.notes.append(
                f"{self._count(lack, 'picture')}, without {kinds}: the caption is empty"
            )
        captions = dict.fromkeys(pictures, "")
        for picture in pictures:
            if file := texts.get(picture.with_suffix("")):
                try:
                    captions[picture] = file.read_text(encoding="utf-8-sig").strip()
                except ValueError as error:
                    raise ValueError(f"{file} is no UTF-8 ({error}); save it as such") from error
        return captions

    def _by_metadata(
        self, metadata: list[Path], pictures: list[Path]
    ) -> list[tuple[Path, dict[str, Any]]]:
        """Rows of metadata files, each with its picture; all pictures must be in one of them."""
        twice = [folder for folder, n in Counter(f.parent for f in metadata).items() if n > 1]
        if twice:
            raise ValueError(f"{twice[0]} has several of {', '.join(_METADATA)}; leave one")
        there, known = {os.path.normpath(p): p for p in pictures}, set(pictures)
        rows: list[tuple[Path, dict[str, Any]]] = []
        named: dict[Path, Path] = {}
        for file in metadata:
            of_file = read_rows(file)
            column = file_column(of_file, file)
            for row in of_file:
                name = os.path.normpath(file.parent / str(row.pop(column)))
                picture = there.get(name, Path(name))
                if named.setdefault(picture, file) != file:
                    raise ValueError(f"{picture} is in {file} and {named[picture]}; leave one")
                rows.append((picture, {**row, "image": str(picture)}))
        missing = [p for p in named if p not in known]
        absent = [p for p in pictures if p not in named]
        if missing or absent:
            what = (
                f"names {self._count(missing, 'file')}, that is no picture there"
                if missing
                else f"does not name {self._count(absent, 'picture')}"
            )
            raise ValueError(f"{metadata[0]} {what}; make its file_name and the folder agree")
        self.notes.append(f"columns from {_listed(map(self._name, metadata))}, none from folders")
        if len(rows) > len(named):
            self.notes.append(f"{len(named)} pictures, of which some have several rows")
        return rows

    # ---- files of many rows ----

    def _read_tables(self, files: list[Path]) -> None:
        kinds = {s: [f for f in files if f.suffix.lower() == s] for s in SUFFIXES}
        parquet, tar = kinds[".parquet"], kinds[".tar"]
        if tar and {f.with_suffix("") for f in parquet} <= {f.with_suffix("") for f in tar}:
            kinds[".parquet"] = []  # as img2dataset writes them, of the same rows
        there = [s for s in PACKED if kinds[s]] or [s for s in TABLES if kinds[s]]
        if len(there) != 1:
            others = Counter(f.suffix.lower() or f.name for f in files)
            listed = _listed(f"{n} {suffix}" for suffix, n in others.most_common())
            videos = any(f.suffix.lower() in _VIDEOS for f in files)
            raise ValueError(
                f"{self.root} holds {'no pictures' if not there else 'tables of several kinds'}: "
                f"{listed or 'no files'}; give "
                + ("--frames to make clips of the videos" if videos and not there else
                   "a folder of pictures, of parquet or of tar files, such a file, or a name on "
                   "the hub")
            )  # fmt: skip
        (kind,) = there
        self.files = kinds[kind]
        self._left += [self._name(f) for f in files if f not in set(self.files)]
        named = {f: _split_of(f.relative_to(self.root)) for f in self.files}
        plain = [f for f, split in named.items() if split is None]
        if plain and len(plain) < len(named):
            self.notes.append(
                f"{self._count(plain, 'file')}, named like no split: so all rows are train"
            )
        splits: dict[str, list[Path]] = {}
        for file, split in named.items():
            splits.setdefault("train" if plain else split or "", []).append(file)
        for split, of_split in splits.items():
            if kind == ".tar":
                self.tables[split] = read_tars(of_split, self._pictures | _VIDEOS, self._left)
            elif kind in TABLES:
                rows = [row for file in of_split for row in read_rows(file)]
                self.tables[split] = as_table(rows, of_split[0], self._left)
            else:
                self.tables[split] = load_files(kind, of_split)

    def _name(self, file: Path) -> str:
        """A file's path below the source, or its full path."""
        return str(file.relative_to(self.root) if file.is_relative_to(self.root) else file)

    def _count(self, files: Sequence[Path], what: str) -> str:
        """How many there are, in words, and the first of them."""
        if len(files) > 1:
            noun, space, rest = what.partition(" ")
            what = f"{noun}s{space}{rest}"
        return f"{len(files)} {what}, such as {self._name(files[0])}"


def _split_of(path: Path) -> str | None:
    """Split that a file's folder, or its name, says."""
    of_folders = [_OF_NAME[p.lower()] for p in path.parts[:-1] if p.lower() in _OF_NAME]
    match = _SHARD.fullmatch(path.stem.lower())
    return of_folders[-1] if of_folders else match and _OF_NAME.get(match[1] or match[2])


def _texts_beside(files: list[Path], pictures: list[Path]) -> dict[Path, Path]:
    """Files of text by the place, a path without its ending, of the pictures they belong to."""
    places, texts = {p.with_suffix("") for p in pictures}, dict[Path, Path]()
    for file in files:
        place = file.with_suffix("")
        if file.suffix.lower() in _TEXTS and place in places:
            if place in texts:
                raise ValueError(f"{texts[place]} and {file} are of one picture; leave one")
            texts[place] = file
    return texts


def _below_one(parts: Parts, keep: bool = False) -> Parts:
    """Paths from below the folders that all share; `keep` one that is named like a split."""
    while len({n[0] if len(n) > 1 else "" for n in parts.values()}) == 1:
        first = next(iter(parts.values()))
        if len(first) == 1 or (keep and first[0].lower() in _OF_NAME):
            break
        parts = {path: names[1:] for path, names in parts.items()}
    return parts


def _refuse_configs(folder: Path) -> None:
    """A copy of a data set of the hub with several configurations: they are not one."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = text.split("\n---", 1)[0] if text.startswith("---") else ""
    names = re.findall(r"^\s*-?\s*config_name:\s*(\S+)", header, re.MULTILINE)
    if len(set(names)) > 1:
        raise ValueError(
            f"{card} tells of several data sets, {_listed(dict.fromkeys(names))}; give the folder "
            f"or a pattern of one"
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
