"""What `elit eval` and `elit sweep` share: flags, and what they make of them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elit._files import typed_path
from elit.cli.common import (
    Parser,
    number,
    one_of,
    output_folder,
    path_text,
    quiet_diffusers,
    whole_number,
)
from elit.cli.points import add_run, check_draws_images, open_pipeline
from elit.data import SPLITS
from elit.flow.words import SAMPLERS

if TYPE_CHECKING:
    from elit.evaluation.evaluation import Evaluation
    from elit.evaluation.images import Images
    from elit.networks.feature_network import FeatureNetwork
    from elit.pipelines.base import ElasticPipeline

# A test compares them with those of the library, whose import would bring torch.
NETWORKS = ("inception", "dinov2", "clip", "i3d", "classifier")
MOST_SAMPLES, MOST_STEPS = 10_000_000, 10_000
LARGE = 64  # pixels of a side from which the usual networks see something

EPILOG = """\
Sample i draws from seed + i and has the label i modulo the classes, on any number of processes
(torchrun, srun): they share the parts and need not talk. The same command again goes on where a
killed one was. The reference is a folder of pictures, the output of `elit prepare`, a built-in
data set, or ADM's .npz; its statistics are kept in the cache (ELIT_CACHE, or ~/.cache/elit)."""


def add_evaluation_flags(parser: Parser, samples: int) -> None:
    """Flags of what is drawn and compared, whatever the operating point."""
    add_run(parser)
    add = parser.add_argument
    add("--reference", type=path_text, metavar="DATA",
        help="real images: folder, .npz or data set (default: RUN's training data)")  # fmt: skip
    add("--split", type=one_of(SPLITS, "split"), metavar="NAME",
        help="of a data set: train or validation (default: train)")  # fmt: skip
    add("--fit", action="store_true",
        help="scale and cut the pictures of a folder to the model's size")  # fmt: skip
    add("--network", type=path_text, nargs="+", metavar="NAME", dest="networks",
        help=f"{', '.join(NETWORKS)}, or a TorchScript file (default: inception and dinov2, "
        f"below {LARGE} px classifier)")  # fmt: skip
    add("--weights", nargs="+", metavar="NAME=PATH", default=[],
        help="weights of a network: a file, a folder or a name on the hub")  # fmt: skip
    add("--samples", type=whole_number(2, MOST_SAMPLES), default=samples, metavar="N",
        help="of each operating point (default: %(default)s)")  # fmt: skip
    add("--prompts", type=path_text, metavar="FILE",
        help="file of texts, one a line (default: the reference's)")  # fmt: skip
    add("--sampler", type=one_of(SAMPLERS, "sampler"), metavar="NAME",
        help=f"{', '.join(SAMPLERS)} (default: the one saved in RUN)")  # fmt: skip
    add("--interval", type=number, nargs=2, metavar=("LOW", "HIGH"),
        help="noise levels in which guidance acts (default: 0 1)")  # fmt: skip
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, metavar="N",
        help="of the first sample (default: 0)")  # fmt: skip
    add("--size", type=whole_number(1), nargs=2, metavar=("H", "W"),
        help="pixels (default: what the model was made for)")  # fmt: skip
    add("--frames", type=whole_number(1), metavar="N",
        help="of clips (default: what the model was made for)")  # fmt: skip
    add("--batch-size", type=whole_number(1), default=50, metavar="N",
        help="samples drawn at a time (default: %(default)s)")  # fmt: skip
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", type=one_of(("fp32", "bf16"), "dtype"), default="fp32", metavar="NAME",
        help="fp32 or bf16 (default: fp32)")  # fmt: skip


