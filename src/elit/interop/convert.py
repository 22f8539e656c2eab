"""A public checkpoint as a folder that `ElitPipeline.from_pretrained` loads, with a model card."""

import errno
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from elit._files import as_os_error, json_text, open_to_others, sha256_of, write_folder
from elit.flow.schedulers import FlowMatchUniformEulerScheduler
from elit.interop.official import Official, read_official
from elit.pipelines.elit_pipeline import ElitPipeline
from elit.preparation.autoencoder import load_vae
from elit.preparation.settings import DEFAULT_VAE

logger = logging.getLogger(__name__)

CONVERSION_FILE = "conversion.json"
ELASTIC_ALONE = ("group", "head", "tail", "min_latents", "write_depth")
VAE_SCALE = 0.18215  # of the VAE latents that the public models were trained on


@dataclass(frozen=True)
class ConversionSettings:
    """How a public checkpoint becomes a folder.

    Attributes:
        weights: "ema" or "model".
        encoder_depth: blocks before the Read.
        num_heads: by default that of the public model of the same width.
        decoder_depth: blocks after the Write; by default the public models'.
        vae: autoencoder to put into the folder, a folder or a name on the hub; None leaves it out.
    """

    weights: str = "ema"
    encoder_depth: int = 8
    num_heads: int | None = None
    decoder_depth: int | None = None
    vae: str | None = None


def convert_official(
    file: str | os.PathLike,
    out: str | os.PathLike,
    settings: ConversionSettings | None = None,
) -> dict[str, Any]:
    """Convert a public SiT or ELIT-SiT checkpoint, and give what is known of it as plain types.

    The folder is written aside and then renamed. One that holds this very conversion, whole, is
    left as it is; any other that is not empty is an error.
    """
    settings = ConversionSettings() if settings is None else settings
    file, out = Path(file).expanduser(), Path(out).expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a new folder to write")
    if out.is_dir() and any(out.iterdir()):
        return _same_conversion(out, file, settings)
    vae = None if settings.vae is None else load_vae(settings.vae)[0]
    if file.is_file():
        logger.info("reading %s, %.2f GB", file, file.stat().st_size / 1e9)
    official = read_official(
        file,
        weights=settings.weights,
        encoder_depth=settings.encoder_depth,
        num_heads=settings.num_heads,
        decoder_depth=settings.decoder_depth,
    )
    if vae is not None:
        _check_vae(vae, settings.vae, official)
    source = {"file": file.name, "sha256": sha256_of(file)} | vars(settings)
    report = {"source": source} | _about(official)

    def write(aside: Path) -> None:
        pipeline = ElitPipeline(official.model, FlowMatchUniformEulerScheduler(), vae)
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
        found, sizes = dict(report["source"]), dict(report.pop("sizes"))
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{out} is not empty and holds no conversion; give a new folder to write"
        ) from None
    digest = found.pop("sha256", None)
    same = found == {"file": file.name} | vars(settings)
    if not same or (file.is_file() and sha256_of(file) != digest):
        raise ValueError(
            f"{out} holds another conversion, of {found.get('file')} or with other settings; give "
            f"a new folder to write"
        )
    broken = [name for name, size in sizes.items()
              if not (out / name).is_file() or (out / name).stat().st_size != size]  # fmt: skip
    broken = [name for name in broken if not name.endswith(".md")]  # a card may be edited
    if broken:
        raise ValueError(
            f"{out} holds this conversion, but {broken[0]} is missing or was changed; remove the "
            f"folder, then run the same command again"
        )
    logger.info("%s holds this conversion already", out)
    return {"out": str(out)} | report


def _check_vae(vae: Any, name: str | None, official: Official) -> None:
    channels = vae.config.get("latent_channels")
    if channels != official.model.in_channels:
        raise ValueError(
            f"the autoencoder {name} makes VAE latents of {channels} channels, but the model takes "
            f"{official.model.in_channels}; give the one that it was trained with"
        )
    scale = vae.config.get("scaling_factor")
    if scale is None or abs(scale - VAE_SCALE) > 1e-6:
        logger.warning(
            "the autoencoder %s scales by %s, but the public models were trained on VAE latents "
            "scaled by %s", name, scale, VAE_SCALE,
        )  # fmt: skip


