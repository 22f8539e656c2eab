"""`elit eval`: scores of one operating point, with all that they depend on.

What `elit sweep` shares with it stands here too.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elit._files import output_folder, typed_path, write_json
from elit._tables import format_table
from elit.choosing.sweep_file import default_home
from elit.cli.common import (
    check_run,
    make_guidance,
    open_pipeline,
    print_report,
    quiet_diffusers,
)
from elit.cli.flags import OneOf, Parser, WholeNumber
from elit.data import SPLITS
from elit.networks import NETWORKS
from elit.training.config_files import config_of_run

if TYPE_CHECKING:
    from elit.evaluation.evaluation import Evaluation

MOST_SAMPLES = 10_000_000
STEPS = WholeNumber(1, 10_000)
USAGE = "elit eval RUN [--reference DATA] [--network NAME ...] [--samples N] [flags]"
_EPILOG = """\
Sample i draws from seed + i and has the label i modulo the classes, on any number of processes
(torchrun, srun): they share the parts and need not talk. The same command again goes on where a
killed one was. The reference is a folder of pictures, the output of `elit prepare`, a built-in
data set, or ADM's .npz; its statistics are kept in the cache (ELIT_CACHE, or ~/.cache/elit)."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit eval`."""
    add_evaluation_flags(parser, samples=50_000)  # as papers have it
    parser.add("budget")
    parser.add("steps", kind=STEPS)
    parser.add("guidance scale guide-budget")
    parser.switch("save-npz", "write all samples too, as other evaluation tools read them")
    parser.add("out", "folder of the results (default: RUN/evaluated)")


def run(args: argparse.Namespace) -> int:
    """Draw, score, write and tell."""
    check_run(args.run)
    make_guidance(args)  # before the imports: a mistake in a flag is told at once
    home = home_of(args, "evaluated")
    evaluation = open_evaluation(args, home, keep_images=args.save_npz)
    from elit.choosing.points import OperatingPoint
    from elit.evaluation.evaluation import evaluate, save_npz

    pipeline = evaluation.drawing.pipeline
    steps = args.steps or pipeline.default_steps
    given = args.budget, steps, args.guidance, args.scale, args.guide_budget
    point = OperatingPoint(*given, interval_of(args)).resolved(pipeline.transformer)
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
    return print_report(report, args.json, _show)


def _show(report: dict[str, Any]) -> None:
    """Scores, and under them what they are of."""
    from elit.choosing.points import OperatingPoint
    from elit.viz.sweeps import SCORES

    (row,) = report["rows"]
    table = []
    for name in (name for name in SCORES if name in row["scores"]):
        value = f"{row['scores'][name]:.4f}"
        if row["deviations"].get(name):
            value += f" ± {row['deviations'][name]:.4f}"
        better = "lower is better" if SCORES[name].lower_is_better else "higher is better"
        table.append((SCORES[name].title, value, row["scores_of"][name], better))
    print(format_table(("score", "value", "network", ""), table))
    for warning in row["warnings"]:
        print(f"! {warning}")
    cost = f"{row['gflops_per_image']:.4g} GFLOPs and {row['ms_per_image']:.1f} ms an image"
    if row["decode_ms_per_image"] >= 0.05:
        cost += f", and {row['decode_ms_per_image']:.1f} ms to decode it"
    point = OperatingPoint.from_dict(row)
    print(f"\n{settings_text(report)}")
    print(f"point      {point}, {row['calls']} calls of the model, {row['sampler']}")
    print(f"cost       {cost}\n\n{report['out']}")


# ---- what `elit sweep` does too ----


def add_evaluation_flags(parser: Parser, samples: int) -> None:
    """Flags of what is drawn and compared, whatever the operating point."""
    parser.epilog = _EPILOG
    add = parser.add
    add("RUN variant")
    add("reference", "real images: folder, .npz or data set (default: RUN's training data)",
        typed_path, "DATA")  # fmt: skip
    add("split", "split of a data set: {} (default: train)", OneOf(SPLITS, "split"))
    parser.switch("fit", "scale and cut the pictures of a folder to the model's size")
    add("network", f"{', '.join(NETWORKS)}, or a TorchScript file (default: inception and dinov2, "
        "with i3d for clips; below 64 px classifier)", typed_path, dest="networks",
        nargs="+")  # fmt: skip
    add("weights", "weights of a network: a file, a folder or a name on the hub",
        metavar="NAME=PATH", nargs="+", default=[])  # fmt: skip
    add("samples", "samples of each operating point", WholeNumber(2, MOST_SAMPLES),
        default=samples)  # fmt: skip
    add("prompts", "file of texts, one a line (default: the reference's)", typed_path, "FILE",
        nargs=None)  # fmt: skip
    add("sampler shift interval seed size frames")
    add("batch-size", default=50)
    add("device dtype")


def open_evaluation(args: argparse.Namespace, home: Path, keep_images: bool) -> "Evaluation":
    """Everything that the flags name, loaded and checked."""
    output_folder(home, "--out")
    weights = _weights(args.weights)
    from elit._process import this_process
    from elit.evaluation.drawing import Drawing
    from elit.evaluation.evaluation import Evaluation
    from elit.evaluation.subjects import choose_texts, open_networks, open_reference
    from elit.pipelines.folder import check_draws_images
    from elit.training.estimate import training_of_run

    process = this_process()
    pipeline = open_pipeline(args, process.local_rank)
    check_draws_images(pipeline, args.run)
    pipeline.set_progress_bar_config(disable=True)
    config = config_of_run(args.run)
    data = None if config is None else (config.data.name, config.data.options)
    size = args.size and tuple(args.size)
    fit_to = size or pipeline.pixel_size()[-2:] if args.fit else None
    images = open_reference(pipeline, args.reference, args.split, fit_to, data)
    with quiet_diffusers():
        networks = open_networks(pipeline, args.networks, weights, data)
    texts = choose_texts(pipeline, images, args.samples, args.prompts)
    return Evaluation(
        run=args.run,
        drawing=Drawing(
            pipeline, networks, args.samples, args.seed, args.batch_size, texts, size, args.frames,
            keep_images,
        ),
        images=images,
        process=process,
        home=home,
        training=None if config is None else training_of_run(args.run, config),
        variant=args.variant,
    )  # fmt: skip


def home_of(args: argparse.Namespace, name: str) -> Path:
    """Folder of the results: --out, or one of that name in RUN."""
    return default_home(args.run) / name if args.out is None else Path(args.out)


def interval_of(args: argparse.Namespace) -> tuple[float, float] | None:
    """--interval as operating points have it."""
    return None if args.interval is None else (args.interval[0], args.interval[1])


def _weights(texts: list[str]) -> dict[str, str]:
    """Paths by network."""
    weights = {}
    for text in texts:
        name, _, path = text.partition("=")
        if name not in NETWORKS or not path:
            raise ValueError(
                f"--weights {text!r} is not understood; give NAME=PATH with one of "
                f"{', '.join(NETWORKS)}"
            )
        weights[name] = typed_path(path)
    return weights


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
