"""`elit calibrate`: fit TeaCache to a pipeline, from the steps of a few samples."""

import argparse
from pathlib import Path
from typing import Any

from elit.cli.common import (
    Parser,
    add_json_flag,
    budget,
    format_table,
    output_folder,
    path_text,
    print_json,
    whole_number,
)
from elit.cli.points import (
    add_guidance,
    add_run,
    add_what,
    check_run,
    make_guidance,
    open_pipeline,
)
from elit.cli.sample import what_to_draw

THRESHOLDS = (0.05, 0.1, 0.2, 0.4, 0.8)

_EPILOG = """\
Calibrate as you will sample: the same steps, guidance and budgets. The table tells how many steps
of a run each threshold would compute; `elit sample RUN --teacache THRESHOLD` uses the file."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit calibrate`."""
    parser.usage = "elit calibrate RUN [--labels L ... | --prompts TEXT ...] [flags]"
    parser.epilog = _EPILOG
    add_run(parser)
    add = parser.add_argument
    add_what(parser)
    add("--budget", type=budget, nargs="+", default=[1.0], metavar="B",
        help="budgets to fit to, all at once (default: 1)")  # fmt: skip
    add("--steps", type=whole_number(3), default=40, metavar="N", help="steps (default: 40)")
    add_guidance(parser)
    add("--degree", type=whole_number(1, 4), default=4, metavar="N",
        help="of the polynomial, 1 to 4 (default: 4)")  # fmt: skip
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, metavar="N",
        help="of the first image (default: 0)")  # fmt: skip
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (default: auto)")
    add("--out", type=path_text, metavar="FILE", help="where to write (default: RUN/teacache.json)")
    add_json_flag(parser)
    parser.set_defaults(interval=None, sampler=None, dtype="fp32", negative_prompt=None)


def run(args: argparse.Namespace) -> int:
    """Draw, fit, write and tell."""
    check_run(args.run)
    guidance = make_guidance(args)  # before the imports: a mistake in a flag is told at once
    pipeline = open_pipeline(args)
    from elit.caching.calibration import calibrate_cache
    from elit.caching.configs import CALIBRATION_FILE
    from elit.pipelines.budgets import draw_budgets
    from elit.pipelines.folder import weights_digest

    model = pipeline.transformer
    what = what_to_draw(args, model)
    file = Path(args.out) if args.out else Path(args.run) / CALIBRATION_FILE
    output_folder(file.parent, "--out")
    kept = list(dict.fromkeys(model.resolve_budget(b) for b in args.budget))
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> None:
        budgets, seeds = [model.budget_of(n) for n in kept], range(args.seed, args.seed + len(what))
        options = {"num_inference_steps": args.steps, "guidance": guidance, "output_type": "latent"}
        for _ in draw_budgets(pipeline, what, budgets, seeds, **options):
            pass

    calibration = calibrate_cache(model, draw, args.degree)
    calibration.teacache(weights=weights_digest(Path(args.run))).save(file)
    calls = calibration.num_steps
    report: dict[str, Any] = {
        "out": str(file),
        "budget": [model.budget_of(n) for n in kept],
        "coefficients": list(calibration.coefficients),
        "fitted_to": len(calibration.changes),
        "fit_error": calibration.fit_error,
        "steps": calls,
        "computed_steps": {str(t): calibration.computed_steps(t) for t in THRESHOLDS},
        "mag_ratios": calibration.mag_ratios,
    }
    if args.json:
        print_json(report)
        return 0
    rows = [(t, f"{n} of {calls}") for t, n in report["computed_steps"].items()]
    print(format_table(("threshold", "steps computed"), rows))
    print(
        f"\nfitted to {len(calibration.changes)} changes from step to step, to within "
        f"{calibration.fit_error:.0%} of their mean; written to {file}"
    )
    return 0
