"""`elit schedule`: what fewer latents cost at each noise level, and budgets over the steps."""

import argparse
from pathlib import Path
from typing import Any

from elit._files import output_folder
from elit._tables import format_table
from elit.choosing.sweep_file import default_home
from elit.cli.common import check_run, open_pipeline, print_report
from elit.cli.flags import OWN_STEPS, OneOf, Parser, WholeNumber, number
from elit.cli.inspect import STEPS, add_data_flags, data_of
from elit.flow.words import DEFAULT_SCALE

SHARES = (0.75, 0.5, 0.3)  # of full budget's FLOPs, that are shown

USAGE = "elit schedule RUN [--steps N] [--scale S] [flags]"
EPILOG = """\
Writes RUN/schedule.json and schedule.png. `elit sample RUN --budget schedule --max-gflops G` draws
by it, at any guidance, sampler and number of steps: --scale is of the plans that are shown.
Options of --data are given as --data.options.count 500."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit schedule`."""
    add = parser.add
    add("RUN variant")
    add("by", "plan by: {}; the spectrum of the data needs nothing of the model",
        OneOf(("errors", "spectrum"), "way to plan"), default="errors")  # fmt: skip
    about = "steps of the sampler whose noise levels are measured"
    add("steps", f"{about} {OWN_STEPS.format(STEPS)}")
    add("scale", "scale of the guidance (CFG) of the plans that are shown, 1 for none (default: "
        f"{DEFAULT_SCALE:g}, 1 if the model has learned one)", number, "S")  # fmt: skip
    add("images", "images to measure on, spread over the data", WholeNumber(2), default=32)
    add("draws", "draws of noise for each image, an even number", WholeNumber(2), default=2)
    add_data_flags(parser)
    add("sampler batch-size")
    add("seed", "seed of the noise")
    add("device")
    add("out", "folder to write into (default: RUN)")
    parser.set_defaults(dtype="fp32")


def run(args: argparse.Namespace) -> int:
    """Measure, plan, write and tell."""
    check_run(args.run)
    from elit.data import load_dataset
    from elit.flow.guidance import CFG
    from elit.inspection.inspector import check_elastic
    from elit.inspection.subject import choose_subject
    from elit.pipelines.folder import weights_digest
    from elit.scheduling.chart import schedule_picture
    from elit.scheduling.measure import measure_pipeline, power_spectrum
    from elit.scheduling.schedule import SCHEDULE_FILE, Schedule, ladder

    pipeline = open_pipeline(args)
    model, steps = pipeline.transformer, args.steps or pipeline.few_steps or STEPS
    check_elastic(model, args.run)
    folder = output_folder(args.out or default_home(args.run), "--out")
    scale = args.scale
    if scale is None:
        scale = 1 if pipeline.learned_guidance else DEFAULT_SCALE
    guidance = None if scale == 1 else CFG(scale)
    name, options = data_of(args)
    dataset = load_dataset(name, args.split, **options)
    subject, indices, _ = choose_subject(
        pipeline, dataset, name, args.images, args.draws, args.seed, args.batch_size
    )
    about = {
        "run": args.run, "weights": weights_digest(Path(args.run)), "data": name,
        "options": options, "split": args.split, "indices": indices, "draws": args.draws,
        "seed": args.seed, "steps": steps, "sampler": type(pipeline.scheduler).__name__,
    }  # fmt: skip
    schedule = Schedule(
        model.max_latents, model.min_latents, spectrum=power_spectrum(subject.images),
        space=subject.images.ndim - 2, about=about,
    )  # fmt: skip
    if args.by == "errors":
        levels = sorted({*pipeline.start(steps, "cpu")}, reverse=True)
        latents = ladder(model.min_latents, model.max_latents)
        errors = measure_pipeline(pipeline, subject, levels, latents, progress=True)
        schedule = schedule.with_errors(levels, latents, errors)
    schedule.save(folder / SCHEDULE_FILE)
    calls = pipeline.calls(1.0, steps, guidance)
    cost = pipeline.forward_cost()
    full = sum(cost.flops(n) * times for call in calls for n, times in call)
    plans = {}
    for share in SHARES:
        try:
            plans[share] = schedule.plan(pipeline, share * full, None, guidance, steps)
        except ValueError:  # below what the fewest latents cost
            continue
    sheet = folder / "schedule.png"
    schedule_picture(schedule, {f"{share:.0%}": plan for share, plan in plans.items()}).save(sheet)
    rows = [
        {"share": share, "gflops": plan.cost / 1e9, "error": plan.error,
         "settings": plan.settings(), "budgets": plan.budgets(),
         "guide_budgets": plan.guide_budgets()}
        for share, plan in plans.items()
    ]  # fmt: skip
    report = {"out": str(folder / SCHEDULE_FILE), "sheet": str(sheet), "by": schedule.by,
              "full_gflops": full / 1e9, "plans": rows}  # fmt: skip
    return print_report(report, args.json, _show)


def _show(report: dict[str, Any]) -> None:
    from elit.interface.budget import format_budget

    def words(budgets: list[float | None]) -> str:
        return " ".join("-" if b is None else format_budget(b) for b in budgets)

    header = ("FLOPs", "GFLOPs", "predicted error")
    cells = [
        (f"{r['share']:.0%}", f"{r['gflops']:.4g}",
         "-" if r["error"] is None else f"{r['error']:.2g}")
        for r in report["plans"]
    ]  # fmt: skip
    print(format_table(header, cells))
    for row in report["plans"]:
        print(f"\n{row['share']:.0%}, {row['settings']}\n  budgets  {words(row['budgets'])}")
        print(f"  guide    {words(row['guide_budgets'])}")
    print(f"\n{report['out']}\n{report['sheet']}")
