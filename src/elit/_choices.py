"""Words that a user may have misspelt: the error that names what is allowed and what is nearest."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

MOST = 20  # words that a message lists in full

# What flags, keys and fields are called elsewhere, in diffusers' scripts above all: what they may
# be called here, with _ for -. A word that ends one of several names, as lr does, needs no line.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "adam_weight_decay": ("weight_decay",),
    "cfg": ("guidance",),
    "cfg_scale": ("scale", "guidance_scale"),
    "checkpointing_steps": ("checkpoint_every",),
    "class_labels": ("labels", "class_label"),
    "classes": ("labels", "class_label"),
    "data_dir": ("data", "data.options.path"),
    "dataloader_num_workers": ("num_workers", "workers"),
    "dataset": ("data", "data.name"),
    "dataset_name": ("data", "data.name"),
    "dtype": ("precision",),
    "ema_decay": ("ema",),
    "eval_steps": ("validate_every",),
    "gradient_accumulation_steps": ("accumulation",),
    "guidance_scale": ("scale",),
    "height": ("size", "resolution"),
    "iterations": ("train.steps", "steps"),
    "learning_rate": ("optimizer.lr", "lr"),
    "logging_steps": ("log_every",),
    "lr": ("optimizer.lr",),
    "lr_scheduler": ("optimizer.schedule",),
    "lr_warmup_steps": ("warmup_steps",),
    "max_grad_norm": ("clip",),
    "max_steps": ("train.steps", "steps"),
    "max_train_steps": ("train.steps", "steps"),
    "mixed_precision": ("precision", "dtype"),
    "model": ("model.preset", "preset"),
    "n": ("count", "samples", "num_images_per_prompt"),
    "n_images": ("count", "samples", "num_images_per_prompt"),
    "n_steps": ("steps", "train.steps", "num_inference_steps"),
    "nsteps": ("steps", "train.steps", "num_inference_steps"),
    "num_frames": ("frames",),
    "num_images": ("count", "samples", "images", "n", "num_images_per_prompt"),
    "num_images_per_prompt": ("count", "n"),
    "num_inference_steps": ("steps", "sample.steps"),
    "num_samples": ("samples", "count", "n"),
    "num_steps": ("steps", "train.steps", "num_inference_steps"),
    "num_workers": ("workers",),
    "out": ("output_dir",),
    "output": ("output_dir", "out"),
    "output_dir": ("out",),
    "per_device_train_batch_size": ("batch_size",),
    "precision": ("dtype",),
    "prompt": ("prompts",),
    "report_to": ("tensorboard",),
    "resolution": ("size", "data.options", "height"),
    "sampling_steps": ("steps", "sample.steps"),
    "save_steps": ("checkpoint_every",),
    "scale": ("guidance_scale",),
    "scheduler": ("sampler",),
    "size": ("resolution", "height"),
    "steps": ("train.steps", "num_inference_steps"),
    "timesteps": ("sigmas",),
    "torch_dtype": ("dtype", "precision"),
    "train_batch_size": ("batch_size",),
    "train_data_dir": ("data.options.path", "data"),
    "use_ema": ("ema",),
    "validation_steps": ("validate_every",),
    "weight_dtype": ("dtype", "precision"),
    "width": ("size", "resolution"),
}
NAMED_FIRST = "the model (of `elit train` the config) is named without a flag, behind the command"
IN_STEPS = "training is counted in steps, not in epochs; a step takes one batch"
# What needs no name here.
ADVICE = {
    "epochs": IN_STEPS,
    "num_epochs": IN_STEPS,
    "num_train_epochs": IN_STEPS,
    "resume": "the same command again goes on where it was stopped",
    "resume_from_checkpoint": "the same command again goes on where it was stopped",
    "model": NAMED_FIRST,
    "model_id": NAMED_FIRST,
    "pretrained_model_name_or_path": NAMED_FIRST,
}


def meant(name: str, allowed: Iterable[str]) -> str | None:
    """The flag, key or field that a name means: written otherwise, known elsewhere, or nearest."""
    plains = {_plain(known): known for known in allowed}
    if found := _known_as(name, plains):
        return found
    near = nearest(_plain(name), plains)
    return plains[near] if near else None


def _known_as(name: str, plains: Mapping[str, str]) -> str | None:
    """The only one that a name means without a guess."""
    names: dict[str, list[str]] = {}
    for plain, known in plains.items():
        for ending in {plain, _ending(plain)}:
            names.setdefault(ending, []).append(known)
    word = _ending(_plain(name))
    for one in (_plain(name), *SYNONYMS.get(word, ()), word):
        if len(found := names.get(one, [])) == 1:
            return found[0]
    return None


def hint_at(name: str, allowed: Iterable[str], otherwise: str) -> str:
    """What to do instead of an unknown flag, key or field."""
    plains = {_plain(known): known for known in allowed}
    advice = ADVICE.get(_ending(_plain(name)))
    if advice and not _known_as(name, plains):
        return advice
    near = meant(name, plains.values())
    return f"did you mean {near}?" if near else otherwise


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("-", "_")


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def nearest(value: Any, allowed: Iterable[str]) -> str | None:
    """The allowed word most like `value`, upper or lower case, if any is.

    Of those that go on where it ends, the first: of dit-xl, dit-xl/2.
    """
    by_lower = {word.lower(): word for word in allowed}
    for word in by_lower:
        if word.startswith(f"{value}/".lower()):
            return by_lower[word]
    near = difflib.get_close_matches(str(value).lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[near[0]] if near else None


def check_choice(value: Any, allowed: Iterable[str], what: str, where: str = "") -> None:
    """Raise a ValueError that names the nearest of the allowed words and lists them.

    Of more than MOST it lists those most like the value.
    """
    allowed = tuple(allowed)
    if isinstance(value, str) and value in allowed:
        return
    near = nearest(value, allowed)
    listed = ", ".join(map(repr, allowed))
    if len(allowed) > MOST:
        likest = difflib.get_close_matches(str(value), allowed, n=6, cutoff=0)
        listed = f"{', '.join(map(repr, likest))} or {len(allowed) - 6} others"
    if near and len(allowed) > 10:  # or the nearest would be lost behind them
        advice = f"did you mean {near!r}? Allowed: {listed}"
    else:
        advice = f"use one of {listed}" if allowed else f"no {what} is allowed"
        advice += f"; did you mean {near!r}?" if near and len(allowed) > 1 else ""
    raise ValueError(f"unknown {what} {value!r:.60}{where}: {advice}")


def label_of(label: Any, names: Mapping[str, int], count: int) -> Any:
    """The number of a class that is given by its name, or by its number as text.

    What is no text stands for itself; text of digits is always a number, of a class or not.
    """
    if not isinstance(label, str):
        return label
    if label.isascii() and label.isdigit() and len(label) < 10:
        return int(label)
    if not names:
        raise ValueError(
            f"class {label!r:.60} is no number, and this model knows no names; give 0 to "
            f"{count - 1}"
        )
    check_choice(label, names, "class")
    return names[label]
