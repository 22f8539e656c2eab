"""`elit sample`: images of given classes at one or more budgets, from the same noise."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elit._files import typed_path, write_json
from elit._tables import counted, format_table
from elit.choosing.sweep_file import default_home
from elit.cli.common import check_run, flops_column, make_guidance, open_pipeline, print_report
from elit.cli.flags import AUTO, SCHEDULE, OneOf, Parser, WholeNumber, number
from elit.interface.budget import read_budget

if TYPE_CHECKING:
    from elit.choosing.points import OperatingPoint
    from elit.flow.guidance import Guidance
    from elit.pipelines.base import ElasticPipeline

MAX_DEFAULT_LABELS = 10
_SETTINGS = (
    "count", "steps", "guidance", "scale", "guide_budget", "interval", "sampler", "seed", "size",
    "frames", "video", "dtype",
)  # fmt: skip

# RUN first: behind --labels or --budget it would be taken for one of their values.
USAGE = "elit sample RUN [--labels L ... | --prompts TEXT ...] [--budget B ...] [flags]"
EPILOG = """\
Image i, counted from 0, draws from seed + i: its noise depends neither on the budget nor on the
batch. Guidance: cfg (no label, same budget), ag (same label, low budget), ccfg (no label, low
budget). Without --out the images go to RUN/sampled/1, /2, ...; the same settings again write to
the same folder."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit sample`."""
    add = parser.add
    add("RUN variant labels prompts")
    add("negative-prompt", "text that the guide of cfg or ccfg reads (default: an empty one)",
        metavar="TEXT")  # fmt: skip
    add("count", "images of each label or text", WholeNumber(), default=1)
    add("budget", "fractions of the latents to keep, such as 1 0.5 1/4, or auto: what `elit sweep` "
        "found best within a cap, or schedule: budgets over the steps within a cap, as "
        "`elit sweep --search` found them, or else `elit schedule` plans them",
        lambda text: text if text in (AUTO, SCHEDULE) else read_budget(text),
        nargs="+", default=[1.0])  # fmt: skip
    add("sweep", "file that `--budget auto` chooses from (default: RUN/swept/sweep.json)",
        typed_path, "FILE")  # fmt: skip
    add("max-gflops", "cap on an image's GFLOPs, for `--budget auto` and schedule", number, "G")
    add("max-ms", "cap on an image's milliseconds on this device, drawn --batch-size at a time, "
        "for `--budget auto` and schedule", number, "MS")  # fmt: skip
    add("steps")
    add("guidance scale guide-budget interval sampler shift")
    add("teacache", "skip steps at which less changes than this, such as 0.1; needs "
        "`elit calibrate RUN`", number, "THRESHOLD")  # fmt: skip
    add("seed size frames")
    add("video", "format of clips: {} (default: gif)", OneOf(("gif", "mp4"), "video format"),
        "FORMAT")  # fmt: skip
    add("batch-size device dtype")
    add("out", "folder of the images (default: a new one in RUN)")


