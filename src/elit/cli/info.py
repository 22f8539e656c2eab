"""`elit info`: the presets, one model, and what is installed."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from elit import __version__
from elit._tables import format_table
from elit.cli.common import format_count, print_report
from elit.cli.flags import Parser
from elit.interface.budget import format_budget
from elit.models.presets import PRESETS, preset_inputs
from elit.pipelines.shapes import Shape, load_shape

_PACKAGES = ("torch", "diffusers", "safetensors", "scikit-learn", "tensorboard", "datasets")


def add_arguments(parser: Parser) -> None:
    """Flags of `elit info`."""
    about = "preset, or folder of a pipeline or a model (default: all presets)"
    parser.add("NAME_OR_PATH", about, nargs="?")


def run(args: argparse.Namespace) -> int:
    """Print what there is to know."""
    if args.model is not None:
        shape = load_shape(args.model)
        return print_report(shape.describe(), args.json, lambda card: _show_model(card, shape))
    keys = ("model", "parameters", "split", "max_latents")
    presets = []
    for name in PRESETS:
        card = load_shape(name).describe()
        presets.append({key: card[key] for key in keys} | {"resolutions": [*preset_inputs(name)]})
    return print_report({"installed": installed(), "presets": presets}, args.json, show_presets)


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


def _format_split(split: list[int]) -> str:
    return "-".join(map(str, split)) if split[1:] != [0, 0] else str(split[0])


def show_presets(report: dict[str, Any]) -> None:
    """A line for each preset, and what is installed."""
    rows = [
        (
            card["model"],
            format_count(card["parameters"]),
            _format_split(card["split"]),
            card["max_latents"],
            ", ".join(map(str, card["resolutions"])),
        )
        for card in report["presets"]
    ]
    print(format_table(("preset", "parameters", "head-core-tail", "latents", "resolutions"), rows))
    print("\nParameters and latents per group at the smaller resolution.\n")
    for name, found in report["installed"].items():
        print(f"{name:14}{found or 'not installed'}")


def _show_model(report: dict[str, Any], shape: Shape) -> None:
    elastic = report["group"] is not None
    print(f"{report['model']} at {shape.input_size}")
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
