"""A public checkpoint as a pipeline's folder, with a model card."""

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from safetensors import SafetensorError

from elit._choices import check_choice
from elit._files import as_os_error, json_text, open_to_others, sha256_of, typed_path, write_folder
from elit.flow.schedulers import FlowMatchUniformEulerScheduler
from elit.interop import FORMATS
from elit.interop.cards import model_card
from elit.interop.checkpoint import Checkpoint, ConversionSettings
from elit.interop.dit import read_dit
from elit.interop.official import read_official
from elit.models.sit import SiT
from elit.pipelines.elit_pipeline import ElitPipeline
from elit.preparation.autoencoder import load_vae

logger = logging.getLogger(__name__)

CONVERSION_FILE = "conversion.json"
VAE_SCALE = 0.18215  # of the VAE latents that the public models were trained on


def convert_official(
    file: str | os.PathLike, out: str | os.PathLike, settings: ConversionSettings | None = None
) -> dict[str, Any]:
    """Convert a public checkpoint, and give what is known of it as plain types.

    SiT and ELIT-SiT become an `ElitPipeline`, DiT a `DiTPipeline` of diffusers'. The folder is
    written aside and then renamed. One that holds this very conversion, whole, is left as it is;
    any other that is not empty is an error.
    """
    settings = ConversionSettings() if settings is None else settings
    check_choice(settings.format, FORMATS, "format")
    file, out = Path(typed_path(file)), Path(typed_path(out)).resolve()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a new folder to write")
    if out.is_dir() and any(out.iterdir()):
        return _same_conversion(out, file, settings)
    vae = None if settings.vae is None else load_vae(typed_path(settings.vae))[0]
    if file.is_file():
        logger.info("reading %s, %.2f GB", file, file.stat().st_size / 1e9)
    model: SiT | DiTTransformer2DModel
    read = read_official if settings.format == "official" else read_dit
    model, checkpoint = read(file, settings)
    if vae is not None:
        _check_vae(vae, settings.vae, model.config.in_channels)
    source = {"file": file.name, "sha256": sha256_of(file)} | vars(settings)
    report = {"source": source} | _about(model, checkpoint)

    if isinstance(model, DiTTransformer2DModel):
        steps = DDIMScheduler(beta_schedule="linear", clip_sample=False)  # of its training
        pipeline: DiffusionPipeline = DiTPipeline(model, vae, steps)
    else:
        pipeline = ElitPipeline(model, FlowMatchUniformEulerScheduler(), vae)

    def write(aside: Path) -> None:
        try:
            pipeline.save_pretrained(aside)
        except SafetensorError as error:
            raise as_os_error(error, out) from error
        for weights in aside.rglob("*.safetensors"):
            open_to_others(weights)
        (aside / "README.md").write_text(model_card(report), encoding="utf-8")
        sizes = {str(p.relative_to(aside)): p.stat().st_size for p in _files_in(aside)}
        text = json_text(report | {"sizes": sizes})
        (aside / CONVERSION_FILE).write_text(text, encoding="utf-8")

    try:
        write_folder(out, write)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return _same_conversion(out, file, settings)  # another process was faster
    return {"out": str(out)} | report


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _same_conversion(out: Path, file: Path, settings: ConversionSettings) -> dict[str, Any]:
    """The report of a conversion that is there already, or the error for any other folder."""
    try:
        report = json.loads((out / CONVERSION_FILE).read_text(encoding="utf-8"))
        source, sizes = dict(report["source"]), dict(report.pop("sizes"))
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{out} is not empty and holds no conversion; give a new folder to write"
        ) from None
    digest = source.pop("sha256", None)
    same = source == {"file": file.name} | vars(settings)
    if not same or (file.is_file() and sha256_of(file) != digest):
        raise ValueError(
            f"{out} holds another conversion, of {source.get('file')} or with other settings; give "
            f"a new folder to write"
        )
    there = {str(path.relative_to(out)): path.stat().st_size for path in _files_in(out)}
    broken = [
        name for name, size in sizes.items() if there.get(name) != size and not name.endswith(".md")
    ]  # a card may be edited
    if broken:
        raise ValueError(
            f"{out} holds this conversion, but {broken[0]} is missing or was changed; remove the "
            f"folder, then run the same command again"
        )
    logger.info("%s holds this conversion already", out)
    return {"out": str(out)} | report


def _check_vae(vae: Any, name: str | None, in_channels: int) -> None:
    channels = vae.config.get("latent_channels")
    if channels != in_channels:
        raise ValueError(
            f"the autoencoder {name} makes VAE latents of {channels} channels, but the model takes "
            f"{in_channels}; give the one that it was trained with"
        )
    scale = vae.config.get("scaling_factor")
    if scale is None or abs(scale - VAE_SCALE) > 1e-6:
        logger.warning(
            "the autoencoder %s scales by %s, but the public models were trained on VAE latents "
            "scaled by %s", name, scale, VAE_SCALE,
        )  # fmt: skip


def _about(model: SiT | DiTTransformer2DModel, checkpoint: Checkpoint) -> dict[str, Any]:
    """Content of the folder, as plain types."""
    is_dit = isinstance(model, DiTTransformer2DModel)
    elastic = not is_dit and model.is_elastic
    return {
        "kind": "DiT" if is_dit else "ELIT-SiT" if elastic else "SiT",
        "weights": checkpoint.weights,
        "stored": checkpoint.stored,
        "steps": checkpoint.steps,
        "elastic": elastic,
        "num_classes": model.config.num_embeds_ada_norm if is_dit else model.config.num_classes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "left_out": checkpoint.left_out,
        "config": {k: v for k, v in model.config.items() if not k.startswith("_")},
    }
