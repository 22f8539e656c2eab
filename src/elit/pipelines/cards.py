"""What the model card of a pipeline of ours tells."""

from typing import Any

from elit._portable import Card
from elit._tables import counted
from elit.cost.flops import flops_report
from elit.interface.budget import format_budget
from elit.interface.fit import format_size
from elit.pipelines.folder import draws_images


def card_of(pipeline: Any) -> Card:
    """The card of an `ElitPipeline` or an `ElitTextPipeline`."""
    model, kind = pipeline.transformer, type(pipeline).__name__
    size = format_size(pipeline.pixel_size())
    report = flops_report(pipeline.forward_cost(), kind, [])
    what = (
        f"texts (by `{kind}`)" if model.takes_text else counted(model.config.num_classes, "class")
    )
    about = (
        f"A {type(model).__name__} of {report['parameters']:,} parameters that draws "
        f"{'clips' if pipeline.draws_clips else 'images'} of {what}, made for {size}."
    )
    if model.is_elastic:
        about += (
            " It is elastic: a budget, the fraction of its latents that are kept, sets what each "
            "image costs."
        )
    if pipeline.vae is None and not draws_images(model.in_channels):
        about += (
            " The folder holds no autoencoder: give from_pretrained the one that it was trained "
            "with, as vae=."
        )
    full = report["rows"][0]["gflops"]
    rows = [
        [
            format_budget(row["budget"]) if model.is_elastic else "none: a plain model",
            str(row["num_latents"] or "-"), f"{row['gflops']:.3g}", f"{row['gflops'] / full:.0%}",
        ]
        for row in report["rows"]
    ]  # fmt: skip
    asked = '"a red circle"' if model.takes_text else "[0]"
    budget = ", budget=0.5" if model.is_elastic else ""
    call = f'image = pipe({asked}{budget}, guidance="cfg", guidance_scale=2.0, seed=0).images[0]'
    flags = f"--prompts {asked}" if model.takes_text else "--labels 0"
    return Card(
        title=f"{kind} at any budget" if model.is_elastic else kind,
        about=about,
        table=[["budget", "latents per group", "GFLOPs of a forward", "of full"], *rows],
        tags="elastic" if model.is_elastic else "diffusion-transformer",
        pipeline_tag=None if pipeline.draws_clips else
        "text-to-image" if model.takes_text else "unconditional-image-generation",
        elit=f'from elit import {kind}\n\npipe = {kind}.from_pretrained(".")\n{call}',
        call=call,
        command=f"elit sample . {flags}" + (" --budget 1 1/2" if model.is_elastic else ""),
    )  # fmt: skip
