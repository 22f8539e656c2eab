"""`elit sample`: images of given classes at one or more budgets, from the same noise."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elit._files import write_json
from elit.cli.common import (
    Parser,
    add_json_flag,
    flops_column,
    format_table,
    number,
    one_of,
    path_text,
    print_json,
    whole_number,
)
from elit.cli.points import (
    AUTO,
    DEFAULT_STEPS,
    add_guidance,
    add_run,
    add_what,
    budget_or_auto,
    check_auto,
    check_draws_images,
    check_run,
    choose_point,
    make_guidance,
    open_pipeline,
)
from elit.cli.sample_folder import choose_folder, save_picture, save_sheet
from elit.flow.words import SAMPLERS

if TYPE_CHECKING:
    from elit.caching.configs import TeaCacheConfig
    from elit.pipelines.base import ElasticPipeline

MAX_DEFAULT_LABELS = 10
_SETTINGS = (
    "count", "steps", "guidance", "scale", "guide_budget", "interval", "sampler", "seed", "size",
    "frames", "video", "dtype",
)  # fmt: skip

_EPILOG = """\
Image i, counted from 0, draws from seed + i: its noise depends neither on the budget nor on the
batch. Guidance: cfg (no label, same budget), ag (same label, low budget), ccfg (no label, low
budget). Without --out the images go to RUN/sampled/1, /2, ...; the same settings again write to
the same folder."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit sample`."""
    # RUN first: behind --labels or --budget it would be taken for one of their values.
    parser.usage = "elit sample RUN [--labels L ... | --prompts TEXT ...] [--budget B ...] [flags]"
    parser.epilog = _EPILOG
    add_run(parser)
    add_what(parser)
    add = parser.add_argument
    add("--negative-prompt", metavar="TEXT",
        help="what the guide of cfg or ccfg is told (default: nothing)")  # fmt: skip
    add("--count", type=whole_number(1), default=1, metavar="N", help="images per label or text")
    add("--budget", type=budget_or_auto, nargs="+", default=[1.0], metavar="B",
        help="fractions of the latents to keep, such as 1 0.5 1/4, or auto: what `elit sweep` "
        "found best within a cap (default: 1)")  # fmt: skip
    add("--sweep", type=path_text, metavar="FILE",
        help="of budget auto (default: RUN/swept/sweep.json)")  # fmt: skip
    add("--max-gflops", type=number, metavar="G", help="cap of budget auto for an image")
    add("--max-ms", type=number, metavar="MS",
        help="cap of budget auto for an image, on this device, --batch-size at a time")  # fmt: skip
    add("--steps", type=whole_number(1), metavar="N", help="steps (default: 40)")
    add_guidance(parser)
    add("--interval", type=number, nargs=2, metavar=("LOW", "HIGH"),
        help="noise levels in which guidance acts (default: 0 1)")  # fmt: skip
    add("--sampler", type=one_of(SAMPLERS, "sampler"), metavar="NAME",
        help=f"{', '.join(SAMPLERS)} (default: the one saved in RUN)")  # fmt: skip
    add("--teacache", type=number, metavar="THRESHOLD",
        help="skip steps at which little changes, as 0.1; needs `elit calibrate RUN`")  # fmt: skip
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, metavar="N",
        help="of the first image (default: 0)")  # fmt: skip
    add("--size", type=whole_number(1), nargs=2, metavar=("H", "W"),
        help="pixels (default: what the model was made for)")  # fmt: skip
    add("--frames", type=whole_number(1), metavar="N",
        help="of clips (default: what the model was made for)")  # fmt: skip
    add("--video", type=one_of(("gif", "mp4"), "video format"), metavar="FORMAT",
        help="of clips: gif or mp4 (default: gif)")  # fmt: skip
    add("--batch-size", type=whole_number(1), default=32, metavar="N",
        help="images drawn at a time (default: 32)")  # fmt: skip
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", type=one_of(("fp32", "bf16"), "dtype"), default="fp32", metavar="NAME",
        help="fp32 or bf16 (default: fp32)")  # fmt: skip
    add("--out", type=path_text, metavar="DIR",
        help="folder of the images (default: a new one in RUN)")  # fmt: skip
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Draw, write and tell."""
    check_run(args.run)
    guidance = make_guidance(args)  # before the imports: a mistake in a flag is told at once
    check_auto(args)
    pipeline = open_pipeline(args)
    check_draws_images(args.run, pipeline)
    from elit.pipelines.folder import weights_digest
    from elit.pipelines.text_pipeline import ElitTextPipeline

    model = pipeline.transformer
    what = what_to_draw(args, model)
    check_video(args, pipeline)
    if AUTO in args.budget:
        guidance = choose_point(args, pipeline, what * args.count)
    args.steps = args.steps or DEFAULT_STEPS
    # Two budgets may round to one number of latents: it is drawn once.
    kept = list(dict.fromkeys(model.resolve_budget(b) for b in args.budget))
    settings = {
        "run": args.run,
        "weights": weights_digest(Path(args.run)),
        **({} if args.variant is None else {"variant": args.variant}),
        "prompts" if model.takes_text else "labels": what,
        **({"negative_prompt": args.negative_prompt} if model.takes_text else {}),
        **{key: getattr(args, key) for key in _SETTINGS},
        "budget": [model.budget_of(n) for n in kept],
    }
    cache = load_teacache(args)
    if cache is not None:
        settings["teacache"] = cache.to_dict()
    folder = choose_folder(args, settings)
    height, width = args.size or (None, None)
    options: dict[str, Any] = {
        "num_inference_steps": args.steps, "guidance": guidance, "height": height, "width": width,
        "num_frames": args.frames,
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
    first = options | {"guidance": everywhere, "num_inference_steps": 1}
    pipeline(extremes, model.budget_of(kept[0]), **first)
    if cache is not None:
        model.enable_cache(cache)
    # The settings come first: what a killed call leaves is known to be theirs.
    report: dict[str, Any] = {"out": str(folder), "settings": settings}
    cost = pipeline.forward_cost(args.frames, height, width, text_tokens)
    write_json(folder / "samples.json", report)
    costs = [(n, cost.flops(n) / 1e9) for n in kept]
    rows = list(draw_rows(pipeline, args, what * args.count, costs, options, folder))
    sheet = folder / "samples.png"
    save_sheet(sheet, [row.pop("images") for row in rows], rows, what, pipeline)
    report |= {"sheet": str(sheet), "text_tokens": text_tokens, "rows": rows}
    write_json(folder / "samples.json", report)
    if args.json:
        print_json(report)
    else:
        counts = None if cache is None else model.cache_counts()
        _print_report(args, report, counts, len(what) * args.count)
    return 0


def what_to_draw(args: argparse.Namespace, model: Any) -> list[Any]:
    """Labels, or texts."""
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
    for flag, given in (("prompts", args.prompts), ("negative-prompt", args.negative_prompt)):
        if given is not None:
            raise ValueError(f"--{flag} is for models that draw texts; this one draws --labels")
    return args.labels or list(range(min(MAX_DEFAULT_LABELS, model.config.num_classes)))


def check_video(args: argparse.Namespace, pipeline: "ElasticPipeline") -> None:
    """--video is of clips, and MP4 needs an encoder."""
    if args.video is None:
        args.video = "gif" if pipeline.draws_clips else None
    elif not pipeline.draws_clips:
        raise ValueError("--video is of models that draw clips; this one draws images")
    elif args.video == "mp4":
        from elit.viz.sheet import check_mp4

        check_mp4()


def load_teacache(args: argparse.Namespace) -> "TeaCacheConfig | None":
    """The calibrated TeaCache of a run, if one is asked for."""
    if args.teacache is None:
        return None
    from elit.caching.configs import CALIBRATION_FILE, TeaCacheConfig
    from elit.pipelines.folder import weights_digest

    file = Path(args.run) / CALIBRATION_FILE
    cache = TeaCacheConfig.load(file, threshold=args.teacache)
    if cache.weights not in (None, weights_digest(Path(args.run))):
        raise ValueError(
            f"{file} was fitted to other weights than {args.run} holds now; run `elit calibrate "
            f"{args.run}` again"
        )
    return cache


def draw_rows(
    pipeline: "ElasticPipeline",
    args: argparse.Namespace,
    what: Sequence[Any],
    costs: Sequence[tuple[int | None, float]],
    options: dict[str, Any],
    folder: Path,
) -> Iterator[dict[str, Any]]:
    """Draw and write all images at each number of latents, whose GFLOPs stand beside it.

    Yields a row of the table.
    """
    from elit.interface.budget import format_budget
    from elit.pipelines.budgets import draw_budgets
    from elit.viz.sheet import film_strip

    model = pipeline.transformer
    seeds, budgets = range(args.seed, args.seed + len(what)), [model.budget_of(n) for n, _ in costs]
    texts = len(what) // args.count
    names = [
        f"prompt-{i % texts}-seed-{seed}" if model.takes_text else f"label-{one}-seed-{seed}"
        for i, (one, seed) in enumerate(zip(what, seeds, strict=True))
    ]
    drawn = draw_budgets(pipeline, what, budgets, seeds, args.batch_size, **options)
    for (n, cost), budget in zip(costs, budgets, strict=True):
        pipeline.set_progress_bar_config(
            desc=f"budget {format_budget(budget)}", disable=not sys.stderr.isatty(), leave=False
        )
        images, seconds = next(drawn)
        home = folder / f"budget-{budget:g}"
        files = [save_picture(x, home / name, args) for x, name in zip(images, names, strict=True)]
        yield {
            "budget": budget,
            "num_latents": n,
            "gflops": cost,
            "ms_per_image": 1000 * seconds / len(images),
            "files": files,
            "images": [film_strip(i) for i in images] if pipeline.draws_clips else images,
        }


def _print_report(
    args: argparse.Namespace, report: dict[str, Any], counts: tuple[int, int] | None, images: int
) -> None:
    """The rows, how they were drawn, and what a step cache computed and skipped."""
    _print_rows(report["rows"])
    if counts is not None:
        computed, skipped = counts
        print(f"\nTeaCache skipped {skipped} of {computed + skipped} calls of the blocks")
    together = min(args.batch_size, images)
    how = f"{args.steps} steps, guidance {args.guidance}"
    print(f"\n{how}; ms with {together} images at a time")
    if report["text_tokens"] is not None:
        print(f"\nwith texts of up to {report['text_tokens']} tokens")
    print(f"\n{report['sheet']}")


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    from elit.interface.budget import format_budget

    unit, flops = flops_column([row["gflops"] for row in rows])
    header = ("budget", "latents per group", f"{unit} per forward", "ms per image")
    table = [
        (
            format_budget(row["budget"]),
            "-" if row["num_latents"] is None else row["num_latents"],
            cost,
            f"{row['ms_per_image']:.1f}",
        )
        for row, cost in zip(rows, flops, strict=True)
    ]
    print(format_table(header, table))
