"""README.md of a converted folder."""

from typing import Any

from elit.pipelines.folder import draws_images
from elit.preparation.settings import DEFAULT_VAE

ELASTIC_ALONE = ("group", "head", "tail", "min_latents", "write_depth")

_SNAP = """\
The public SiT and ELIT-SiT checkpoints of the paper's authors are under Snap Inc.'s non-commercial
licence: research and other non-commercial use alone, and whoever passes them on passes on that
licence."""
_FACEBOOK = """\
The public DiT checkpoints of Facebook are under CC BY-NC 4.0: not for commercial use, and whoever
passes them on names the source and the licence."""
_ELIT = """\
The page "Run the public checkpoints" of elit's docs says what a budget costs, and what differs from
the paper, *One Model, Many Budgets: Elastic Latent Interfaces for Diffusion Transformers*."""
_DIT = """\
A `DiTPipeline` of diffusers, which predicts noise at 1000 steps. Each block has its own copy of the
embeddings, as diffusers wants them, and these count among the parameters. diffusers spaces the
frequencies of a time a little otherwise than the checkpoint was trained with; the lines below
that set `downscale_freq_shift` mend it. `elit.elasticize` gives the transformer a latent
interface."""


def model_card(report: dict[str, Any]) -> str:
    """README.md of a converted folder: where the weights are from, their licence, how to draw."""
    source, config = report["source"], report["config"]
    file = "".join(c if c.isprintable() and c not in "`|" else "?" for c in source["file"])
    kind = report["kind"]
    is_dit = kind == "DiT"
    # YAML: a licence that the hub has no short name for is "other", with a name of its own.
    licence = "cc-by-nc-4.0" if is_dit else "other\nlicense_name: snap-non-commercial"
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
license: {licence}
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [elit, {"dit" if is_dit else "sit"}, class-conditional]
---

# {kind} from {file}

Converted by `elit convert {source["format"]}` {numbers}.{left_out}
{_DIT if is_dit else _ELIT}

**Licence of the weights.** They stay under the licence of the file that they came from.
{_FACEBOOK if is_dit else _SNAP}
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
    """Tell by a file's name whether it was trained at more budgets than the full one."""
    if not elastic:
        return "no, a plain model"
    if "_mb_" in file:
        return "yes, by the file's name"
    public = file.startswith("elit_sit_imagenet")
    return "no, by the file's name: full budget alone" if public else "unknown"


def _autoencoder_of(report: dict[str, Any]) -> str:
    if report["source"]["vae"]:
        return f"{report['source']['vae']}, in this folder, under its own licence"
    if draws_images(report["config"]["in_channels"]):
        return "none is needed"
    return f"not in this folder; {DEFAULT_VAE} fits"


def _snippet(report: dict[str, Any]) -> str:
    """Ten lines of use, for the card."""
    label = min(207, report["num_classes"] - 1)
    if report["kind"] == "DiT":
        pipeline, imports = "DiTPipeline", "from diffusers import DiTPipeline"
        use = "guidance_scale=4.0"
    elif report["elastic"]:
        pipeline, imports = "ElitPipeline", "from elit import CheapCFG, ElitPipeline"
        use = "budget=1, guidance=CheapCFG(1.5)"
    else:
        pipeline, imports = "ElitPipeline", "from elit import CFG, ElitPipeline"
        use = "guidance=CFG(1.5)"
    vae, mend = "", ""
    if report["kind"] == "DiT":
        imports += "\nfrom diffusers.models.embeddings import Timesteps"
        mend = """
for module in pipe.transformer.modules():
    if isinstance(module, Timesteps):
        module.downscale_freq_shift = 0"""
    if not report["source"]["vae"] and not draws_images(report["config"]["in_channels"]):
        imports = f"from diffusers import AutoencoderKL\n{imports}"
        vae = f', vae=AutoencoderKL.from_pretrained("{DEFAULT_VAE}")'
    return f"""\
{imports}

pipe = {pipeline}.from_pretrained("."{vae}){mend}
image = pipe([{label}], num_inference_steps=50, {use}).images[0]"""
