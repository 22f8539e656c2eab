"""Files of elastic transformers: the small interface alone, beside a base model, or all.

An interface file holds the tensors under `elit.`, and in its metadata the settings and what the
base model has to be: its class, blocks, width and heads.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from diffusers import AutoModel, DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from elit._files import typed_path, write_file
from elit._hub import not_fetched
from elit._wrappers import without_wrapping
from elit.interface.budget import Budgeted
from elit.retrofit import elastic
from elit.retrofit.elastic import (
    PREFIX,
    ElasticTransformer,
    elasticize,
    in_pipeline,
    unelasticize,
)
from elit.retrofit.known import find_layout
from elit.retrofit.layout import Layout
from elit.retrofit.settings import Settings

KEY = "elit_interface"  # of the metadata
WEIGHT_NAME = "interface.safetensors"

_Model = TypeVar("_Model", bound=nn.Module | DiffusionPipeline)


def save_interface(transformer: Any, path: str | Path) -> None:
    """Write the interface of an elastic transformer, without the transformer, to one file.

    Args:
        transformer: from `elasticize`.
        path: of the file, which ends in `.safetensors`; it is replaced if it is there.
    """
    path = Path(typed_path(path))
    if not isinstance(transformer, ElasticTransformer):
        raise ValueError(
            f"this {type(transformer).__name__} is not elastic: it has no interface to save; "
            f"elasticize it first"
        )
    if path.suffix != ".safetensors" or path.is_dir():
        raise ValueError(f"{path} is not allowed; give a file that ends in .safetensors")
    tensors = {
        f"{PREFIX}.{name}": tensor.contiguous()
        for name, tensor in transformer.elit.state_dict().items()
    }
    wrapped = [name for name in tensors if ".lora_" in name or ".base_layer." in name]
    if wrapped:
        raise ValueError(
            f"a LoRA is on the interface itself ({wrapped[0]}, ...); fuse it or delete it first"
        )
    layout = transformer._elit_session.layout
    settings = transformer.elastic_settings.to_config()
    about = {"settings": settings, "base": _fingerprint(transformer, layout)}
    metadata = {"format": "pt", KEY: json.dumps(about)}
    write_file(path, lambda aside: save_file(tensors, aside, metadata))


def load_interface(
    transformer: _Model,
    name: str | Path,
    weight_name: str = WEIGHT_NAME,
    layout: Layout | None = None,
    revision: str | None = None,
) -> _Model:
    """Make a transformer elastic with the interface of a file, in place, and return it.

    Args:
        transformer: the base model, or a pipeline with it; at full budget it stays what it is, if
            the interface was trained alone and started as "identity".
        name: the file, a folder, or a repository on the Hugging Face hub.
        weight_name: of the file in a folder or a repository.
        layout: how the transformer is laid out, as `elasticize` takes it.
        revision: of the repository: branch, tag or commit.

    Raises:
        ValueError: if there is no such file, it is not an interface, or is that of another model;
            the transformer is then as it was.
    """
    if isinstance(transformer, DiffusionPipeline):
        return in_pipeline(transformer, load_interface, name, weight_name, layout, revision)
    if isinstance(transformer, Budgeted) and transformer.is_elastic:
        raise ValueError(
            f"this {type(transformer).__name__} has an interface already; unelasticize it first, "
            f"or take a plain model"
        )
    path = _fetch(name, weight_name, revision)
    about, tensors = _read(path)
    settings = Settings.from_config(about["settings"])
    layout = layout or find_layout(transformer)
    base, facts = about["base"], _fingerprint(transformer, layout)
    if wrong := [fact for fact in facts if base.get(fact) != facts[fact]]:
        there, here = (
            ", ".join(f"{fact} {of.get(fact)}" for fact in wrong) for of in (base, facts)
        )
        raise ValueError(
            f"{path} is the interface of another model: {there} there, but {here} here; "
            f"give the model that it was made for"
        )
    options = (settings.head, settings.tail, settings.group, settings.init, settings.rank)
    model: Any = elasticize(transformer, *options, layout=layout)
    try:
        model.elit.load_state_dict(tensors)
    except RuntimeError as error:
        unelasticize(model)
        raise ValueError(
            f"{path} does not hold the interface of its settings: {error}; give a file that "
            f"save_interface wrote"
        ) from None
    model.set_min_latents(settings.min_latents)
    return model


def load_elastic(name: str | Path, **kwargs: Any) -> Any:
    """Load a saved elastic transformer whole, by the class that its config names.

    Args:
        name: folder of `save_pretrained`, or a repository on the Hugging Face hub.
        kwargs: as `from_pretrained` of any diffusers model takes them: `subfolder`, `variant`,
            `dtype`, `quantization_config`, `revision`, ...

    Raises:
        ValueError: if it is not an elastic transformer.
    """
    name = typed_path(name)
    names = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
    where = {key: kwargs[key] for key in names if key in kwargs}
    try:
        config = AutoModel.load_config(name, **where)
    except OSError as error:
        raise ValueError(
            f"{name} holds no transformer: {error}; of a pipeline, give subfolder='transformer'"
        ) from None
    kind = config.get("_class_name", "a model without a name")
    if elastic.CONFIG_KEY not in config or not hasattr(elastic, kind):
        raise ValueError(
            f"{name} is {kind}, not an elastic transformer; load it with its own from_pretrained, "
            f"then elasticize it, or give it an interface by load_interface"
        )
    return getattr(elastic, kind).from_pretrained(name, **kwargs)


def _fetch(name: str | Path, weight_name: str, revision: str | None) -> Path:
    """The file, fetched from the hub if it has to be."""
    given = Path(typed_path(name))
    path = given / weight_name if given.is_dir() else given
    if path.exists():
        return path
    is_hub_name = isinstance(name, str) and len(given.parts) == 2 and given.suffix != ".safetensors"
    if not is_hub_name or given.is_dir():
        raise ValueError(f"there is no file {path}; give the one that save_interface wrote")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(name), weight_name, revision=revision))
    except (OSError, ValueError) as error:  # no such repository, no such file, no network
        raise ValueError(not_fetched(f"{name} with its {weight_name}", error)) from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and base model of a file's interface, and its tensors by their names in it."""
    advice = "give a file that save_interface wrote"
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} can't be read ({error}); {advice}") from None
    parts = (
        [about.get(part) for part in ("settings", "base")] if isinstance(about, dict) else [None]
    )
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path} is not an interface of an elastic transformer; {advice}")
    for key, x in tensors.items():
        if not x.is_floating_point() or not x.isfinite().all():
            raise ValueError(f"{path} holds numbers that are not finite or not floats: {key}")
    return about, without_wrapping(
        {key.removeprefix(f"{PREFIX}."): x for key, x in tensors.items()}
    )


def _fingerprint(transformer: Any, layout: Layout) -> dict[str, Any]:
    """Facts of a base model that an interface made for another one must share."""
    config = getattr(transformer, "config", {})
    heads = layout.heads(transformer)
    return {
        "class": getattr(transformer, "original_class", type(transformer)).__name__,
        "blocks": len(layout.find_blocks(transformer)),
        "width": layout.width(transformer),
        "heads": config.get("num_attention_heads", heads) if isinstance(config, Mapping) else heads,
        "heads of Read and Write": heads,
    }