def open_evaluation(args: argparse.Namespace, home: Path, keep_images: bool) -> "Evaluation":
    """Everything that the flags name, loaded and checked."""
    output_folder(home, "--out")
    weights = _weights(args)
    from elit._process import this_process
    from elit.evaluation.drawing import Drawing
    from elit.evaluation.evaluation import Evaluation

    process = this_process()
    pipeline = open_pipeline(args, process.local_rank)
    check_draws_images(args.run, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    config = _run_config(args.run)
    images = _reference(args, pipeline, config)
    networks = _networks(args, pipeline, config, weights)
    return Evaluation(
        run=args.run,
        drawing=Drawing(
            pipeline, networks, args.samples, args.seed, args.batch_size,
            _texts(args, pipeline, images), args.size and tuple(args.size), args.frames,
            keep_images,
        ),
        images=images,
        process=process,
        home=home,
        training=_training(args.run, config),
        variant=args.variant,
    )  # fmt: skip


def home_of(args: argparse.Namespace, name: str) -> Path:
    """Folder of the results: --out, or one of that name in RUN."""
    if args.out is not None:
        return Path(args.out)
    from elit.choosing.sweep_file import default_home

    return default_home(args.run) / name


def interval_of(args: argparse.Namespace) -> tuple[float, float] | None:
    """--interval as operating points have it."""
    return None if args.interval is None else (args.interval[0], args.interval[1])


def _run_config(run: str) -> Any:
    """Config that a run was trained by; None where there is none."""
    file = Path(run) / "config.yaml"
    if not file.exists():
        return None
    from elit.cli.config import load_config

    return load_config(str(file), {})


def _training(run: str, config: Any) -> dict[str, Any] | None:
    """Steps and operations of a run's training, as far as its folder says."""
    if config is None:
        return None
    from dataclasses import replace

    from elit.training.estimate import estimate

    found = [int(folder.name.partition("-")[2]) for folder in Path(run).glob("checkpoints/step-*")
             if folder.name.partition("-")[2].isdigit()]  # fmt: skip
    steps = max(found, default=config.train.steps)
    try:
        config = replace(config, train=replace(config.train, steps=steps))
        return {"steps": steps, "eflops": estimate(config, gpus=1)["total_eflops"]}
    except ValueError:  # a retrofit of a base that has no known size
        return {"steps": steps, "eflops": None}


def _reference(args: argparse.Namespace, pipeline: "ElasticPipeline", config: Any) -> "Images":
    from elit.evaluation.images import has_splits, open_images

    name, options = args.reference, {}
    if name is None:
        if config is None:
            raise ValueError(
                f"{args.run} doesn't say what it was trained on; give real images with --reference"
            )
        name, options = config.data.name, dict(config.data.options)
        if name == "prepared":
            name, options = str(options["path"]), {}
        elif name == "tensors":
            raise ValueError("--reference: a run on tensors has no images; give some")
    size = None
    if args.fit:
        size = tuple(args.size or pipeline.pixel_size()[-2:])
        if not Path(name).is_dir() or (Path(name) / "manifest.json").exists():
            raise ValueError(f"--fit is of a folder of pictures; {name} is none")
    if args.split is not None and not has_splits(name):
        raise ValueError(f"--split is of a data set; {name} has none, leave it out")
    return open_images(name, args.split or "train", size, pipeline.vae, options)


def _weights(args: argparse.Namespace) -> dict[str, str]:
    """Paths by network."""
    found = {}
    for text in args.weights:
        name, equals, path = text.partition("=")
        if not equals or name not in NETWORKS or not path:
            raise ValueError(
                f"--weights {text!r} is not understood; give NAME=PATH with one of "
                f"{', '.join(NETWORKS)}"
            )
        found[name] = typed_path(path)
    return found


def _networks(
    args: argparse.Namespace, pipeline: "ElasticPipeline", config: Any, weights: dict[str, str]
) -> list["FeatureNetwork"]:
    """The networks by their names; the classifier is fitted on what the run was trained on."""
    from elit.data import load_dataset
    from elit.networks.feature_network import load_network

    names = args.networks
    if names is None:
        small = min(pipeline.pixel_size()[-2:]) < LARGE
        names = ["classifier"] if small else ["inception", "dinov2"]
        if pipeline.draws_clips and not small:
            names.append("i3d")
    if unused := weights.keys() - set(names):
        raise ValueError(f"--weights of {', '.join(unused)} have no effect; add it to --network")
    files = [Path(name).name for name in dict.fromkeys(names)]
    if twice := {name for name in files if files.count(name) > 1}:
        raise ValueError(f"--network: two files are named {twice.pop()}; rename one")
    networks = []
    for name in dict.fromkeys(names):
        if name in NETWORKS or not Path(name).exists():
            from elit._choices import check_choice

            check_choice(name, NETWORKS, "network")
        dataset = None
        if name == "classifier":
            if config is None:
                raise ValueError(
                    "--network classifier is fitted on the data that RUN was trained on, which its "
                    "folder doesn't tell; give another network"
                )
            dataset = load_dataset(config.data.name, "train", **config.data.options)
        with quiet_diffusers():
            networks.append(
                load_network(
                    name,
                    weights=weights.get(name),
                    device=pipeline.transformer.device,
                    dataset=dataset,
                )
            )
    return networks


def _texts(
    args: argparse.Namespace, pipeline: "ElasticPipeline", images: "Images"
) -> tuple[str, ...]:
    """Texts of --prompts, or of the reference."""
    if args.prompts is not None:
        try:
            lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts: {args.prompts} is no text in UTF-8 ({error})") from error
        texts = tuple(line.strip() for line in lines if line.strip())
        if not texts:
            raise ValueError(f"--prompts: {args.prompts} has no line with a text")
        return texts
    if not pipeline.transformer.takes_text:
        return ()
    if images.captions is None:
        raise ValueError("this model draws texts, and the reference has none; give --prompts FILE")
    from elit.evaluation.reference import evenly

    return tuple(images.captions(evenly(images.count, args.samples).tolist()))
