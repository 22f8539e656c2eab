"""Pipelines whose folders load anywhere: code that diffusers runs, a model card, the hub."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

CARD_FILE = "README.md"
CODE_NAME = "pipeline"  # the module that a folder's index names, and diffusers' own name for it
_CODE = '''\
"""For diffusers: DiffusionPipeline.from_pretrained({load}). It imports elit, no more."""

import importlib

try:
    for name in {modules!r}:
        importlib.import_module(name)
    Pipeline = getattr(importlib.import_module({home!r}), {name!r})
except (ImportError, AttributeError) as error:
    advice = f"this pipeline needs elit, by its distribution elit-diffusion ({{error}})"
    raise ImportError(advice) from error


def __getattr__(name):
    if name == Pipeline.__name__:
        return Pipeline
    raise AttributeError(name)
'''
_CARD = """\
---
license: {license}
library_name: diffusers
{pipeline_tag}tags: [elit, {tags}]
---

# {title}

{about}

{table}

## Use

`"."` is this folder: from elsewhere give its path, or its name on the hub. All of it needs elit,
whose distribution is called `elit-diffusion`: PyPI's `elit` is another project.

With elit:

```python
{elit}
```

By diffusers' name, which runs this folder's `pipeline.py`:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({load})
{call}
```

On the command line:

```bash
{command}
```

## Licence

{licence}
"""


@dataclass(frozen=True)
class Card:
    """What a model card tells of a pipeline."""

    title: str
    about: str
    table: Sequence[Sequence[str]]  # of its budgets, names first
    tags: str
    pipeline_tag: str | None  # of the hub, where it has one
    elit: str  # lines of Python that load it as `pipe` and draw
    call: str  # those that draw alone
    command: str


class PortablePipeline:
    """Saves what other programs need to load a pipeline of diffusers' and to know what it is."""

    portable_name: tuple[str, str] | None  # module and name that it is imported by, if it is elit's
    load_by = "FOLDER, trust_remote_code=True"

    def model_card(self) -> Card:
        """What the model card tells."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        license: str | None = None,  # noqa: A002, as the hub calls it
        **kwargs: Any,
    ) -> Any:
        """Save as diffusers does, with `pipeline.py` and, if there is none, a model card.

        Args:
            save_directory: folder to write.
            push_to_hub: whether to upload it too; `repo_id`, `token`, `private`, `commit_message`
                and `create_pr` are diffusers'. A model card on the hub stays as it is.
            license: of the weights, by the hub's names, such as "apache-2.0", for the model card.
            **kwargs: as diffusers' pipelines take them.
        """
        folder, self_ = Path(save_directory), cast(Any, self)
        names = ("repo_id", "token", "private", "commit_message", "create_pr", "subfolder")
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        cast(Any, super()).save_pretrained(str(folder), **kwargs)
        variant = kwargs.get("variant")
        load = self.load_by + (f', variant="{variant}"' if variant else "")
        if self.portable_name is not None:
            home, name = self.portable_name
            parts = [part[0] for part in self_.config.values() if isinstance(part, list | tuple)]
            modules = sorted({part for part in parts if str(part).startswith("elit.")})
            code = _CODE.format(load=load, modules=modules, home=home, name=name)
            (folder / f"{CODE_NAME}.py").write_text(code, encoding="utf-8")
        if not (folder / CARD_FILE).exists():
            text = _card(self.model_card(), load.replace("FOLDER", '"."'), license)
            (folder / CARD_FILE).write_text(text, encoding="utf-8")
        return _upload(folder, type(self).__name__, **hub) if push_to_hub else None

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Save and upload; the arguments are those of diffusers and of `save_pretrained`."""
        names = ("commit_message", "private", "token", "create_pr", "safe_serialization", "variant")
        kwargs |= dict(zip(names, args, strict=False))
        with TemporaryDirectory() as folder:
            return self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **kwargs)


def plain_index(index: dict[str, Any]) -> dict[str, Any]:
    """An index whose `_class_name` is the class alone, without the module that is beside it."""
    kind = index.get("_class_name")
    if isinstance(kind, list) and len(kind) == 2:
        return index | {"_class_name": kind[1]}
    return index


def _card(card: Card, load: str, license_name: str | None) -> str:
    names, *rows = card.table
    lines = [names, ["---"] * len(names), *rows]
    licence = f"The weights are under {license_name}."
    if license_name is None:
        licence = (
            "The licence of the weights is unknown: whoever saved them named none. Ask them before "
            "you pass the weights on."
        )
    return _CARD.format(
        **vars(card) | {
            "load": load, "licence": licence,
            "license": license_name or "other\nlicense_name: unknown",
            "table": "\n".join(f"| {' | '.join(line)} |" for line in lines),
            "pipeline_tag": f"pipeline_tag: {card.pipeline_tag}\n" if card.pipeline_tag else "",
        }
    )  # fmt: skip


def _upload(
    folder: Path, kind: str, repo_id: str | None = None, token: Any = None,
    private: bool | None = None, commit_message: str | None = None, create_pr: bool = False,
    subfolder: str | None = None,
) -> Any:  # fmt: skip
    import huggingface_hub as hub

    repo = hub.create_repo(repo_id or folder.name, exist_ok=True, private=private, token=token)
    name = repo.repo_id
    return hub.upload_folder(
        repo_id=name, folder_path=folder, path_in_repo=subfolder, token=token,
        commit_message=commit_message or f"Upload {kind}", create_pr=create_pr,
        ignore_patterns=[CARD_FILE] if hub.file_exists(name, CARD_FILE, token=token) else None,
    )  # fmt: skip
