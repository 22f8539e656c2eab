"""`elit convert`: checkpoints of others as folders that every command here takes."""

import argparse
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from elit._files import output_folder, typed_path
from elit._tables import counted
from elit.cli.common import as_flags, format_count, print_report, quiet_diffusers, tell_of_hub
from elit.cli.flags import OneOf, Parser, WholeNumber
from elit.interop import FORMATS, WEIGHTS

USAGE = "elit convert FORMAT FILE.pt OUT [flags]"
EPILOG = """\
official: the public SiT and ELIT-SiT checkpoints; the folder is an ElitPipeline, which the other
commands take. dit: Facebook's DiT; the folder is a DiTPipeline of diffusers'. The .pt files are
read without running code of theirs. The weights stay under their own licence, which the folder's
README.md names."""
_NAMES = {name: name.replace("_", "-") for name in ("encoder_depth", "decoder_depth", "num_heads")}


def add_arguments(parser: Parser) -> None:
    """Flags of `elit convert`."""
    add = parser.add
    add("FORMAT", "format of the checkpoint: {}", OneOf(FORMATS, "format"))
    add("FILE", "checkpoint to read", typed_path)
    add("OUT", "folder to write, new or empty", typed_path)
    add("weights", "weights to take: ema, the average over training, or model",
        OneOf(WEIGHTS, "weights"), default="ema")  # fmt: skip
    add("encoder-depth", "blocks before the Read (default: 8, as in all public ones)",
        WholeNumber(0), default=8)  # fmt: skip
    add("decoder-depth", "blocks after the Write (default: 4 of L and XL, 2 of S and B)",
        WholeNumber(0))  # fmt: skip
    add("num-heads", "attention heads (default: those of the public model of this width)",
        WholeNumber())  # fmt: skip
    add("vae", "autoencoder to put in, of the hub or a folder (default: none)", typed_path)


@as_flags(_NAMES)
def run(args: argparse.Namespace) -> int:
    """Convert and tell."""
    check_paths(args)  # before the imports: a mistake is told at once
    from elit.interop.convert import ConversionSettings, convert_official

    given = {field.name: getattr(args, field.name) for field in fields(ConversionSettings)}
    settings = ConversionSettings(**given)
    with quiet_diffusers():
        report = convert_official(args.file, args.out, settings)
    return print_report(report, args.json, _show)


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


def _show(report: dict[str, Any]) -> None:
    from elit.pipelines.folder import draws_images

    config, source = report["config"], report["source"]
    weights = report["weights"] or "the only weights"
    steps = "" if report["steps"] is None else f", {counted(report['steps'], 'step')}"
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
