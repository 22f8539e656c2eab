"""`elit serve`: pictures over HTTP; a latency is held by lowering budgets."""

import argparse
from typing import TYPE_CHECKING

from elit._extras import missing
from elit._tables import counted
from elit.cli.common import check_address, check_run, make_guidance, url_of
from elit.cli.flags import OneOf, Parser, WholeNumber, number
from elit.flow.words import DEFAULT_SCALE
from elit.interface.budget import read_budget

if TYPE_CHECKING:
    from elit.serving.facts import Facts
    from elit.serving.settings import Settings

HOSTS = ("127.0.0.1", "0.0.0.0", "::")
REPORTS = False
EPILOG = """\
POST /v1/images/generations takes the fields of OpenAI's API, and budget, steps, guidance, seed,
max_ms or max_gflops. With --p95-ms budgets are lowered while many wait, along the Pareto front of
RUN/swept/sweep.json where there is one; what would be late at the lowest is refused with 429.
SIGTERM or Ctrl-C finishes what was accepted."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit serve`."""
    add = parser.add
    add("RUN variant")
    add("host", "address to listen at: 127.0.0.1, this machine alone, or 0.0.0.0 or ::, all of the "
        "network", OneOf(HOSTS, "host"), default=HOSTS[0])  # fmt: skip
    add("port", "port to listen at", WholeNumber(1024, 65535), default=8000)
    add("p95-ms", "milliseconds in which 95 of 100 requests are to be answered, held by lowering "
        "budgets (default: no target, budgets stay)", number, "MS")  # fmt: skip
    add("min-budget", "lowest budget, of requests and under load (default: the lowest trained)",
        read_budget, "B")  # fmt: skip
    add("batch-size")
    add("queue", "pictures that may wait; more are refused with 429", WholeNumber(), default=1024)
    best = "where a request doesn't say (default: the sweep's best, or"
    add("steps", f"steps of the sampler {best} as `elit sample`)")
    add("guidance", f"kind of guidance {best} none): {{}}", default=None)
    add("scale", f"scale of the guidance {best} {DEFAULT_SCALE:g})")
    add("guide-budget sampler device dtype")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    check_run(args.run)
    if args.p95_ms is not None and args.p95_ms <= 0:
        raise ValueError(f"--p95-ms {args.p95_ms:g} is not allowed; give a positive number")
    own = {name: getattr(args, name) for name in ("scale", "guide_budget")}
    make_guidance(argparse.Namespace(guidance=args.guidance or "none", interval=None, **own))
    check_address(args.host, args.port)
    try:
        from elit.serving.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("elit"):
            raise
        raise ValueError(missing(f"elit serve needs {error.name}", "serve")) from error
    from elit.serving.settings import Settings

    settings = Settings(
        args.run, args.host, args.port, args.p95_ms, args.min_budget, args.batch_size, args.queue,
        args.steps, args.guidance, args.scale, args.guide_budget, args.sampler, args.device,
        args.dtype, args.variant,
    )  # fmt: skip
    serve(settings, lambda facts: _announce(settings, facts))
    return 0


def _announce(settings: "Settings", facts: "Facts") -> None:
    """Where it is, what it will do, and a line to try it."""
    from elit.interface.budget import format_budget
    from elit.serving.control import Prices

    address = url_of(settings.host, settings.port)
    size = "x".join(map(str, facts.size))
    draws = "texts" if facts.num_classes is None else f"classes 0 to {facts.num_classes - 1}"
    print(f"{address} serves {facts.name}: {draws}, {size} pixels, on {facts.device}")
    way = facts.way
    guide = way.guidance if way.scale is None else f"{way.guidance} {way.scale:g}"
    print(f"a request that doesn't say: budget {format_budget(facts.budget(facts.latents))}, "
          f"{counted(way.steps, 'step')}, guidance {guide} ({facts.front})")  # fmt: skip
    budgets = " ".join(format_budget(facts.budget(n)) for n in facts.ladder)
    if settings.p95_ms is None:
        print("no target: each request runs at its own budget; --p95-ms MS holds a latency")
    else:
        print(f"p95 of {settings.p95_ms:g} ms, by budgets {budgets}")
        prices = Prices(facts.calls, facts.fixed, facts.batch_size, facts.calls_per_step)
        ms = 1000 * prices.of_batch(way, [way.least(facts.ladder[-1])])
        if ms > settings.p95_ms:
            print(f"a picture alone, at the lowest budget, takes {ms:.0f} ms here: raise --p95-ms, "
                  f"or lower --steps")  # fmt: skip
    what = '"prompt": "a red disc"' if facts.num_classes is None else '"class_label": 1'
    print(f"curl -s {address}/v1/images/generations -d '{{{what}, \"seed\": 0}}'", flush=True)