def run(args: argparse.Namespace) -> int:
    """Draw, write and tell."""
    check_run(args.run)
    guidance = make_guidance(args)  # before the imports: a mistake in a flag is told at once
    check_auto(args)
    pipeline = open_pipeline(args)
    from elit.evaluation.samples import FILE, SHEET, choose_folder, draw_into
    from elit.pipelines.folder import check_draws_images, weights_digest
    from elit.pipelines.load import load_teacache
    from elit.pipelines.text_pipeline import ElitTextPipeline

    check_draws_images(pipeline, args.run)
    model = pipeline.transformer
    what = what_to_draw(args, pipeline)
    check_video(args, pipeline)
    point = choose_point(args, pipeline, guidance, what * args.count)
    planned = {} if point is None else point.of_steps()
    guidance = guidance if point is None else point.make_guidance()
    args.steps = args.steps or pipeline.default_steps
    # Two budgets may round to one number of latents: it is drawn once.
    kept = list(dict.fromkeys(model.resolve_budget(b) for b in args.budget))
    settings = {
        "run": args.run,
        "weights": weights_digest(Path(args.run)),
        **{k: x for k in ("variant", "shift") if (x := getattr(args, k)) is not None},
        "prompts" if model.takes_text else "labels": what,
        **({"negative_prompt": args.negative_prompt} if model.takes_text else {}),
        **{key: getattr(args, key) for key in _SETTINGS},
        "budget": [model.budget_of(n) for n in kept],
        **planned,
    }
    cache = None if args.teacache is None else load_teacache(args.run, args.teacache)
    if cache is not None:
        settings["teacache"] = cache.to_dict()
    elif point is not None and point.cache is not None:
        settings["step_cache"], cache = asdict(point.cache), point.cache.config()
    folder = choose_folder(args.out, default_home(args.run) / "sampled", settings)
    size = args.size or (None, None)
    options: dict[str, Any] = {
        "num_inference_steps": args.steps, "guidance": guidance, "height": size[0],
        "width": size[1], "num_frames": args.frames,
    }  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    text_tokens = None
    if isinstance(pipeline, ElitTextPipeline):
        options["negative_prompt"] = args.negative_prompt or ""
        text_tokens = pipeline.check_prompt([*what, options["negative_prompt"]])
    # The first call of a process is slow, so it isn't timed; and it checks all labels and the size.
    extremes = what[: args.batch_size] if model.takes_text else [min(what), max(what)]
    # Its only step is at noise level 1, where an interval may have guidance off.
    everywhere = guidance and replace(guidance, interval=(0.0, 1.0))
    first = options | {"guidance": everywhere, "num_inference_steps": pipeline.few_steps or 1}
    pipeline(extremes, model.budget_of(kept[0]), **first)
    if cache is not None:
        model.enable_cache(cache)
    # The settings come first: what a killed call leaves is known to be theirs.
    report: dict[str, Any] = {"out": str(folder), "settings": settings}
    write_json(folder / FILE, report)
    cost = pipeline.forward_cost(args.frames, size[0], size[1], text_tokens)
    costs = {n: cost.flops(n) / 1e9 for n in kept}
    if point is not None and planned:
        costs = dict.fromkeys(kept, mean_gflops(pipeline, point, cost, (args.frames, *size)))
    rows = draw_into(
        folder, pipeline, what, costs, args.seed, args.count, args.batch_size, args.video,
        sys.stderr.isatty(), **(options | planned),
    )  # fmt: skip
    report |= {"sheet": str(folder / SHEET), "text_tokens": text_tokens, "rows": rows}
    write_json(folder / FILE, report)
    counts = None if cache is None else model.cache_counts()
    together = min(args.batch_size, len(what) * args.count)
    return print_report(report, args.json, lambda report: _show(report, counts, together))


def check_auto(args: argparse.Namespace) -> None:
    """Caps are of --budget auto and schedule; each stands alone, and auto chooses the guidance."""
    given = {"--max-gflops": args.max_gflops, "--max-ms": args.max_ms}
    caps = [flag for flag, value in given.items() if value is not None]
    for cap in caps:
        if not 0 < given[cap] <= 1e18:
            raise ValueError(f"{cap} {given[cap]:g} is not allowed; give a positive number")
    word = next((one for one in args.budget if isinstance(one, str)), None)
    if args.sweep is not None and word != AUTO:
        raise ValueError("--sweep has no effect without --budget auto; add it")
    if word is None:
        if caps:
            raise ValueError(f"{caps[0]} has no effect without --budget auto or schedule; add one")
        return
    if len(args.budget) > 1:
        raise ValueError(f"--budget {word} stands alone; leave the other budgets out")
    if not caps:
        raise ValueError(f"--budget {word} needs a cap; add --max-gflops or --max-ms")
    if word == AUTO and args.guidance != "none":
        raise ValueError("--budget auto chooses the guidance too; leave --guidance out")
    if word == SCHEDULE and args.guidance not in ("none", "cfg"):
        raise ValueError(
            f"--budget schedule plans the guide's budgets too; use --guidance cfg instead of "
            f"{args.guidance}"
        )
    if word == SCHEDULE and len(caps) > 1:
        raise ValueError("--budget schedule takes one cap; leave --max-gflops or --max-ms out")


