"""What `elit eval` and `elit sweep` share: flags, and what they make of them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elit._files import output_folder, typed_path
from elit.choosing.sweep_file import default_home
from elit.cli.common import quiet_diffusers
from elit.cli.flags import Parser, choice, count, flag, path_text, switch
from elit.cli.points import open_pipeline
from elit.data import SPLITS
from elit.networks import NETWORKS
from elit.training.config_files import config_of_run

if TYPE_CHECKING:
    from elit.evaluation.evaluation import Evaluation

MOST_SAMPLES, MOST_STEPS = 10_000_000, 10_000

_EPILOG = """\
Sample i draws from seed + i and has the label i modulo the classes, on any number of processes
(torchrun, srun): they share the parts and need not talk. The same command again goes on where a
killed one was. The reference is a folder of pictures, the output of `elit prepare`, a built-in
data set, or ADM's .npz; its statistics are kept in the cache (ELIT_CACHE, or ~/.cache/elit)."""


def add_evaluation_flags(parser: Parser, samples: int) -> None:
    """Flags of what is drawn and compared, whatever the operating point."""
    parser.epilog = _EPILOG
    add = parser.add
    add("RUN", "variant")
    add("reference", **flag(
        "real images: folder, .npz or data set (default: RUN's training data)", "DATA", path_text
    ))  # fmt: skip
    add("split", **choice("split of a data set", SPLITS, "split", " (default: train)"))
    add("fit", **switch("scale and cut the pictures of a folder to the model's size"))
    add("network", dest="networks", **flag(
        f"{', '.join(NETWORKS)}, or a TorchScript file (default: inception and dinov2, with i3d "
        "for clips; below 64 px classifier)", "NAME", path_text, nargs="+"))  # fmt: skip
    add("weights", **flag("weights of a network: a file, a folder or a name on the hub",
        "NAME=PATH", nargs="+", default=[]))  # fmt: skip
    add("samples", **count("samples of each operating point", samples, 2, MOST_SAMPLES))
    add("prompts", nargs=None, metavar="FILE", type=path_text,
        help="file of texts, one a line (default: the reference's)")  # fmt: skip
    add("sampler", "interval", "seed", "size", "frames")
    add("batch-size", default=50)
    add("device", "dtype")


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
