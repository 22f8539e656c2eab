"""`elasticize`: any transformer gets a compute knob in one line."""

from collections.abc import Sequence
from typing import Any, TypeVar

from diffusers import DiffusionPipeline
from torch import nn

from elit.interface.budget import Budgeted
from elit.retrofit.elastic import PREFIX, ElasticTransformer, attach, detach
from elit.retrofit.known import find_layout
from elit.retrofit.layout import Layout
from elit.retrofit.settings import Settings

_Model = TypeVar("_Model", bound=nn.Module | DiffusionPipeline)


def elasticize(
    transformer: _Model,
    head: int,
    tail: int,
    group: int | Sequence[int],
    init: str = "identity",
    rank: int = 0,
    layout: Layout | None = None,
) -> _Model:
    """Give a transformer a latent interface, in place, and return it.

    Its blocks stay where they are, and its parameters keep their names: the new ones are under
    `transformer.elit`. Read comes before the block number `head`, Write after the last but
    `tail`. The forward takes one argument more, `num_latents`; `transformer.set_budget` is for
    pipelines, which don't know it.

    Args:
        transformer: a diffusers transformer, an elit DiT or SiT without groups, or your own module;
            or a pipeline with one, which then knows to save it as an elastic one.
        head: blocks before Read, at least 1.
        tail: blocks after Write, at least 1.
        group: tokens of a group along each axis; one number for all axes.
        init: "identity" starts lossless: at full budget the model is the original, up to
            rounding. "learned" starts as the paper's, from learned latents, and has to be trained.
        rank: of low-rank adapters on the blocks' linear layers that act only below full budget;
            16 is usual for fine-tuning, 0 is none.
        layout: how the transformer is laid out, if it is not among those known by name.

    Raises:
        ValueError: if the transformer can't be patched, or the split or the group doesn't fit.
    """
    if isinstance(transformer, DiffusionPipeline):
        elasticize(transformer_of(transformer), head, tail, group, init, rank, layout)
        return with_its_class(transformer)
    if hasattr(transformer, "_orig_mod"):
        raise ValueError("this model is compiled; elasticize it first, then compile it")
    if not isinstance(transformer, nn.Module):
        raise ValueError(
            f"elasticize takes a transformer, a torch module, not {type(transformer).__name__}"
        )
    if isinstance(transformer, Budgeted) and transformer.is_elastic:
        raise ValueError(
            f"this {type(transformer).__name__} is elastic already; unelasticize it first, or take "
            f"a plain model"
        )
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError(
            "a step cache is on; call disable_cache() first, then elasticize, then enable it: the "
            "cache has to see the tokens, not the latents"
        )
    if hasattr(transformer, PREFIX):
        raise ValueError(
            f"this {type(transformer).__name__} has an attribute {PREFIX!r}, which is where the "
            f"interface goes"
        )
    layout = find_layout(transformer) if layout is None else layout
    if not isinstance(layout, Layout):
        raise ValueError(f"layout={layout!r:.60} is no Layout; give layout=Layout(blocks=...)")
    blocks = layout.find_blocks(transformer)
    settings = Settings.check(len(blocks), head, tail, group, init, rank, layout.num_axes)
    for block in {type(block): block for block in blocks}.values():
        layout.port(block)  # raises before anything is changed
    attach(transformer, settings, layout)
    return transformer


def unelasticize(transformer: Any) -> Any:
    """Take the interface out again, in place: the original transformer, with its weights.

    Args:
        transformer: an elastic one, or a pipeline with one.
    """
    if isinstance(transformer, DiffusionPipeline):
        unelasticize(transformer_of(transformer))
        return with_its_class(transformer)
    if not isinstance(transformer, ElasticTransformer):
        raise ValueError(
            f"this {type(transformer).__name__} is not elastic; there is nothing to take out"
        )
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError("a step cache is on; call disable_cache() first")
    detach(transformer)
    return transformer


def transformer_of(pipeline: Any) -> Any:
    """The transformer of a pipeline."""
    transformer = getattr(pipeline, "transformer", None)
    if transformer is None:
        raise ValueError(f"a {type(pipeline).__name__} has no transformer")
    if getattr(pipeline, "transformer_2", None) is not None:
        raise ValueError(
            f"this {type(pipeline).__name__} has two transformers; give pipe.transformer and "
            f"pipe.transformer_2, then pipe.register_modules(transformer=pipe.transformer, "
            f"transformer_2=pipe.transformer_2), so that it saves what they became"
        )
    return transformer


def with_its_class(pipeline: Any) -> Any:
    """The pipeline, which writes into its index of which class its transformer is."""
    pipeline.register_modules(transformer=pipeline.transformer)
    return pipeline
