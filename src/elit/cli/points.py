"""How to draw, as flags say it: guidance, a budget that is chosen, the pipeline."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from elit.cli.common import (
    Parser,
    budget,
    number,
    one_of,
    path_text,
    quiet_diffusers,
    tell_of_hub,
    whole_number,
)
from elit.flow.words import GUIDANCES

if TYPE_CHECKING:
    from elit.flow.guidance import Guidance
    from elit.pipelines.base import ElasticPipeline

DEFAULT_SCALE, DEFAULT_STEPS = 2.0, 40
AUTO = "auto"


def add_run(parser: Parser) -> None:
    """RUN, and which of its weights."""
    parser.add_argument(
        "run", type=path_text, metavar="RUN", help="a pipeline's folder, or its name on the hub"
    )
    parser.add_argument(
        "--variant", metavar="NAME", help="of the files of weights, such as fp16 (default: none)"
    )


def add_what(parser: Parser) -> None:
    """Labels or texts."""
    add = parser.add_argument
    add("--labels", type=whole_number(0), nargs="+", metavar="L",
        help="classes (default: all, up to 10)")  # fmt: skip
    add("--prompts", nargs="+", metavar="TEXT", help="texts, of a model that draws texts")


def add_guidance(parser: Parser) -> None:
    """Flags of `make_guidance`, but for --interval."""
    add = parser.add_argument
    add("--guidance", type=one_of(GUIDANCES, "guidance"), default="none", metavar="NAME",
        help=f"{', '.join(GUIDANCES)} (default: none)")  # fmt: skip
    add("--scale", type=number, metavar="S", help=f"of guidance (default: {DEFAULT_SCALE:g})")
    add("--guide-budget", type=budget, metavar="B",
        help="the guide's budget, for ag and ccfg (default: the lowest trained)")  # fmt: skip


def check_run(name: str) -> None:
    """Raise a ValueError, before the imports, unless it is a pipeline's folder or may be a name."""
    from elit.pipelines.folder import check_pipeline_folder

    if check_pipeline_folder(name) is None:
        tell_of_hub(name)


def make_guidance(args: argparse.Namespace) -> "Guidance | None":
    """Guidance of the flags; a flag without effect is an error."""
    if args.guidance == "none":
        for flag in ("scale", "guide_budget", "interval"):
            if getattr(args, flag) is not None:
                name = flag.replace("_", "-")
                raise ValueError(f"--{name} has no effect without guidance; add --guidance ccfg")
        return None
    if args.guidance == "cfg" and args.guide_budget is not None:
        raise ValueError(
            "--guide-budget has no effect with --guidance cfg, whose guide has the same budget as "
            "the sample; use --guidance ccfg"
        )
    from elit.flow.guidance import make_guidance as guidance_of

    scale = DEFAULT_SCALE if args.scale is None else args.scale
    if scale == 1:
        raise ValueError(
            f"--guidance {args.guidance} has no effect at --scale 1; choose another scale, such as "
            f"{DEFAULT_SCALE:g}, or leave --guidance out"
        )
    interval = (0.0, 1.0) if args.interval is None else tuple(args.interval)
    return guidance_of(args.guidance, scale, args.guide_budget or "lowest", interval)


def budget_or_auto(text: str) -> float | str:
    """A budget, or the word that has it chosen."""
    return AUTO if text == AUTO else budget(text)


def check_auto(args: argparse.Namespace) -> None:
    """Caps are of --budget auto, which stands alone and chooses the guidance too."""
    given = {"--max-gflops": args.max_gflops, "--max-ms": args.max_ms}
    caps = [flag for flag, value in given.items() if value is not None]
    for flag in caps:
        if not 0 < given[flag] <= 1e18:
            raise ValueError(f"{flag} {given[flag]:g} is not allowed; give a positive number")
    if AUTO not in args.budget:
        caps += ["--sweep"] if args.sweep is not None else []
        if caps:
            raise ValueError(f"{caps[0]} has no effect without --budget auto; add it")
        return
    if len(args.budget) > 1:
        raise ValueError("--budget auto stands alone; leave the other budgets out")
    if not caps:
        raise ValueError("--budget auto needs a cap; add --max-gflops or --max-ms")
    if args.guidance != "none":
        raise ValueError("--budget auto chooses the guidance too; leave --guidance out")


def choose_point(
    args: argparse.Namespace, pipeline: "ElasticPipeline", what: Sequence[Any]
) -> "Guidance | None":
    """Set budget, steps and guidance of the flags to what a sweep found best within the caps."""
    from elit.choosing.choose import choose

    height, width = args.size or (None, None)
    flops = None if args.max_gflops is None else args.max_gflops * 1e9
    point = choose(
        pipeline, flops, args.max_ms, args.steps, what[: args.batch_size], height, width,
        args.frames, args.sweep,
    )  # fmt: skip
    interval = None if point.interval is None else list(point.interval)
    vars(args).update(point.to_dict(), budget=[point.budget], interval=interval)
    return point.make_guidance()


def check_draws_images(run: str, pipeline: "ElasticPipeline") -> None:
    """Raise a ValueError for a pipeline of VAE latents that has no autoencoder."""
    from elit.pipelines.folder import draws_images

    channels = pipeline.transformer.in_channels
    if pipeline.vae is not None or draws_images(channels):
        return
    kind = type(pipeline).__name__
    raise ValueError(
        f"{run} holds no autoencoder: what it draws are VAE latents of {channels} channels, no "
        f"images; put in the one that it was trained with, of a public checkpoint by `elit convert "
        f"official FILE NEW --vae stabilityai/sd-vae-ft-mse`, of any folder from Python by "
        f"{kind}.from_pretrained({run!r}, vae=AutoencoderKL.from_pretrained(...))"
        f".save_pretrained('NEW')"
    )


def open_pipeline(args: argparse.Namespace, local_rank: int = 0) -> "ElasticPipeline":
    """The pipeline on its device, of a machine's several processes each on its own."""
    import torch

    from elit._devices import pick_device
    from elit.flow.schedulers import make_scheduler
    from elit.pipelines.load import load_pipeline

    device = pick_device(args.device, local_rank, share=True)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    with quiet_diffusers():
        pipeline = load_pipeline(args.run, dtype=dtype, variant=args.variant)
        pipeline.to(device)
    if args.sampler is not None:
        pipeline.scheduler = make_scheduler(args.sampler)
    return pipeline
