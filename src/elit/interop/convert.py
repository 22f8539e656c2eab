"""A public checkpoint as a folder that `ElitPipeline.from_pretrained` loads, with a model card."""

import json
import logging
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elit._files import json_text, sha256_of, write_text
from elit.flow.schedulers import make_scheduler
from elit.interop.official import Official, read_official
from elit.pipelines.elit_pipeline import ElitPipeline
from elit.preparation.autoencoder import load_vae
from elit.preparation.settings import DEFAULT_VAE

logger = logging.getLogger(__name__)

CONVERSION_FILE = "conversion.json"
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

    The folder is written aside and then renamed. One that holds this very conversion is left as it
    is, any other that is not empty is an error.
    """
    settings = ConversionSettings() if settings is None else settings
    file, out = Path(file).expanduser(), Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a new folder to write")
    source = {"file": file.name, "sha256": sha256_of(file) if file.is_file() else None}
    if out.is_dir() and any(out.iterdir()):
        return _same_conversion(out, source | vars(settings))
    official = read_official(
        file,
        weights=settings.weights,
        encoder_depth=settings.encoder_depth,
        num_heads=settings.num_heads,
        decoder_depth=settings.decoder_depth,
    )
    vae = None if settings.vae is None else _load_vae(settings.vae, official)
    report = {"source": source | vars(settings)} | _about(official)
    aside = out.absolute().with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        ElitPipeline(official.model, make_scheduler("euler"), vae).save_pretrained(aside)
        write_text(aside / "README.md", model_card(report))
        write_text(aside / CONVERSION_FILE, json_text(report))
        if out.is_dir():
            out.rmdir()  # it is empty
        os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return {"out": str(out)} | report


def _same_conversion(out: Path, source: dict[str, Any]) -> dict[str, Any]:
    """The report of a conversion that is there already, or the error for any other folder."""
    try:
        report = json.loads((out / CONVERSION_FILE).read_text(encoding="utf-8"))
        found = report["source"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{out} is not empty and holds no conversion; give a new folder to write"
        ) from None
    if found != source:
        raise ValueError(
            f"{out} holds another conversion, of {found.get('file')} or with other settings; give "
            f"a new folder to write"
        )
    logger.info("%s holds this conversion already", out)
    return {"out": str(out)} | report


def _load_vae(name: str, official: Official) -> Any:
    vae, _ = load_vae(name)
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
    return vae


def _about(official: Official) -> dict[str, Any]:
    """What the folder holds, as plain types."""
    model = official.model
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return {
        "steps": official.steps,
        "elastic": model.is_elastic,
        "parameters": sum(p.numel() for p in model.parameters()),
        "left_out": official.left_out,
        "config": config,
    }


def model_card(report: dict[str, Any]) -> str:
    """README.md of a converted folder: where the weights are from, their licence, how to draw."""
    source, config = report["source"], report["config"]
    kind = "ELIT-SiT" if report["elastic"] else "SiT"
    settings = "\n".join(f"| {key} | {value} |" for key, value in config.items())
    steps = "unknown" if report["steps"] is None else f"{report['steps']:,}"
    imports = f"from elit import {'CheapCFG' if report['elastic'] else 'CFG'}, ElitPipeline"
    vae = ""
    if not source["vae"]:
        imports = f"from diffusers import AutoencoderKL\n{imports}"
        vae = f', vae=AutoencoderKL.from_pretrained("{DEFAULT_VAE}")'
    guided = "budget=0.25, guidance=CheapCFG(1.5)" if report["elastic"] else "guidance=CFG(1.5)"
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

# {kind} from {source["file"]}

Converted by `elit convert official` without any change to the numbers.{left_out}

**Licence of the weights.** They stay under the licence of the file that they came from. The public
SiT and ELIT-SiT checkpoints of the paper's authors are under Snap Inc.'s non-commercial licence:
research and other non-commercial use alone, and whoever passes them on passes on that licence.
The code of elit is under Apache-2.0; that does not extend to these weights.

| source | |
|---|---|
| file | `{source["file"]}` |
| sha256 | `{source["sha256"]}` |
| weights | {source["weights"]} |
| training steps | {steps} |
| parameters | {report["parameters"]:,} |

| setting | |
|---|---|
{settings}

```python
{imports}

pipe = ElitPipeline.from_pretrained("."{vae})
image = pipe([207], num_inference_steps=50, {guided}).images[0]
```
"""
