"""`elit info`: the presets, one model, and what is installed."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from elit import __version__
from elit.cli.common import (
    Parser,
    add_json_flag,
    format_count,
    format_input,
    format_table,
    path_text,
    print_json,
)

_PACKAGES = (
    "torch",
    "diffusers",
    "safetensors",
    "scikit-learn",
    "tensorboard",
    "datasets",
)


def add_arguments(parser: Parser) -> None:
    """Flags of `elit info`."""
    parser.add_argument(
        "model",
        type=path_text,
        metavar="NAME_OR_PATH",
        nargs="?",
        help="a preset, or the folder of a pipeline or a model (default: all presets)",
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Print what there is to know."""
    if args.model is None:
        report: dict[str, Any] = {"installed": installed(), "presets": presets()}
        show = _print_presets
    else:
        report, show = describe(args.model), _print_model
    if args.json:
        print_json(report)
    else:
        show(report)
    return 0


def installed() -> dict[str, str | None]:
    """Versions of what matters, None where it is missing, and the device that "auto" picks."""
    found: dict[str, str | None] = {"elit": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if str(found["torch"]).endswith("+cpu"):  # it knows no other: no need to ask it
        return found | {"device": "cpu"}
    from elit._devices import pick_device

    return found | {"device": str(pick_device("auto"))}


def presets() -> list[dict[str, Any]]:
    """What each preset is."""
    from elit.models.presets import PRESETS, preset_inputs

    report = []
    for name in PRESETS:
        card = describe(name)
        keys = ("model", "parameters", "split", "max_latents")
        resolutions = list(preset_inputs(name))
        report.append({key: card[key] for key in keys} | {"resolutions": resolutions})
    return report


def describe(name: str) -> dict[str, Any]:
    """Config, size, split, groups and budgets of a preset or a checkpoint."""
    from elit.cli.models import load_shape

    shape = load_shape(name)
    cost = shape.cost
    kept = range(cost.min_latents, cost.max_latents + 1) if cost.is_elastic else []
    return {
        "model": shape.name,
        "resolution": shape.resolution,
        "frames": shape.frames,
        "parameters": cost.parameters,
        "split": list(cost.split),
        "group": None if cost.group is None else list(cost.group),
        "max_latents": cost.max_latents,
        "min_latents": cost.min_latents,
        "budgets": [cost.budget_of(n) for n in kept] or [1.0],
        "config": shape.config,
    }


def _format_split(split: list[int]) -> str:
    return "-".join(map(str, split)) if split[1:] != [0, 0] else str(split[0])


def _print_presets(report: dict[str, Any]) -> None:
    rows = [
        (
            card["model"],
            format_count(card["parameters"]),
            _format_split(card["split"]),
            card["max_latents"] or "-",
            ", ".join(map(str, card["resolutions"])),
        )
        for card in report["presets"]
    ]
    print(format_table(("preset", "parameters", "head-core-tail", "latents", "resolutions"), rows))
    print("\nParameters and latents per group at the smaller resolution.\n")
    for name, found in report["installed"].items():
        print(f"{name:14}{found or 'not installed'}")


def _print_model(report: dict[str, Any]) -> None:
    from elit.interface.budget import format_budget

    elastic = report["group"] is not None
    size = format_input(report["resolution"], report["frames"], report["config"])
    print(f"{report['model']} at {size}")
    print(f"{'parameters':14}{format_count(report['parameters'])}")
    print(f"{'blocks':14}{_format_split(report['split'])}{' (head-core-tail)' if elastic else ''}")
    if elastic:
        least, most = report["min_latents"], report["max_latents"]
        lowest = format_budget(report["budgets"][0])
        print(f"{'groups':14}{'x'.join(map(str, report['group']))} tokens")
        print(f"{'latents':14}{least} to {most} per group")
        print(f"{'budgets':14}{lowest} to 1 in steps of {format_budget(1 / most)}")
    else:
        print(f"{'budgets':14}1 alone: a plain model")
    print("\nconfig")
    for key, value in report["config"].items():
        print(f"  {key:16}{value}")
