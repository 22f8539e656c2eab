"""`elit inspect`: where Read looks, where the loss is, and what each latent is worth."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elit._files import write_file, write_json
from elit.cli.common import (
    Parser,
    add_json_flag,
    budget,
    format_table,
    one_of,
    output_folder,
    path_text,
    print_json,
    quiet_diffusers,
    whole_number,
    with_error,
)
from elit.cli.points import add_run, check_run
from elit.data import SPLITS

if TYPE_CHECKING:
    from elit.inspection.inspector import Inspector, Maps, Worth

_EPILOG = """\
Writes inspect.json (all numbers), maps.safetensors (all maps) and the sheets inspect.png,
latents.png, budgets.png and worth.png. Options of --data are given as --data.options.count 500.

A correlation says little without its control: "shuffled" is that of the attention on one image
with the loss on another. Where both are alike, the attention is a pattern of position; "other
noise" is what is left where the two maps have not seen the same noise."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit inspect`."""
    parser.usage = "elit inspect RUN [--sigma S ...] [--budget B ...] [flags]"
    parser.epilog = _EPILOG
    parser.open_flags = ("--data.options.",)
    add_run(parser)
    add = parser.add_argument
    add("--images", type=whole_number(2), default=32, metavar="N",
        help="images to look at, spread over the data (default: 32)")  # fmt: skip
    add("--draws", type=even_number, default=4, metavar="N",
        help="noise draws for each image, an even number (default: 4)")  # fmt: skip
    add("--sigma", type=noise_level, nargs="+", default=[0.25, 0.5, 0.75], metavar="S",
        help="noise levels, 1 is noise alone (default: 0.25 0.5 0.75)")  # fmt: skip
    add("--budget", type=budget, nargs="+", default=[1.0, 0.25], metavar="B",
        help="fractions of the latents to look at (default: 1 1/4)")  # fmt: skip
    add("--steps", type=whole_number(1), default=20, metavar="N",
        help="steps of the samples that are compared (default: 20)")  # fmt: skip
    add(
        "--data",
        type=path_text,
        metavar="NAME",
        help="data set (default: the one that RUN was trained on)",
    )
    add("--split", type=one_of(SPLITS, "split"), default="validation", metavar="NAME",
        help="train or validation (default: validation)")  # fmt: skip
    add("--batch-size", type=whole_number(1), default=32, metavar="N",
        help="samples of a forward (default: 32)")  # fmt: skip
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, metavar="N",
        help="of the noise and the shuffles (default: 0)")  # fmt: skip
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (default: auto)")
    add(
        "--out", type=path_text, metavar="DIR", help="folder to write into (default: RUN/inspected)"
    )
    add_json_flag(parser)


def even_number(text: str) -> int:
    """A whole number that two divides: half of the draws are set against the other half."""
    value = whole_number(2)(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give an even number")
    return value


def noise_level(text: str) -> float:
    """A number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"noise level {text!r} is outside [0, 1]: 0 is data, 1 is noise; give one such as 0.5"
        )
    return value


def run(args: argparse.Namespace) -> int:
    """Look, write and tell."""
    check_run(args.run)
    from elit._devices import pick_device
    from elit.cli.inspect_data import SHOWN, load_subject
    from elit.cli.inspect_sheets import save_sheets
    from elit.inspection.inspector import Inspector, draw_at_budgets
    from elit.pipelines.load import load_pipeline

    device = pick_device(args.device)
    with quiet_diffusers():
        pipeline = load_pipeline(args.run, variant=args.variant)
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    model = pipeline.transformer
    if not model.is_elastic:
        raise ValueError(
            f"{args.run} is a plain {type(model).__name__} without a latent interface: there is "
            f"nothing to look into; give the run of an elastic model (elit-...)"
        )
    folder = output_folder(args.out or default_folder(args.run), "--out")
    subject, about = load_subject(args, pipeline)
    inspector = Inspector(model, subject)
    kept = sorted({model.resolve_budget(b) for b in args.budget}, reverse=True)
    levels = list(dict.fromkeys(args.sigma))
    shown = min(SHOWN, len(subject.images))
    maps, worths = look(inspector, levels, kept, shown)
    full = [model.max_latents]
    samples = draw_at_budgets(
        pipeline, subject, list(dict.fromkeys(full + kept)), args.steps, shown
    )
    report = make_report(args, inspector, maps, worths, about)
    sheets = save_sheets(folder, pipeline, inspector, maps, worths, samples, about["names"])
    save_maps(folder / "maps.safetensors", inspector, maps)
    report |= {"out": str(folder), "sheets": [str(path) for path in sheets]}
    write_json(folder / "inspect.json", report)
    if args.json:
        print_json(report)
    else:
        print_report(report)
    return 0


def default_folder(run: str) -> Path:
    """Beside the pipeline; of one on the hub, in runs/."""
    from elit.choosing.sweep_file import default_home

    return default_home(run) / "inspected"


def look(
    inspector: "Inspector", levels: Sequence[float], kept: Sequence[int], shown: int
) -> tuple[list["Maps"], list["Worth"]]:
    """Maps and worths at each noise level, with a progress bar on a screen."""
    from tqdm import tqdm

    maps, worths = [], []
    bar = tqdm(levels, desc="noise levels", disable=not sys.stderr.isatty(), leave=False)
    for sigma in bar:
        maps += inspector.maps(sigma, kept, shown)
        worths.append(inspector.worth(sigma))
    return maps, worths


def make_report(
    args: argparse.Namespace,
    inspector: "Inspector",
    maps: Sequence["Maps"],
    worths: Sequence["Worth"],
    about: dict[str, Any],
) -> dict[str, Any]:
    """All numbers, in plain types."""
    from elit.inspection.correlation import NUM_SHUFFLES
    from elit.inspection.numbers import (
        mean_over_levels,
        numbers_of_core,
        numbers_of_maps,
        numbers_of_worth,
    )
    from elit.pipelines.folder import weights_digest

    model, grid = inspector.model, inspector.grid
    return {
        "settings": {
            "run": args.run,
            "weights": weights_digest(Path(args.run)),
            "model": type(model).__name__,
            "max_latents": model.max_latents,
            "tokens": list(grid.size),
            "group": list(grid.group),
            **about,
            **{name: getattr(args, name) for name in ("draws", "steps", "seed")},
            "shuffles": NUM_SHUFFLES,
        },
        "maps": [numbers_of_maps(m, model.budget_of(m.num_latents), args.seed) for m in maps],
        "latents": numbers_of_worth(worths),
        "latents_mean": numbers_of_worth([mean_over_levels(worths)]),
        "core": [numbers_of_core(worth) for worth in worths],
        "core_mean": numbers_of_core(mean_over_levels(worths)),
    }


def save_maps(path: Path, inspector: "Inspector", maps: Sequence["Maps"]) -> None:
    """All maps as they lie on the image, (N, *tokens), and the latents' means, (n, *tokens)."""
    from safetensors.torch import save_file

    from elit.inspection.inspector import in_raster_order

    tensors = {}
    for one in maps:
        place = f"sigma-{one.sigma:g}.latents-{one.num_latents}"
        for name in ("loss", "attention", "difference"):
            if (value := one.mean(name)) is not None:
                tensors[f"{place}.{name}"] = in_raster_order(value, inspector.grid).contiguous()
        if one.latents is not None:
            value = in_raster_order(one.latents, inspector.grid)
            tensors[f"{place}.by_latent"] = value.contiguous()
    write_file(path, lambda aside: save_file(tensors, aside))


def print_report(report: dict[str, Any]) -> None:
    """Two tables, the maps and the latents, and what the core as a whole is worth."""
    from elit.interface.budget import format_budget

    header = ["sigma", "budget", "loss", "attention~loss", "shuffled", "p", "other noise",
              "shuffled", "p", "in groups", "p", "by position"]  # fmt: skip
    rows = []
    for one in report["maps"]:
        cells = [f"{one['sigma']:g}", format_budget(one["budget"]), f"{one['loss']:.4f}"]
        found = (one["attention_loss"] or {}).get("spearman", {})
        inside = (one["attention_loss"] or {}).get("spearman_in_groups", {})
        for numbers, names in (
            (found, ("value", "shuffled", "p")),
            (found.get("other_noise", {}), ("value", "shuffled", "p")),
            (inside.get("other_noise", {}), ("value", "p")),
        ):
            cells += [_cell(numbers.get(n), sign="" if n == "p" else "+") for n in names]
        share = one["position_share"]["attention"]
        rows.append([*cells, "-" if share is None else f"{share:.0%}"])
    print(format_table(header, rows))
    print(
        f"\nSpearman's correlation over the tokens, mean of {report['settings']['images']} images\n"
        f"shuffled: the attention on one image with the loss on another; p: shuffles as far off\n"
        f"other noise: the maps have seen different noise; in groups: the same in groups alone\n"
        f"by position: share of the attention's variance that its mean map explains\n"
    )
    lines: dict[int, list[str]] = {}
    for one in report["latents_mean"]["first"]:
        lines[one["num_latents"]] = [f"{one['loss']:.4f}", "-", "-"]
    for one in report["latents_mean"]["without"]:
        line = lines.setdefault(one["latent"] + 1, ["-", "-", "-"])
        line[1:] = with_error(one["cost"], one["cost_error"])
    header = ["n", "loss of the first n latents", "leaving out latent n adds", "+-"]
    print(format_table(header, [(n, *line) for n, line in sorted(lines.items())]))
    print("\n" + words_on_core(report["core_mean"]))
    print("\n" + "\n".join(report["sheets"]))


def words_on_core(core: dict[str, Any]) -> str:
    """What the core as a whole is worth, in two lines; in one with a single latent a group."""
    loss, alone, whole = (core[name] for name in ("loss", "without_core", "without_interface"))
    shares = [_cell(part["share"], ".1%") for part in (alone, whole)]
    spreads = [core[name] for name in ("latent_spread_read", "latent_spread")]
    worth = (
        f"at full budget the loss is {loss:.4f}; with latents that go from Read straight to Write "
        f"{alone['loss']:.4f} ({shares[0]}); without Read, core and Write "
        f"{whole['loss']:.4f} ({shares[1]})"
    )
    if spreads == [None, None]:
        return worth
    read, after = (_cell(spread, ".1%", "") for spread in spreads)
    return (
        f"{worth}\nthe latents of a group differ in {read} of their variance after Read, in "
        f"{after} after the core; 0% are copies of one another"
    )


def _cell(value: float | None, form: str = ".3f", sign: str = "+") -> str:
    return "-" if value is None else f"{value:{sign}{form}}"
