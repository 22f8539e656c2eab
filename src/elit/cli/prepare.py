"""`elit prepare`: your own images, clips and texts, encoded once for training."""

import argparse
from dataclasses import fields
from typing import Any

from elit._files import output_folder, typed_path
from elit.cli.common import print_report, quiet_diffusers
from elit.cli.flags import OneOf, Parser, WholeNumber, number
from elit.preparation.settings import DEFAULT_VAE, DTYPES, PrepareSettings

USAGE = "elit prepare SOURCE OUT [flags]"
EPILOG = """\
SOURCE: a folder of pictures, with a subfolder for each class, with a .txt or .caption beside each
picture, or with metadata.csv or metadata.jsonl; a folder of parquet or tar files, one such file, or
a pattern in quotes; a folder of MNIST's idx files; a name on the hub. --dry-run says what it was
taken for.
The same command again goes on with what was stopped, also with another number of processes.
`elit prepare OUT --verify` compares a finished folder with its checksums; with SOURCE and OUT it
makes again what is damaged."""
_SHOWN = 5  # skipped rows


def add_arguments(parser: Parser) -> None:
    """Flags of `elit prepare`."""
    add, switch = parser.add, parser.switch
    add("SOURCE", "pictures or clips, and what they are", typed_path)
    add("OUT", "folder to write", typed_path, nargs="?")
    add("source-config", "config of a data set on the hub that has several")
    add("split", "splits of the source, by NAME, or OURS=NAME[FROM:TO], such as "
        "'validation=train[-5%%:]' (default: train, and validation or test if there is one)",
        dest="splits", nargs="+", default=())  # fmt: skip
    column = "column of the {}s (default: found by its type or name{})"
    add("image-column", column.format("image", ""))
    add("label-column", column.format("label", "; none leaves them out"))
    add("caption-column", column.format("caption", "; none leaves them out"))
    add("resolution", "sides in pixels, one or several", nargs="+", default=[256])
    switch("aspect-ratios",
           "make rectangles of about as many pixels that fit the pictures' shapes")  # fmt: skip
    add("multiple", "number that the sides of such rectangles are multiples of", WholeNumber(),
        default=64)  # fmt: skip
    switch("flips", "store each picture mirrored too")
    add("frames", "make clips of so many frames")
    add("fps", "frames a second of clips (default: as they are)", number, "F")
    add("clips-per-video", "clips of a video at most: as many as fit without overlap, evenly "
        "spread (default: 1, of its middle)", WholeNumber(), default=1)  # fmt: skip
    add("vae", "autoencoder of diffusers, hub or folder", typed_path, default=DEFAULT_VAE)
    switch("pixels", "store the pictures themselves, without a VAE")
    add("text-encoder", "encode captions too: by a CLIP, T5 or Qwen, or as a diffusers pipeline "
        "does; on the hub or a folder", typed_path)  # fmt: skip
    add("max-text-length", "tokens that texts are padded to (default: the encoder's)",
        WholeNumber())  # fmt: skip
    add("features", "vision model of transformers whose features are stored for training with "
        "alignment: hub or folder, such as facebook/dinov2-base", typed_path)  # fmt: skip
    add("dtype", kind=OneOf(DTYPES, "dtype"))
    add("store-dtype", "data type to store: {}", OneOf(DTYPES, "dtype"), default="fp16")
    add("batch-size", "pictures encoded at a time")
    add("part-size", "rows that are done or undone together (default: 4096, or fewer)",
        WholeNumber())  # fmt: skip
    add("workers", "processes that read pictures (default: one less than processors)",
        WholeNumber(0))  # fmt: skip
    add("device")
    switch("verify", "compare with the checksums; see below")
    switch("dry-run", "tell what would be prepared, and stop")


def run(args: argparse.Namespace) -> int:
    """Prepare, verify or only tell."""
    if args.out is None:
        if not args.verify:
            raise ValueError("OUT is missing: give the folder to write; see `elit prepare --help`")
        return _verify(args)
    if args.pixels and args.vae != DEFAULT_VAE:
        raise ValueError("--pixels takes no --vae; give one of the two")
    given = {field.name: getattr(args, field.name) for field in fields(PrepareSettings)}
    given |= {"out": str(output_folder(args.out, "OUT")), "vae": None if args.pixels else args.vae}
    settings = PrepareSettings(**given)
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
    unit = "videos" if args.frames else "images"
    return print_report(report, args.json, lambda report: _show(report, unit))


def _show(report: dict[str, Any], unit: str) -> None:
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

    source, sizes = open_source(settings), Sizes(settings)
    report = {
        "source": source.name,
        "rows": {name: len(rows) for name, rows in source.splits.items()},
        "columns": source.describe()["columns"],
        "classes": list(source.classes),
        "notes": list(source.notes),
        "sizes": [f"{h}x{w}" for h, w in sizes.all],
        "autoencoder": settings.vae,
        "text_encoder": settings.text_encoder,
        "features": settings.features,
    }
    return print_report(report, as_json, _show_source)


def _show_source(report: dict[str, Any]) -> None:
    columns, vae = report["columns"], report["autoencoder"]
    print(f"{report['source']}:", *report["notes"], sep="\n  ")
    print("columns: " + ", ".join(f"{what} {name or '-'}" for what, name in columns.items()))
    print(f"sizes: {', '.join(report['sizes'])}")
    print(f"encoded by {vae}" if vae else "stored as pixels")


def _verify(args: argparse.Namespace) -> int:
    from elit.preparation.records import verify

    damaged = verify(args.source)
    print_report({"out": args.source, "damaged": damaged}, args.json, _show_damaged)
    return 1 if damaged else 0


def _show_damaged(report: dict[str, Any]) -> None:
    for name, reason in report["damaged"].items():
        print(f"{name}: {reason}")
    if report["damaged"]:
        print("run its `elit prepare SOURCE OUT` again with --verify: it makes them anew")
    else:
        print(f"{report['out']} is whole")
