"""`elit studio`: a page with a slider for the budget."""

import argparse

from elit._extras import missing
from elit.cli.common import check_address, check_run, url_of
from elit.cli.flags import OWN_STEPS, Parser, WholeNumber
from elit.cli.waiting import stage
from elit.flow.words import DEFAULT_STEPS

REPORTS = False
USAGE = "elit studio RUN [flags]"
EPILOG = """\
Draws as the slider moves: the picture at the budget beside that of full budget, their difference,
where Read looks, and what both cost. RUN may also be a pipeline of diffusers' that was elasticized
and saved. Ctrl-C stops it."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit studio`."""
    parser.add("RUN")
    parser.add("steps", f"steps that the page begins with {OWN_STEPS.format(DEFAULT_STEPS)}")
    parser.add("host", "address to listen at; 0.0.0.0 is all", default="127.0.0.1", metavar="HOST")
    parser.add("port", "port to listen at", WholeNumber(1, 65535), default=7860)
    parser.add("device dtype")


def run(args: argparse.Namespace) -> int:
    """Serve the page."""
    check_run(args.run)
    try:
        from elit.studio.app import serve
    except ModuleNotFoundError as error:
        raise ValueError(missing(f"elit studio needs {error.name}", "studio")) from error
    check_address(args.host, args.port)
    from elit.cli.common import quiet_diffusers
    from elit.studio.drawing import open_drawer
    from elit.studio.studio import Studio

    with quiet_diffusers(), stage(f"loading {args.run}"):
        drawer = open_drawer(args.run, args.device, args.dtype)
    studio = Studio(drawer, args.steps)
    studio.warm_up()
    print(f"elit studio: {args.run} at {url_of(args.host, args.port)} (Ctrl-C stops)", flush=True)
    serve(studio, args.host, args.port)
    return 0
