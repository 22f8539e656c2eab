"""`elit convert`: checkpoints of others as folders that every command here takes."""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from elit.cli.common import (
    Parser,
    add_json_flag,
    format_count,
    one_of,
    output_folder,
    path_text,
    print_json,
    quiet_diffusers,
    tell_of_hub,
    whole_number,
)

# As the library has them, without its imports; a test compares them.
FORMATS = ("official", "dit")
WEIGHTS = ("ema", "model")

_EPILOG = """\
official: the public SiT and ELIT-SiT checkpoints; the folder is an ElitPipeline, which the other
commands take. dit: Facebook's DiT; the folder is a DiTPipeline of diffusers'. The .pt files are
read without running code of theirs. The weights stay under their own licence, which the folder's
README.md names."""


def add_arguments(parser: Parser) -> None:
    """Flags of `elit convert`."""
    parser.usage = "elit convert FORMAT FILE.pt OUT [flags]"
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("format", type=one_of(FORMATS, "format"), metavar="FORMAT", help=", ".join(FORMATS))
    add("file", type=path_text, metavar="FILE", help="the checkpoint")
    add("out", type=path_text, metavar="OUT", help="the folder to write, new or empty")
    add("--weights", type=one_of(WEIGHTS, "weights"), default="ema", metavar="NAME",
        help="ema, the average over training, or model (default: ema)")  # fmt: skip
    add("--encoder-depth", type=whole_number(0), default=8, metavar="N",
        help="blocks before the Read (default: 8, as in all public ones)")  # fmt: skip
    add("--decoder-depth", type=whole_number(0), metavar="N",
        help="blocks after the Write (default: 4 of L and XL, 2 of S and B)")  # fmt: skip
    add("--num-heads", type=whole_number(1), metavar="N",
        help="attention heads (default: those of the public model of this width)")  # fmt: skip
    add("--vae", type=path_text, metavar="NAME",
        help="autoencoder to put in, of the hub or a folder (default: none)")  # fmt: skip
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Convert and tell."""
    check_paths(args)  # before the imports: a mistake is told at once
    from elit.interop.convert import ConversionSettings, convert_official

    settings = ConversionSettings(
        format=args.format,
        weights=args.weights,
        encoder_depth=args.encoder_depth,
        num_heads=args.num_heads,
        decoder_depth=args.decoder_depth,
        vae=args.vae,
    )
    with quiet_diffusers():
        try:
            report = convert_official(args.file, args.out, settings)
        except ValueError as error:  # whose names are Python's, not those of flags
            raise ValueError(_with_flags(str(error))) from error
    if args.json:
        print_json(report)
    else:
        _print_report(report)
    return 0


def check_paths(args: argparse.Namespace) -> None:
    """Raise a ValueError for paths that cannot do, as far as it costs no import."""
    out, file = Path(args.out), Path(args.file)
    output_folder(out, "OUT")
    if args.vae == "":
        raise ValueError("--vae is empty; give a folder or a name of the hub, or leave it out")
    if out.is_dir() and any(out.iterdir()):
        return  # perhaps this conversion, which needs its file no more
    if file.is_dir():
        raise ValueError(f"{file} is a folder; give a checkpoint's file, such as model.pt")
    if not file.is_file():
        raise ValueError(f"there is no file {file}; give a checkpoint's file, such as model.pt")
    if args.vae is not None and not Path(args.vae).is_dir():
        tell_of_hub(args.vae)


def _with_flags(message: str) -> str:
    """A message that names flags instead of Python's arguments."""
    names = r"\b(encoder_depth|decoder_depth|num_heads)\b(=?)"

    def flag(found: re.Match[str]) -> str:
        return f"--{found[1].replace('_', '-')}{' ' if found[2] else ''}"

    return re.sub(names, flag, message)


def _print_report(report: dict[str, Any]) -> None:
    from elit.pipelines.folder import draws_images

    config, source = report["config"], report["source"]
    weights = report["weights"] or "the only weights"
    steps = "" if report["steps"] is None else f", {report['steps']} steps"
    print(f"{report['kind']} of {format_count(report['parameters'])} parameters, {weights}{steps}")
    if report["kind"] == "DiT":
        heads, depth = config["num_attention_heads"], config["num_layers"]
        width = heads * config["attention_head_dim"]
    else:
        heads, depth, width = config["num_heads"], config["depth"], config["hidden_size"]
    print(f"width {width}, {heads} heads, {depth} blocks")
    if report["elastic"]:
        core = config["depth"] - config["head"] - config["tail"]
        print(f"head {config['head']}, core {core}, tail {config['tail']}, group {config['group']}")
    print(f"\n{report['out']}: its README.md has the licence of the weights, read it\n")
    if source["vae"] is None and not draws_images(config["in_channels"]):
        draws = "nothing" if report["kind"] == "DiT" else "VAE latents, from Python alone"
        print(f"it holds no autoencoder, so it draws {draws}; for images,")
        print("convert it into a new folder with --vae stabilityai/sd-vae-ft-mse")
        return
    if report["kind"] == "DiT":
        print("it is a DiTPipeline of diffusers', for Python; its README.md has the lines")
        return
    labels = " ".join(str(n) for n in (207, 360) if n < report["num_classes"]) or "0"
    flags = " --budget 1 1/4 --guidance ccfg" if report["elastic"] else " --guidance cfg"
    command = f"elit sample {shlex.quote(report['out'])} --labels {labels} --steps 50{flags}"
    print(f"sample:  {command} --scale 1.5")
