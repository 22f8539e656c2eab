"""How to draw, as flags say it: guidance, a budget that is chosen, the pipeline."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from elit.cli.common import quiet_diffusers, tell_of_hub
from elit.cli.flags import AUTO
from elit.flow.words import DEFAULT_SCALE

if TYPE_CHECKING:
    from elit.flow.guidance import Guidance
    from elit.pipelines.base import ElasticPipeline


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


def check_auto(args: argparse.Namespace) -> None:
    """Caps are of --budget auto, which stands alone and chooses the guidance too."""
    given = {"--max-gflops": args.max_gflops, "--max-ms": args.max_ms}
    caps = [flag for flag, value in given.items() if value is not None]
    for cap in caps:
        if not 0 < given[cap] <= 1e18:
            raise ValueError(f"{cap} {given[cap]:g} is not allowed; give a positive number")
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


def open_pipeline(args: argparse.Namespace, local_rank: int = 0) -> "ElasticPipeline":
    """The pipeline of the flags on its device, of several processes each on its own."""
    from elit.pipelines import load

    with quiet_diffusers():
        return load.open_pipeline(
            args.run, args.device, args.dtype, args.variant, args.sampler, local_rank
        )