def choose_point(
    args: argparse.Namespace, pipeline: "ElasticPipeline", guidance: "Guidance | None",
    what: Sequence[Any],
) -> "OperatingPoint | None":  # fmt: skip
    """What --budget auto or schedule stands for, which the other flags are then set to."""
    if not {AUTO, SCHEDULE} & set(args.budget):
        return None
    from elit.choosing.choose import choose
    from elit.scheduling.scheduled import scheduled_point

    height, width = args.size or (None, None)
    flops = None if args.max_gflops is None else args.max_gflops * 1e9
    caps, batch = (flops, args.max_ms), what[: args.batch_size]
    if AUTO in args.budget:
        size = height, width, args.frames
        point = choose(pipeline, *caps, args.steps, batch, *size, args.sweep)
    else:
        place = args.frames, height, width
        point = scheduled_point(args.run, pipeline, *caps, guidance, args.steps, batch, place)
    if point.cache is not None and args.teacache is not None:
        raise ValueError(f"what was chosen has a {point.cache} of its own; leave --teacache out")
    interval = None if point.interval is None else list(point.interval)
    budget = 1.0 if point.budgets_of_steps else point.budget
    names = "steps", "guidance", "scale", "guide_budget"
    vars(args).update({name: getattr(point, name) for name in names})
    args.budget, args.interval = [budget], interval
    return point


def mean_gflops(
    pipeline: "ElasticPipeline", point: "OperatingPoint", cost: Any, size: Sequence[int | None]
) -> float:
    """Of a forward on average, over a point's budgets of steps."""
    calls = pipeline.calls(**replace(point, cache=None).arguments(), size=size)
    forwards = [cost.flops(n) for call in calls for n, times in call for _ in range(times)]
    return sum(forwards) / len(forwards) / 1e9


def what_to_draw(args: argparse.Namespace, pipeline: Any) -> list[Any]:
    """Labels, or texts."""
    model = pipeline.transformer
    if model.takes_text:
        if args.labels is not None:
            raise ValueError(
                "--labels are of models that draw classes; this one draws texts, as in "
                '--prompts "a red disc"'
            )
        if args.prompts is None:
            raise ValueError('this model draws texts; give some, as in --prompts "a red disc"')
        if args.negative_prompt is not None and args.guidance not in ("cfg", "ccfg"):
            raise ValueError(
                "--negative-prompt has no effect without a guide that reads it; add --guidance cfg "
                "or ccfg"
            )
        return list(args.prompts)
    for name, given in (("prompts", args.prompts), ("negative-prompt", args.negative_prompt)):
        if given is not None:
            raise ValueError(f"--{name} is for models that draw texts; this one draws --labels")
    if args.labels is not None:
        return pipeline.get_label_ids(args.labels)
    return list(range(min(MAX_DEFAULT_LABELS, model.config.num_classes)))


def check_video(args: argparse.Namespace, pipeline: "ElasticPipeline") -> None:
    """--video is of clips, and MP4 needs an encoder."""
    if args.video is None:
        args.video = "gif" if pipeline.draws_clips else None
    elif not pipeline.draws_clips:
        raise ValueError("--video is of models that draw clips; this one draws images")
    elif args.video == "mp4":
        from elit.viz.sheet import check_mp4

        check_mp4()


def _show(report: dict[str, Any], counts: tuple[int, int] | None, together: int) -> None:
    """The rows, how they were drawn, and what a step cache computed and skipped."""
    from elit.interface.budget import format_budget

    rows, settings = report["rows"], report["settings"]
    planned = "budgets_of_steps" in settings
    unit, flops = flops_column([row["gflops"] for row in rows])
    header = ("budget", "latents per group", f"{unit} per forward", "ms per image")
    table = [
        (
            format_budget(row["budget"]),
            "by step" if planned else row["num_latents"],
            cost,
            f"{row['ms_per_image']:.1f}",
        )
        for row, cost in zip(rows, flops, strict=True)
    ]
    print(format_table(header, table))
    if counts is not None:
        computed, skipped = counts
        kind = settings.get("step_cache", {}).get("kind", "TeaCache")
        print(f"\n{kind} skipped {skipped} of {computed + skipped} calls of the blocks")
    how = f"{counted(settings['steps'], 'step')}, guidance {settings['guidance']}"
    print(f"\n{how}; ms with {counted(together, 'image')} at a time")
    if report["text_tokens"] is not None:
        print(f"\nwith texts of up to {report['text_tokens']} tokens")
    print(f"\n{report['sheet']}")
