"""Any transformer gets a compute knob in one line: `elasticize`, and the class that it gives.

`ElasticQwenImageTransformer2DModel` and the like are made when they are asked for; this module
gives them by name, so that diffusers finds them when it loads a pipeline.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, wraps
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin  # diffusers looks it up here on loading
from torch import Tensor, nn

from elit._locks import alone_with
from elit.caching.hooks import registry_of
from elit.caching.mixin import StepCaching, refuse_cache
from elit.caching.ports import Block
from elit.interface.budget import Budgeted, check_num_latents
from elit.interface.fit import check_fit
from elit.interface.initial import init_weights
from elit.models.base import ModelBase, StrictLoading
from elit.models.dit import DiT
from elit.models.sit import SiT
from elit.retrofit.adapters import linear_layers, make_adapters
from elit.retrofit.hooks import BLOCK_HOOK, Session, install_hooks, remove_hooks
from elit.retrofit.interface import LatentInterface
from elit.retrofit.known import find_layout
from elit.retrofit.layout import Layout
from elit.retrofit.pipelines import elastic_pipeline_class
from elit.retrofit.settings import Settings

PREFIX = "elit"  # of the new parameters
CONFIG_KEY = "elastic"  # of the settings in the model's config
MOST_BYTES = 2**30  # of an interface, or four times what the model has

_Model = TypeVar("_Model", bound=nn.Module | DiffusionPipeline)


class ElasticTransformer(StrictLoading, Budgeted, StepCaching):
    """Methods that `elasticize` adds to a transformer's class."""

    original_class: type
    elit: LatentInterface  # Read and Write
    _elit_session: Session

    @property
    def elastic_settings(self) -> Settings:
        """Split of the transformer."""
        return self._elit_session.settings

    def set_budget(self, budget: float = 1.0, guide: float | None = None) -> None:
        """Budgets of calls that don't name theirs by `num_latents`, as those of a pipeline.

        It holds until it is set again, also between the steps of a pipeline.

        Args:
            budget: fraction of the latents to keep, in (0, 1].
            guide: the same of the guide, the branch without the prompt; by default `budget`.
        """
        self.resolve_budget(budget)
        if guide is not None:
            self.resolve_budget(guide)
        with alone_with(self):
            branches = self._elit_session.branches
            branches.budget, branches.guide = budget, guide

    @contextmanager
    def at_budget(self, budget: float = 1.0, guide: float | None = None) -> Iterator[None]:
        """`set_budget` for a while, in which other threads that use the model wait."""
        with alone_with(self), self._at_budget(budget, guide):
            yield

    @contextmanager
    def _at_budget(self, budget: float, guide: float | None = None) -> Iterator[None]:
        branches = self._elit_session.branches
        before = branches.budget, branches.guide
        self.set_budget(budget, guide)
        try:
            yield
        finally:
            branches.budget, branches.guide = before

    def set_min_latents(self, min_latents: int) -> None:
        """Say how many latents per group training keeps at least: the default guide's number."""
        check_num_latents(min_latents, self.max_latents, "min_latents")
        _set_settings(self, replace(self.elastic_settings, min_latents=min_latents))

    @wraps(ModelMixin.save_pretrained)  # a pipeline looks at its arguments
    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Save as diffusers does, unless the model could not be loaded again."""
        try:
            known = find_layout(self)
        except ValueError:
            known = None
        if self._elit_session.layout != known:
            raise ValueError(
                f"this {type(self).__name__} was elasticized with a layout of its own, which no "
                f"config can hold; use save_interface(model, file), and later "
                f"load_interface(original, file, layout=...)"
            )
        return super().save_pretrained(*args, **kwargs)

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Name the calls of a branch, for its budget and for step caches."""
        with alone_with(self), self._named(name, **kwargs):
            yield

    @contextmanager
    def _named(self, name: str, **kwargs: Any) -> Iterator[None]:
        with self._elit_session.branches.named(name), super().cache_context(name, **kwargs):
            yield

    def cache_blocks(self) -> list[Block]:
        """The original blocks: Read and Write are hooks of theirs, and are skipped with them."""
        layout = self._elit_session.layout
        return [(block, layout.port(block)) for block in layout.find_blocks(self)]

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks, as diffusers does, but without Read and Write around the core.

        The same few graphs then serve the core and the rest, at all budgets. With `dynamic=True`
        there are fewest.
        """
        super().compile_repeated_blocks(*args, **kwargs)
        session, (head, last) = self._elit_session, self.elastic_settings.edges
        for block in session.layout.find_blocks(self)[head : last + 1]:
            if block._compiled_call_impl is not None:
                block._compiled_call_impl = None
                forward = registry_of(block).hooks[BLOCK_HOOK].fn_ref.original_forward
                session.compiled[block] = torch.compile(forward, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with hooks of its own: diffusers' would go on calling this model's."""
        refuse_cache(self, "copy the model")
        session = self._elit_session
        copied: Any = object.__new__(type(self))
        remove_hooks(self, session)
        try:
            memo |= {id(self): copied, id(session): session}
            vars(copied).update(copy.deepcopy(vars(self), memo))
        finally:
            install_hooks(self, session)
        copied._elit_session = Session(copied.elit, session.layout, session.settings)
        copied._elit_session.branches = copy.copy(session.branches)
        install_hooks(copied, copied._elit_session)
        return copied

    @classmethod
    def from_config(cls, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Build the original transformer from a config, then its interface."""
        if not isinstance(config, dict) or CONFIG_KEY not in config:
            raise ValueError(
                f"this config is not of a {cls.__name__}: it has no {CONFIG_KEY!r} settings; load "
                f"the original transformer and elasticize it"
            )
        settings = Settings.from_config(config[CONFIG_KEY])
        config = {key: value for key, value in config.items() if key != CONFIG_KEY}
        built = super().from_config(config, *args, **kwargs)
        model = built[0] if isinstance(built, tuple) else built
        attach(model, settings, find_layout(model))
        return built


@cache
def elastic_class(base: Any) -> Any:
    """The elastic class of a transformer's class: the same one each time."""
    own: dict[str, Any] = {
        "__doc__": f"An elastic {base.__name__}: see `elasticize`.",
        "__module__": __name__ if issubclass(base, ModelMixin) else base.__module__,
        "original_class": base,
        "strict_prefix": "" if issubclass(base, ModelBase) else f"{PREFIX}.",
    }
    for name, added in (
        ("_no_split_modules", "LatentInterface"),
        ("_skip_layerwise_casting_patterns", PREFIX),
    ):
        own[name] = [*(getattr(base, name, None) or []), added]
    return type(f"Elastic{base.__name__}", (ElasticTransformer, base), own)


def __getattr__(name: str) -> type:
    """`ElasticXY` of diffusers' or our transformer `XY`, or of diffusers' pipeline `XY`."""
    base = name.removeprefix("Elastic")
    if base != name and not name.startswith("_"):
        original = {"DiT": DiT, "SiT": SiT}.get(base) or getattr(diffusers, base, None)
        for kind, make in (
            (ModelMixin, elastic_class),
            (DiffusionPipeline, elastic_pipeline_class),
        ):
            if isinstance(original, type) and issubclass(original, kind):
                return make(original)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def attach(model: Any, settings: Settings, layout: Layout) -> None:
    """Make a transformer elastic, with a fresh interface."""
    blocks, max_latents = layout.find_blocks(model), math.prod(settings.group)
    if len(blocks) != settings.depth:
        raise ValueError(
            f"the settings are of {settings.depth} blocks, but this {type(model).__name__} has "
            f"{len(blocks)}"
        )
    weight = _weight_like(blocks[settings.head], model)
    width, heads = layout.width(model), layout.heads(model)
    with torch.inference_mode(False):  # parameters made in it could never be trained
        try:
            with torch.device("meta"):
                adapters = make_adapters(blocks, settings.rank) if settings.rank else None
                interface = LatentInterface(width, heads, max_latents, settings.init, adapters)
            size = sum(p.nbytes for p in interface.parameters())
        except RuntimeError:  # more bytes than there are numbers for them
            size = MOST_BYTES << 30
        if size > max(MOST_BYTES, 4 * sum(p.nbytes for p in model.parameters())):
            raise ValueError(
                f"the interface would take {size / 2**30:,.0f} GiB, out of proportion to this "
                f"{type(model).__name__}: group={settings.group}, rank={settings.rank} or the "
                f"layout's hidden_size is too large"
            )
        interface.to_empty(device=weight.device).apply(init_weights)
        interface.to(dtype=weight.dtype).train(model.training)
    if not isinstance(model, ElasticTransformer):
        kind: Any = type(model)
        model.__class__ = elastic_class(kind)
    model.elit, model.max_latents = interface, max_latents
    model._elit_session = Session(interface, layout, settings)
    _set_settings(model, settings)
    if not getattr(model, "_repeated_blocks", None):  # of SD3, DiT, ...: compiles them by region
        model._repeated_blocks = sorted({type(block).__name__ for block in blocks})
    try:
        install_hooks(model, model._elit_session)
    except Exception:
        detach(model)  # nothing is left half patched
        raise


def _set_settings(model: Any, settings: Settings) -> None:
    model._elit_session.settings, model.min_latents = settings, settings.min_latents
    if hasattr(model, "register_to_config"):
        model.register_to_config(**{CONFIG_KEY: settings.to_config()})


def _weight_like(block: nn.Module, model: nn.Module) -> Tensor:
    """A weight of the device and dtype that tokens have in the core: norms may be kept in float32.

    Storage of one byte (float8) is cast before it is used.
    """
    candidates = [layer.weight for layer in linear_layers(block).values()]
    for weight in (*candidates, *model.parameters()):
        if weight.is_floating_point() and weight.element_size() > 1:
            return weight
    return torch.empty(0)


def detach(model: Any) -> None:
    """Give the transformer back as it was."""
    remove_hooks(model, model._elit_session)
    del model.elit, model.max_latents, model.min_latents, model._elit_session
    vars(model).pop("_repeated_blocks", None)  # the class keeps its own
    model.__class__ = model.original_class
    if hasattr(model, "register_to_config"):
        model._internal_dict = FrozenDict(
            {key: value for key, value in model.config.items() if key != CONFIG_KEY}
        )


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
        return in_pipeline(transformer, elasticize, head, tail, group, init, rank, layout)
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
    refuse_cache(transformer, "elasticize the model: it has to see the tokens, not the latents")
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
    if isinstance(transformer, ModelBase):  # others have no size that they were made for
        check_fit(transformer.geometry.grid(transformer.sample_size).size, settings.group)
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
        return in_pipeline(transformer, unelasticize)
    if not isinstance(transformer, ElasticTransformer):
        raise ValueError(
            f"this {type(transformer).__name__} is not elastic; there is nothing to take out"
        )
    refuse_cache(transformer, "unelasticize the model")
    detach(transformer)
    return transformer


def in_pipeline(pipeline: Any, change: Callable[..., Any], *args: Any) -> Any:
    """Change a pipeline's transformer; its class and its index say what that is now."""
    transformer = getattr(pipeline, "transformer", None)
    if transformer is None:
        raise ValueError(f"a {type(pipeline).__name__} has no transformer")
    if getattr(pipeline, "transformer_2", None) is not None:
        raise ValueError(
            f"this {type(pipeline).__name__} has two transformers; give pipe.transformer and "
            f"pipe.transformer_2, then pipe.register_modules(transformer=pipe.transformer, "
            f"transformer_2=pipe.transformer_2), so that it saves what they became"
        )
    pipeline.register_modules(transformer=change(transformer, *args))
    kind: Any = getattr(pipeline, "original_class", type(pipeline))
    if getattr(diffusers, kind.__name__, None) is kind:  # else no other program has it
        is_elastic = isinstance(pipeline.transformer, ElasticTransformer)
        pipeline.__class__ = elastic_pipeline_class(kind) if is_elastic else kind
    return pipeline
