"""What is wrong with a pipeline's folder, said before diffusers loads it.

diffusers warns of weights that don't fit and leaves the rest random, and loads a pipeline of any
class; here each is an error that says what to do. Without torch, which takes seconds to import.
"""

import hashlib
import importlib
import inspect
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from safetensors import SafetensorError, safe_open

from elit._choices import check_choice
from elit._hub import not_fetched
from elit._numbers import MOST, is_real, is_whole
from elit._plain import from_plain, read_json
from elit._portable import plain_index

_ADVICE = "give the output_dir of `elit train`, or a folder that save_pretrained wrote"
INDEX = "model_index.json"
OURS = ("ElitPipeline", "ElitTextPipeline")
ELASTIC_MODULE = "elit.retrofit.elastic"  # makes classes of retrofits when asked by name
_SHARD = r"(?:-\d+-of-\d+)?"
_WEIGHTS = re.compile(
    rf"\w+(?:\.(?P<first>\w+))?{_SHARD}(?:\.(?P<last>\w+))?\.(?P<format>safetensors|bin)"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check_pipeline_folder(name: str) -> Path | None:
    """The folder of that name with a pipeline in it; None for what may be a name on the hub."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / INDEX).exists():
            what = "holds a single model, not" if (folder / "config.json").exists() else "is not"
            raise ValueError(f"{folder} {what} a pipeline: it has no model_index.json; {_ADVICE}")
        return folder
    if folder.exists():
        raise ValueError(f"{name} is a file, not a pipeline's folder; {_ADVICE}")
    if not may_be_on_hub(name):
        raise ValueError(f"there is no folder {name}; {_ADVICE}")
    return None


def may_be_on_hub(name: str) -> bool:
    """Whether it looks like `user/model`; where there is a folder `user`, a path was meant."""
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).parent.is_dir()


def loading_error(name: str, error: Exception) -> ValueError:
    """The error to raise where diffusers could not load `name`."""
    if not Path(name).is_dir():
        other = ". Weights of another kind need variant='fp16' or use_safetensors=False"
        is_other = "variant" in str(error) or "safetensors" in str(error)
        return ValueError(not_fetched(name, error) + (other if is_other else ""))
    reason = re.split(r"(?<=[a-z)\]'])[.] | \(Cannot find ", " ".join(str(error).split()))[0]
    return ValueError(f"{name} cannot be loaded: {reason[:300].rstrip('. ')}; {_ADVICE}")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or a ValueError that says why there is none."""
    return read_json(path, _ADVICE)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a pipeline's folder, with the name of its class as `_class_name`."""
    return plain_index(read_config(folder / INDEX))


def weights_digest(
    run: Path, part: str = "transformer", pattern: str = "*.safetensors"
) -> str | None:
    """What tells the files of a part from those of an earlier time; None without a folder."""
    digest = hashlib.sha256()
    files = sorted((run / part).glob(pattern))
    for file in files:
        with file.open("rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()[:16] if files else None


def check_model_config(path: Path, config: dict[str, Any], model_class: type) -> None:
    """Raise a ValueError if a model's config has settings that its class doesn't know."""
    from elit.retrofit.elastic import CONFIG_KEY, ElasticTransformer

    known = {*inspect.signature(model_class).parameters}
    if issubclass(model_class, ElasticTransformer):
        known.add(CONFIG_KEY)
    unknown = [key for key in config if key not in known and not key.startswith("_")]
    if unknown:
        raise ValueError(
            f"{path} has settings that this version's {model_class.__name__} does not know: "
            f"{', '.join(unknown)}; use the version of elit that wrote it, or a newer one"
        )
    if model_class.__module__.startswith("elit.models."):
        hints = get_type_hints(inspect.unwrap(vars(model_class)["__init__"]))
        for key, value in config.items():
            if not key.startswith("_"):
                from_plain(hints[key], value, f"{path}: {key}")


def _check_scheduler_config(path: Path, config: dict[str, Any], scheduler_class: Any) -> None:
    """Raise a ValueError for settings that no such scheduler knows, or of another type.

    Settings of a scheduler that this one was made from are kept in its file.
    """
    known = inspect.signature(scheduler_class).parameters
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    if unknown := own.keys() - known:
        others = map(inspect.signature, scheduler_class._get_compatibles())
        everywhere = {*known, *(key for other in others for key in other.parameters)}
        for key in unknown:
            check_choice(key, everywhere, "key", f" of {path}")
    for key in own.keys() & known:
        default, value = known[key].default, own[key]
        if value == default:
            continue
        if type(default) in (bool, int, float, str):  # annotations are wrong at places
            from_plain(type(default), value, f"{path}: {key}")
            if type(default) is int and not is_whole(value, least := min(default, 1)):
                raise ValueError(
                    f"{path}: {key} is {value!r:.80}; give at least {least}, to {MOST}"
                )
            if key in ("shift", "flow_shift") and not 1e-3 <= value <= 1e3:
                raise ValueError(f"{path}: {key} is {value!r:.80}; give 0.001 to 1000, 1 is none")
        elif not is_real(value) and (
            isinstance(value, float) or type(value).__name__ not in str(known[key].annotation)
        ):
            raise ValueError(f"{path}: {key} is {value!r:.80}; give a number, or leave it out")


def draws_images(in_channels: int) -> bool:
    """Whether a model of so many channels needs no autoencoder: grey or RGB."""
    return in_channels in (1, 3)


def check_draws_images(pipeline: Any, name: str) -> None:
    """Raise a ValueError for a pipeline of VAE latents that has no autoencoder."""
    channels = pipeline.transformer.in_channels
    if pipeline.vae is not None or draws_images(channels):
        return
    kind = type(pipeline).__name__
    raise ValueError(
        f"{name} holds no autoencoder: what it draws are VAE latents of {channels} channels, no "
        f"images; put in the one that it was trained with, of a public checkpoint by `elit convert "
        f"official FILE NEW --vae stabilityai/sd-vae-ft-mse`, of any folder from Python by "
        f"{kind}.from_pretrained({name!r}, vae=AutoencoderKL.from_pretrained(...))"
        f".save_pretrained('NEW')"
    )


def model_class_of(path: Path, library: Any, class_name: Any) -> type:
    """Class of a model of ours that a config file names."""
    if isinstance(library, str) and library.startswith(("elit.models.", ELASTIC_MODULE)):
        try:
            return getattr(importlib.import_module(library), str(class_name))
        except (ImportError, AttributeError):
            pass
    raise ValueError(
        f"{path} names the transformer {library}.{class_name}, which is none of elit's; {_ADVICE}"
    )


def check_parts(folder: Path, pipeline_class: type, given: Mapping[str, Any]) -> None:
    """Raise a ValueError unless a folder is a sound pipeline of a class.

    Args:
        folder: of the pipeline.
        pipeline_class: class that is to be loaded.
        given: arguments of `from_pretrained`: components, which the folder need not hold then,
            `variant` and `use_safetensors`.
    """
    index_file, index = folder / INDEX, read_index(folder)
    found, wanted = index.get("_class_name"), [c.__name__ for c in pipeline_class.__mro__]
    if found not in wanted:
        advice = _ADVICE
        if found in OURS:
            advice = f"load it by {found}.from_pretrained, or whichever it is by load_pipeline"
        elif isinstance(found, str) and found.endswith("Pipeline"):
            advice = f"load it by diffusers.{found}.from_pretrained"
        raise ValueError(f"{folder} holds a pipeline {found}, not {wanted[0]}; {advice}")
    for name in index:
        if not name.startswith("_"):
            parts = inspect.signature(pipeline_class).parameters
            check_choice(name, parts, "part", f" in {index_file}")
    for name in ("transformer", "scheduler", "vae", "text_encoder", "tokenizer"):
        entry, must_be = index.get(name), name in ("transformer", "scheduler")
        if name in given or (not must_be and entry in (None, [None, None])):
            continue
        if not any((folder / name).glob("*")):  # diffusers makes an empty tokenizer of no files
            raise ValueError(f"{folder} holds no {name}; {_ADVICE}")
        if name not in ("text_encoder", "tokenizer"):  # which transformers checks itself
            _check_config(index_file, name, entry)
        if name not in ("scheduler", "tokenizer"):
            _check_weights(folder / name, given)


def _check_config(index_file: Path, name: str, entry: Any) -> None:
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
        raise ValueError(f"{index_file} names no {name}, but {entry!r}; {_ADVICE}")
    library, class_name = entry
    file = "scheduler_config.json" if name == "scheduler" else "config.json"
    config_file = index_file.parent / name / file
    config = read_config(config_file)
    if config.get("_class_name") != class_name:
        raise ValueError(
            f"{config_file} is of a {config.get('_class_name')}, but {index_file} names a "
            f"{class_name}; {_ADVICE}"
        )
    if name == "transformer":
        check_model_config(config_file, config, model_class_of(index_file, library, class_name))
    elif name == "scheduler" and library in ("diffusers", "elit.flow.schedulers"):
        kind = getattr(importlib.import_module(library), class_name, None)
        if kind is not None:  # or loading it says so
            _check_scheduler_config(config_file, config, kind)


def _check_weights(folder: Path, given: Mapping[str, Any]) -> None:
    """Raise a ValueError unless a part has weights of the variant and format that are asked for.

    As diffusers does it: a part that has none of the variant is loaded without, but ours must.
    """
    variant, is_safe = given.get("variant"), given.get("use_safetensors", True)
    found = {
        (match["first"] or match["last"], match["format"] == "safetensors")
        for match in (_WEIGHTS.fullmatch(file.name) for file in folder.iterdir())
        if match
    }
    if not found:
        raise ValueError(f"{folder} holds no weights (*.safetensors); {_ADVICE}")
    variants = (variant,) if folder.name == "transformer" else (variant, None)
    formats = (True, False) if is_safe is None else (bool(is_safe),)
    if not found.intersection(itertools.product(variants, formats)):
        there = [
            (f"variant={name!r} (--variant {name} on the command line)" if name else "no variant")
            + ("" if safe else " and use_safetensors=False: pickles, which save_pretrained renews")
            for name, safe in sorted(found, key=str)
        ]
        raise ValueError(
            f"{folder} has no {'.bin' if is_safe is False else '.safetensors'} weights "
            f"{f'of variant {variant}' if variant else 'without a variant'}; load it with "
            f"{', or with '.join(there)}"
        )
    files = sorted(folder.glob("*.safetensors"))
    if files and all("-of-" in file.name for file in files) and not any(folder.glob("*.index.*")):
        raise ValueError(
            f"{folder} holds shards of weights without their index, *.safetensors.index.json; copy "
            f"it too, or save the pipeline again"
        )
    for weights in files:
        try:
            with safe_open(weights, framework="pt"):
                pass  # reads the header and compares the file's length with it
        except SafetensorError as error:
            raise ValueError(
                f"{weights} is damaged ({error}): cut off by a full disk or an unfinished copy? "
                f"Copy it again, or resume the training run, which writes it anew"
            ) from error
