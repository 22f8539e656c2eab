"""`elit`: finds the command, and turns a user's mistake into one line."""

import atexit
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from elit import __version__
from elit._choices import nearest
from elit.cli.common import logging_to_stderr, one_line
from elit.cli.flags import Parser
from elit.cli.waiting import stage, telling_what_takes_long

# Each is a module of this package with `add_arguments(parser)`, `run(args) -> int`, and perhaps a
# USAGE, an EPILOG, and REPORTS = False, where there is nothing for --json. It is imported when it
# is called for: the help stays quick.
COMMANDS = {
    "quickstart": "train on handwritten digits, draw them at five budgets, print what each cost",
    "prepare": "encode your own images, clips and captions, once, for training",
    "train": "train a model, or go on with a run that was stopped",
    "plan": "count what a run will take: operations, hours, memory",
    "finetune": "make a pretrained model elastic, and train it at all budgets",
    "sample": "draw images of given classes at one or more budgets",
    "serve": "answer requests for pictures over HTTP; hold a latency by lowering budgets",
    "eval": "score samples against real images: FID, FDD, IS, precision, recall, KID",
    "sweep": "quality against cost over budgets, steps and guides, as a table and a page",
    "compare": "put two sweeps side by side, such as a plain and an elastic model",
    "schedule": "measure what fewer latents cost at each noise level, and plan budgets over steps",
    "calibrate": "fit TeaCache, which skips steps at which little changes, to a pipeline",
    "inspect": "show where Read looks, where the loss is, and what each latent contributes",
    "export": "a model as one ONNX, AOTInductor or torch.export file for all budgets",
    "convert": "bring a public checkpoint of others into a folder with a card of its licence",
    "reproduce": "the paper's claims at your scale: trained, measured and judged",
    "studio": "a page with a slider for the budget: draws as it moves, and says what it costs",
    "flops": "count the operations of a preset or a checkpoint at each budget",
    "info": "show the presets, one preset or checkpoint, and what is installed",
}
DESCRIPTION = "Elastic diffusion transformers: one checkpoint, any compute budget."
EXAMPLES = """\
examples:
  elit quickstart
  elit train digits --train.steps 4000
  elit sample runs/digits --labels 3 7 --budget 1 0.25
  elit flops elit-dit-xl/2 --resolution 512

`elit COMMAND --help` has the flags of a command. --debug (or ELIT_DEBUG=1) shows where an error
comes from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return 0, or 1 (the run failed), 2 (a mistake) or 130 (stopped)."""
    # Before torch is imported: spinning threads cost a factor of ten on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Before the hub's client is: without a line for each time that it tries again.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Or the process looks for garbage in all that was imported, for seconds, before it ends.
    atexit.register(gc.freeze)
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or os.environ.get("ELIT_DEBUG", "0") not in ("", "0")
    argv = [word for word in argv if word != "--debug"]
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds: a log file is not a screen
    try:
        with logging_to_stderr(), telling_what_takes_long():
            return _run(argv)
    except SystemExit as done:  # argparse, after --help and --version
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt:
        print("elit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `elit info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"elit: error: {one_line(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        too_large = "Storage size calculation overflowed" in str(error)
        if too_large and not debug:
            print("elit: error: a size is too large; choose a smaller one", file=sys.stderr)
            return 2
        out_of_memory = "out of memory" in str(error) or "can't allocate memory" in str(error)
        if debug or not (out_of_memory or _is_of_training(error)):
            raise
        if out_of_memory:
            error = RuntimeError("out of memory; choose a smaller size, batch or model")
        print(f"elit: error: {one_line(error)}", file=sys.stderr)
        return 1


def _is_of_training(error: RuntimeError) -> bool:
    """Whether the loss was not finite, or another process ended; without importing training."""
    loop = sys.modules.get("elit.training.loop")
    known = (loop.TrainingDivergedError, loop.ProcessLostError) if loop is not None else ()
    return isinstance(error, known)


def _run(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        top_parser().parse_args(argv)
        top_parser().print_help()
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        hint = f"did you mean {near}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {name}: {hint}")
    args = command_parser(name).parse_args(rest)
    with stage(f"at work: {COMMANDS[name]}"):
        return command(name).run(args)


def command(name: str) -> Any:
    """The module of a command."""
    return importlib.import_module(f"{__package__}.{name}")


def command_parser(name: str) -> Parser:
    """The parser of a command's flags."""
    module = command(name)
    parser = Parser(
        prog=f"elit {name}",
        description=COMMANDS[name],
        usage=getattr(module, "USAGE", None),
        epilog=getattr(module, "EPILOG", None),
    )
    module.add_arguments(parser)
    if getattr(module, "REPORTS", True):
        parser.switch("json", "print one JSON object instead")
    return parser


def top_parser() -> Parser:
    """The parser of a line without a command."""
    width = max(map(len, COMMANDS)) + 2
    listed = "\n".join(f"  {name:{width}}{about}" for name, about in COMMANDS.items())
    parser = Parser(
        prog="elit",
        usage="elit COMMAND ...",
        description=f"{DESCRIPTION}\n\ncommands:\n{listed}",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"elit {__version__}")
    return parser
