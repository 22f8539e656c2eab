"""`elit studio`: a page with a slider for the budget."""

import argparse
import os

from elit._extras import missing
from elit.cli.common import check_run
from elit.cli.flags import Parser, WholeNumber

REPORTS = False
USAGE = "elit studio RUN [flags]"
EPILOG = """\
Draws as the slider moves: the picture at the budget beside that of full budget, their difference,
where Read looks, and what both cost. RUN may also be a pipeline of diffusers' that was elasticized
and saved. Ctrl-C stops it."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit studio`."""
    parser.add("RUN")
    parser.add("steps", "steps that the page begins with (default: 40)")
    parser.add("host", "address to listen at; 0.0.0.0 is all", default="127.0.0.1", metavar="HOST")
    parser.add("port", "port to listen at", WholeNumber(1, 65535), default=7860)
    parser.add("device dtype")


def run(args: argparse.Namespace) -> int:
    """Serve the page."""
    check_run(args.run)
    try:
        from elit.studio.app import serve
    except ImportError as error:
        raise ValueError(missing(f"elit studio needs {error.name}", "studio")) from error
    check_port(args.host, args.port)
    from elit.cli.common import quiet_diffusers
    from elit.studio.drawing import open_drawer
    from elit.studio.studio import Studio

    with quiet_diffusers():
        drawer = open_drawer(args.run, args.device, args.dtype)
    studio = Studio(drawer, args.steps)
    studio.warm_up()
    print(f"elit studio: {args.run} at http://{args.host}:{args.port} (Ctrl-C stops)", flush=True)
    serve(studio, args.host, args.port)
    return 0


def check_port(host: str, port: int) -> None:
    """Raise a ValueError if nothing can listen there."""
    import socket

    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ValueError(
            f"cannot listen at {host}:{port} ({reason}); give another --port"
        ) from error
