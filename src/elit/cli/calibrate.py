"""`elit calibrate`: fit TeaCache to a pipeline, from the steps of a few samples."""

import argparse
from pathlib import Path
from typing import Any

from elit._files import output_folder
from elit._tables import format_table
from elit.cli.common import check_run, make_guidance, open_pipeline, print_report
from elit.cli.flags import Parser, WholeNumber
from elit.cli.sample import what_to_draw

THRESHOLDS = (0.05, 0.1, 0.2, 0.4, 0.8)

USAGE = "elit calibrate RUN [--labels L ... | --prompts TEXT ...] [flags]"
EPILOG = """\
Calibrate as you will sample: the same steps, guidance and budgets. The table tells how many steps
of a run each threshold would compute; `elit sample RUN --teacache THRESHOLD` uses the file."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit calibrate`."""
    parser.add("RUN variant labels prompts")
    parser.add("budget", "budgets to fit to, all at once", nargs="+", default=[1.0])
    parser.add("steps", kind=WholeNumber(3))
    parser.add("guidance scale guide-budget")
    parser.add("degree", "degree of the polynomial, 1 to 4", WholeNumber(1, 4), default=4)
    parser.add("seed device")
    parser.add("out", "file to write (default: RUN/teacache.json)", metavar="FILE")
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

    model, steps = pipeline.transformer, args.steps or pipeline.default_steps
    what = what_to_draw(args, pipeline)
    file = Path(args.out) if args.out else Path(args.run) / CALIBRATION_FILE
    output_folder(file.parent, "--out")
    kept = list(dict.fromkeys(model.resolve_budget(b) for b in args.budget))
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> None:
        budgets, seeds = [model.budget_of(n) for n in kept], range(args.seed, args.seed + len(what))
        options: dict[str, Any] = {"num_inference_steps": steps, "guidance": guidance}
        for _ in draw_budgets(pipeline, what, budgets, seeds, output_type="latent", **options):
            pass

    calibration = calibrate_cache(model, draw, args.degree)
    calibration.teacache(weights=weights_digest(Path(args.run))).save(file)
    report: dict[str, Any] = {
        "out": str(file),
        "budget": [model.budget_of(n) for n in kept],
        "coefficients": list(calibration.coefficients),
        "fitted_to": len(calibration.changes),
        "fit_error": calibration.fit_error,
        "steps": calibration.num_steps,
        "computed_steps": {str(t): calibration.computed_steps(t) for t in THRESHOLDS},
        "mag_ratios": calibration.mag_ratios,
    }
    return print_report(report, args.json, _show)


def _show(report: dict[str, Any]) -> None:
    rows = [(t, f"{n} of {report['steps']}") for t, n in report["computed_steps"].items()]
    print(format_table(("threshold", "steps computed"), rows))
    print(
        f"\nfitted to {report['fitted_to']} changes from step to step, to within "
        f"{report['fit_error']:.0%} of their mean; written to {report['out']}"
    )
