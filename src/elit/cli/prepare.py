"""`elit prepare`: your own images, clips and texts, encoded once for training."""

import argparse
from typing import Any

from elit.cli.common import (
    Parser,
    add_json_flag,
    number,
    one_of,
    output_folder,
    path_text,
    print_json,
    quiet_diffusers,
    whole_number,
)
from elit.preparation.settings import DEFAULT_VAE, DTYPES, PrepareSettings

_EPILOG = """\
SOURCE: a folder of pictures, with a subfolder for each class, with a .txt beside each picture, or
with metadata.csv or metadata.jsonl; a folder of parquet or tar files, one such file, or a pattern
in quotes; a folder of MNIST's idx files; a name on the hub. --dry-run says what it was taken for.
The same command again goes on with what was stopped, also with another number of processes.
`elit prepare OUT --verify` compares a finished folder with its checksums; with SOURCE and OUT it
makes again what is damaged."""
_SHOWN = 5  # skipped rows


def add_arguments(parser: Parser) -> None:
    """Flags of `elit prepare`."""
    parser.usage = "elit prepare SOURCE OUT [flags]"
    parser.epilog = _EPILOG
    parser.add_argument(
        "source", type=path_text, metavar="SOURCE", help="pictures or clips, and what they are"
    )
    parser.add_argument("out", type=path_text, metavar="OUT", nargs="?", help="the folder to write")
    add = parser.add_argument
    add("--source-config", metavar="NAME", help="of a data set on the hub that has several")
    add("--split", nargs="+", default=(), metavar="NAME",
        help="of the source, or OURS=NAME[FROM:TO], such as 'validation=train[-5%%:]' "
        "(default: train, and validation or test if there is one)")  # fmt: skip
    add("--image-column", metavar="NAME", help="default: found by its type or name")
    add("--label-column", metavar="NAME", help="likewise; none leaves labels out")
    add("--caption-column", metavar="NAME", help="likewise")
    add("--resolution", type=whole_number(1), nargs="+", default=[256], metavar="N",
        help="side in pixels, one or several (default: 256)")  # fmt: skip
    add("--aspect-ratios", action="store_true",
        help="rectangles of about as many pixels that fit the pictures' shapes")  # fmt: skip
    add("--multiple", type=whole_number(1), default=64, metavar="N",
        help="that the sides of such rectangles are multiples of (default: 64)")  # fmt: skip
    add("--flips", action="store_true", help="store each picture mirrored too")
    add("--frames", type=whole_number(1), metavar="N", help="make clips of so many frames")
    add("--fps", type=number, metavar="F",
        help="frames a second of clips (default: as they are)")  # fmt: skip
    add("--clips-per-video", type=whole_number(1), default=1, metavar="N",
        help="at most: as many as fit without overlap, evenly spread "
        "(default: 1, of its middle)")  # fmt: skip
    add("--vae", type=path_text, default=DEFAULT_VAE, metavar="NAME",
        help=f"autoencoder of diffusers, hub or folder (default: {DEFAULT_VAE})")  # fmt: skip
    add("--pixels", action="store_true", help="store the pictures themselves, without a VAE")
    add("--text-encoder", type=path_text, metavar="NAME",
        help="encode captions too: by a CLIP, T5 or Qwen, or as a diffusers pipeline does; on the "
        "hub or a folder")  # fmt: skip
    add("--max-text-length", type=whole_number(1), metavar="N",
        help="tokens that texts are padded to (default: the encoder's)")  # fmt: skip
    add("--dtype", type=one_of(tuple(DTYPES), "dtype"), default="fp32", metavar="NAME",
        help=f"to compute in: {', '.join(DTYPES)} (default: fp32)")  # fmt: skip
    add("--store-dtype", type=one_of(tuple(DTYPES), "dtype"), default="fp16", metavar="NAME",
        help="to store (default: fp16)")  # fmt: skip
    add("--batch-size", type=whole_number(1), default=32, metavar="N",
        help="encoded at a time (default: 32)")  # fmt: skip
    add("--part-size", type=whole_number(1), metavar="N",
        help="rows that are done or undone together (default: 4096, or fewer)")  # fmt: skip
    add("--workers", type=whole_number(0), metavar="N",
        help="processes that read pictures (default: one less than processors)")  # fmt: skip
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (default: auto)")
    add("--verify", action="store_true", help="compare with the checksums; see below")
    add("--dry-run", action="store_true", help="tell what would be prepared, and stop")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Prepare, verify or only tell."""
    if args.out is None:
        if not args.verify:
            raise ValueError("OUT is missing: give the folder to write; see `elit prepare --help`")
        return _verify(args)
    if args.pixels and args.vae != DEFAULT_VAE:
        raise ValueError("--pixels takes no --vae; give one of the two")
    settings = PrepareSettings(
        source=args.source,
        out=str(output_folder(args.out, "OUT")),
        source_config=args.source_config,
        splits=args.split,
        vae=None if args.pixels else args.vae,
        **{
            name: getattr(args, name)
            for name in (
                "resolution", "aspect_ratios", "multiple", "flips", "frames", "fps",
                "clips_per_video",
                "image_column", "label_column", "caption_column", "text_encoder",
                "max_text_length", "part_size", "batch_size", "dtype", "store_dtype", "device",
                "workers", "verify",
            )
        },
    )  # fmt: skip
    settings.check()
    if args.dry_run:
        return _tell(settings, args.json)
    from elit.preparation.run import prepare

    with quiet_diffusers():
        result = prepare(settings)
    report: dict[str, Any] = {
        "out": str(result.folder),
        "finished": result.finished,
        "missing_parts": result.missing,
        "samples": result.samples,
        "skipped": [list(what) for what in result.skipped],
        "captions_cut": result.cut,
        "bytes": result.bytes,
        "read": result.done,
        "seconds": round(result.seconds, 3),
        "per_second": round(result.done / result.seconds, 2) if result.done else None,
        "mean": result.mean,
        "std": result.std,
    }
    if args.json:
        print_json(report)
    else:
        _print(report, "videos" if args.frames else "images")
    return 0


def _print(report: dict[str, Any], unit: str) -> None:
    counts = ", ".join(f"{count} in {name}" for name, count in report["samples"].items())
    print(f"{report['out']}: {counts}; {report['bytes'] / 1e6:.1f} MB")
    if report["read"]:
        rate = f"{report['per_second']:.1f} {unit}/s"
        print(f"read {report['read']} {unit} in {report['seconds']:.1f} s, {rate}")
    if report["std"] is not None:
        print(f"latents, scaled: mean {report['mean']:.3f}, standard deviation {report['std']:.3f}")
    skipped = report["skipped"]
    if skipped:
        print(f"skipped {len(skipped)}; all are listed in the manifest:")
        for split, row, reason in skipped[:_SHOWN]:
            print(f"  {split} row {row}: {reason}")
        if len(skipped) > _SHOWN:
            print(f"  and {len(skipped) - _SHOWN} more")
    if not report["finished"]:
        print(
            f"{report['missing_parts']} parts are not done yet: they fall to other processes; the "
            f"last one to finish writes the manifest, and so does the same command once more"
        )


def _tell(settings: PrepareSettings, as_json: bool) -> int:
    """What the source holds and would become."""
    from elit.preparation.reading import Sizes
    from elit.preparation.source import open_source

    source, sizes = open_source(settings), Sizes.of(settings)
    columns = source.describe()["columns"]
    report = {
        "source": source.name,
        "rows": {name: len(rows) for name, rows in source.splits.items()},
        "columns": columns,
        "classes": list(source.classes),
        "notes": list(source.notes),
        "sizes": [f"{h}x{w}" for choice in sizes.choices for h, w in choice],
        "autoencoder": settings.vae,
        "text_encoder": settings.text_encoder,
    }
    if as_json:
        print_json(report)
        return 0
    print(f"{source.name}:", *source.notes, sep="\n  ")
    print("columns: " + ", ".join(f"{what} {name or '-'}" for what, name in columns.items()))
    print(f"sizes: {', '.join(report['sizes'])}")
    print(f"encoded by {settings.vae}" if settings.vae else "stored as pixels")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from elit.preparation.checks import verify

    damaged = verify(args.source)
    if args.json:
        print_json({"out": args.source, "damaged": damaged})
    elif damaged:
        for name, reason in damaged.items():
            print(f"{name}: {reason}")
        print("run its `elit prepare SOURCE OUT` again with --verify: it makes them anew")
    else:
        print(f"{args.source} is whole")
    return 1 if damaged else 0