def _about(official: Official) -> dict[str, Any]:
    """What the folder holds, as plain types."""
    model = official.model
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return {
        "weights": official.weights,
        "stored": official.stored,
        "steps": official.steps,
        "elastic": model.is_elastic,
        "parameters": sum(p.numel() for p in model.parameters()),
        "left_out": official.left_out,
        "config": config,
    }


def model_card(report: dict[str, Any]) -> str:
    """README.md of a converted folder: where the weights are from, their licence, how to draw."""
    source, config = report["source"], report["config"]
    file = "".join(c if c.isprintable() and c not in "`|" else "?" for c in source["file"])
    kind = "ELIT-SiT" if report["elastic"] else "SiT"
    settings = "\n".join(f"| {key} | {value} |" for key, value in config.items()
                         if report["elastic"] or key not in ELASTIC_ALONE)  # fmt: skip
    steps = "unknown" if report["steps"] is None else f"{report['steps']:,}"
    numbers = "without any change to the numbers"
    if report["stored"] != ["float32"]:
        numbers = f"with the numbers, stored as {' and '.join(report['stored'])}, as float32"
    left_out = ""
    if report["left_out"]:
        left_out = f" Left out: {len(report['left_out'])} tensors of REPA's projectors."
    return f"""\
---
license: other
license_name: snap-non-commercial
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [elit, sit, class-conditional]
---

# {kind} from {file}

Converted by `elit convert official` {numbers}.{left_out}
The page "Run the public checkpoints" of elit's docs says what a budget costs, and what differs from
the paper, *One Model, Many Budgets: Elastic Latent Interfaces for Diffusion Transformers*.

**Licence of the weights.** They stay under the licence of the file that they came from. The public
SiT and ELIT-SiT checkpoints of the paper's authors are under Snap Inc.'s non-commercial licence:
research and other non-commercial use alone, and whoever passes them on passes on that licence.
The code of elit is under Apache-2.0; that does not extend to these weights.

| source | |
|---|---|
| file | `{file}` |
| sha256 | `{source["sha256"]}` |
| weights | {report["weights"] or "the only ones of the file"} |
| training steps | {steps} |
| multi-budget | {_budgets_of(file, report["elastic"])} |
| parameters | {report["parameters"]:,} |
| autoencoder | {_autoencoder_of(report)} |

| setting | |
|---|---|
{settings}

```python
{_snippet(report)}
```
"""


def _budgets_of(file: str, elastic: bool) -> str:
    """Whether a file, by its name, was trained at more budgets than the full one."""
    if not elastic:
        return "no, a plain model"
    if "_mb_" in file:
        return "yes, by the file's name"
    public = file.startswith("elit_sit_imagenet")
    return "no, by the file's name: full budget alone" if public else "unknown"


def _autoencoder_of(report: dict[str, Any]) -> str:
    if report["source"]["vae"]:
        return f"{report['source']['vae']}, in this folder, under its own licence"
    return "none is needed" if draws_pixels(report) else f"not in this folder; {DEFAULT_VAE} fits"


def draws_pixels(report: dict[str, Any]) -> bool:
    """Whether a converted model needs no autoencoder to draw images."""
    return report["config"]["in_channels"] in (1, 3)


def _snippet(report: dict[str, Any]) -> str:
    """Ten lines of use, for the card."""
    elastic, label = report["elastic"], min(207, report["config"]["num_classes"] - 1)
    imports = f"from elit import {'CheapCFG' if elastic else 'CFG'}, ElitPipeline"
    vae = ""
    if not report["source"]["vae"] and not draws_pixels(report):
        imports = f"from diffusers import AutoencoderKL\n{imports}"
        vae = f', vae=AutoencoderKL.from_pretrained("{DEFAULT_VAE}")'
    guided = "budget=1, guidance=CheapCFG(1.5)" if elastic else "guidance=CFG(1.5)"
    return f"""\
{imports}

pipe = ElitPipeline.from_pretrained("."{vae})
image = pipe([{label}], num_inference_steps=50, {guided}).images[0]"""
