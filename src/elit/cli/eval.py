"""`elit eval`: scores of one operating point, with all that they depend on."""

import argparse
from pathlib import Path
from typing import Any

from elit._files import write_json
from elit.cli.common import (
    Parser,
    add_json_flag,
    budget,
    format_table,
    path_text,
    print_json,
    whole_number,
)
from elit.cli.evaluating import (
    EPILOG,
    MOST_STEPS,
    add_evaluation_flags,
    home_of,
    interval_of,
    open_evaluation,
)
from elit.cli.points import DEFAULT_SCALE, add_guidance, check_run, make_guidance

SAMPLES = 50_000  # as papers have it


def add_arguments(parser: Parser) -> None:
    """Flags of `elit eval`."""
    parser.usage = "elit eval RUN [--reference DATA] [--network NAME ...] [--samples N] [flags]"
    parser.epilog = EPILOG
    add_evaluation_flags(parser, SAMPLES)
    add = parser.add_argument
    add("--budget", type=budget, default=1.0, metavar="B",
        help="fraction of the latents to keep (default: 1)")  # fmt: skip
    add(
        "--steps",
        type=whole_number(1, MOST_STEPS),
        default=40,
        metavar="N",
        help="steps (default: 40)",
    )
    add_guidance(parser)
    add("--save-npz", action="store_true",
        help="write all samples too, as other evaluation tools read them")  # fmt: skip
    add(
        "--out",
        type=path_text,
        metavar="DIR",
        help="folder of the results (default: RUN/evaluated)",
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Draw, score, write and tell."""
    check_run(args.run)
    make_guidance(args)  # before the imports: a mistake in a flag is told at once
    home = home_of(args, "evaluated")
    evaluation = open_evaluation(args, home, keep_images=args.save_npz)
    from elit.evaluation.evaluation import evaluate, save_npz

    point = operating_point(args, evaluation.drawing.pipeline.transformer)
    report = evaluate(evaluation, point)
    if report is None:  # the first process tells
        return 0
    folder = evaluation.parts(point).folder
    reference = report["settings"]["reference"]["digest"]  # others keep their results
    report["out"] = str(folder / f"eval-{reference}.json")
    if args.save_npz:
        report["npz"] = str(folder / "samples.npz")
        save_npz(evaluation.parts(point), Path(report["npz"]))
    write_json(Path(report["out"]), report)
    if args.json:
        print_json(report)
    else:
        print_report(report)
    return 0


def operating_point(args: argparse.Namespace, model: Any) -> Any:
    """The point of the flags, at the budgets that really run."""
    from elit.choosing.points import OperatingPoint

    ran = model.budget_of(model.resolve_budget(args.budget))
    if args.guidance == "none":
        return OperatingPoint(ran, args.steps)
    guide = None
    if args.guidance in ("ag", "ccfg"):
        if not model.is_elastic:
            raise ValueError(
                f"--guidance {args.guidance} needs a lower budget; this model has none"
            )
        kept = model.min_latents
        if args.guide_budget is not None:
            kept = model.resolve_budget(args.guide_budget)
        guide = model.budget_of(kept)
    scale = DEFAULT_SCALE if args.scale is None else args.scale
    return OperatingPoint(ran, args.steps, args.guidance, scale, guide, interval_of(args))


def print_report(report: dict[str, Any]) -> None:
    """Scores, and under them what they are of."""
    from elit.evaluation.score_names import SCORES

    (row,) = report["rows"]
    table = []
    for name in (name for name in SCORES if name in row["scores"]):
        value = f"{row['scores'][name]:.4f}"
        if row["deviations"].get(name):
            value += f" ± {row['deviations'][name]:.4f}"
        better = "lower is better" if SCORES[name][1] else "higher is better"
        table.append((SCORES[name][0], value, row["scores_of"][name], better))
    print(format_table(("score", "value", "network", ""), table))
    for warning in row["warnings"]:
        print(f"! {warning}")
    print(f"\n{settings_text(report)}")
    point = describe_point(row)
    print(f"point      {point}, {row['calls']} calls of the model, {row['sampler']}")
    print(f"cost       {cost_text(row)}")
    print(f"\n{report['out']}")


def describe_point(row: dict[str, Any]) -> str:
    """A row's operating point in words."""
    from elit.choosing.points import OperatingPoint

    return str(OperatingPoint.from_dict(row))


def cost_text(row: dict[str, Any]) -> str:
    """FLOPs and time of an image."""
    text = f"{row['gflops_per_image']:.4g} GFLOPs and {row['ms_per_image']:.1f} ms an image"
    if row["decode_ms_per_image"] >= 0.05:
        text += f", and {row['decode_ms_per_image']:.1f} ms to decode it"
    return text


def settings_text(report: dict[str, Any]) -> str:
    """What all scores depend on, a line each."""
    model, settings = report["model"], report["settings"]
    reference, size = settings["reference"], "x".join(map(str, settings["size"]))
    lines = [
        ("model", f"{model['path']}, {model['class']}, weights {model['weights']}"),
        ("samples", f"{settings['samples']} of {size}, seed {settings['seed']}, "
         f"{settings['drawn']}, 8 bits"),
        ("reference", f"{reference['name']}, {reference['images'] or 'statistics alone'}"),
        *(("network", f"{n['name']}, {n['weights'][:16]}, {n['preprocessing']}")
          for n in settings["networks"]),
        ("run", f"{settings['dtype']}, batch {settings['batch_size']}, {settings['device_name']}, "
         f"torch {settings['versions']['torch']}"),
    ]  # fmt: skip
    if settings["vae"] is not None:
        lines.insert(2, ("VAE", f"{settings['vae']['class']}, {settings['vae']['weights']}"))
    return "\n".join(f"{name:10} {text}" for name, text in lines)
