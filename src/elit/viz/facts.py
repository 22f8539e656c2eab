"""What a sweep's scores depend on, in words."""

from collections.abc import Mapping
from typing import Any

from elit._pareto import is_number

_LABELS = {
    "path": "model",
    "max_latents": "latents per group",
    "eight_bit": "images rounded to 8 bit",
    "vae": "VAE",
    "dtype": "precision",
    "device_name": "device's name",
}


def facts_of(report: Mapping[str, Any]) -> dict[str, str]:
    """All facts of a report's model and settings, by what they are called, in its order."""
    facts: dict[str, str] = {}
    for part in ("model", "settings"):
        for key, value in report.get(part, {}).items():
            facts[_LABELS.get(key, key.replace("_", " "))] = _in_words(value, key)
    return facts


def stamp(report: Mapping[str, Any]) -> str:
    """What any of a report's scores must be read with, in a line."""
    settings = report.get("settings", {})
    reference = settings.get("reference") or {}
    networks = [str(network.get("name")) for network in settings.get("networks", ())]
    parts = [
        f"{settings.get('samples', '?')} samples",
        f"seed {settings.get('seed', '?')}",
        str(settings.get("drawn") or ""),
        f"against {_in_words(reference, 'reference')}" if reference else "no reference",
        f"networks: {', '.join(networks)}" if networks else "",
        _in_words(settings.get("size"), "size") + " px" if settings.get("size") else "",
        "8 bit" if settings.get("eight_bit") else "",
        *(str(settings[key]) for key in ("sampler", "dtype", "device") if settings.get(key)),
    ]
    return ", ".join(filter(None, parts))


def training_flops(report: Mapping[str, Any]) -> str:
    """How much a model was trained, in words."""
    training = report.get("model", {}).get("training") or {}
    eflops, steps = training.get("eflops"), training.get("steps")
    if not is_number(eflops):
        return "training FLOPs not known"
    return f"trained with {eflops:.4g} EFLOPs" + (f" in {steps} steps" if steps else "")


def _in_words(value: Any, key: str = "") -> str:
    """Plain types as a person writes them."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "size" and isinstance(value, list | tuple):
        return "x".join(map(str, value))
    if key == "reference" and isinstance(value, Mapping):
        count = f"{value['images']} images" if value.get("images") else ""
        details = ", ".join(filter(None, [count, str(value.get("digest") or "")]))
        return str(value.get("name", "?")) + (f" ({details})" if details else "")
    if isinstance(value, Mapping):
        return ", ".join(f"{k.replace('_', ' ')} {_in_words(v, k)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(_in_words(item) for item in value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
