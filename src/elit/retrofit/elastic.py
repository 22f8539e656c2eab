"""Class of a retrofitted transformer: the original one, with an interface and budgets.

`ElasticQwenImageTransformer2DModel` and the like are made when they are asked for; this module
gives them by name, so that diffusers finds them when it loads a pipeline.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, wraps
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin  # diffusers looks it up here on loading
from torch import Tensor, nn

from elit.caching.mixin import StepCaching
from elit.caching.ports import Block
from elit.interface.budget import Budgeted, check_num_latents
from elit.interface.initial import init_weights
from elit.models.dit import DiT
from elit.models.sit import SiT
from elit.retrofit.adapters import linear_layers, make_adapters
from elit.retrofit.hooks import core_hook, install_hooks, remove_hooks
from elit.retrofit.interface import LatentInterface
from elit.retrofit.known import find_layout
from elit.retrofit.layout import Layout
from elit.retrofit.session import Session
from elit.retrofit.settings import Settings

PREFIX = "elit"  # of the new parameters
CONFIG_KEY = "elastic"  # of the settings in the model's config
MOST_BYTES = 2**30  # of an interface, or four times what the model has


class ElasticTransformer(Budgeted, StepCaching):
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
        branches = self._elit_session.branches
        branches.budget, branches.guide = budget, guide

    @contextmanager
    def at_budget(self, budget: float = 1.0, guide: float | None = None) -> Iterator[None]:
        """`set_budget` for a while."""
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
        model: Any = self
        settings = replace(self.elastic_settings, min_latents=min_latents)
        model._elit_session.settings, model.min_latents = settings, min_latents
        if hasattr(model, "register_to_config"):
            model.register_to_config(**{CONFIG_KEY: settings.to_config()})

    @wraps(ModelMixin.save_pretrained)  # a pipeline looks at its arguments
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
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
        super().save_pretrained(*args, **kwargs)

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Name the calls of a branch, for its budget and for step caches."""
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
                core_hook(block).compile(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with hooks of its own: diffusers' would go on calling this model's."""
        model: Any = self
        if model.is_cache_enabled:
            raise ValueError("a step cache is on; call disable_cache() before you copy the model")
        session = model._elit_session
        compiled = [core_hook(block).compiled for block in session.core]
        remove_hooks(model, session)
        try:
            copied: Any = object.__new__(type(model))
            memo[id(model)] = copied
            for name, value in vars(model).items():
                vars(copied)[name] = value if value is session else copy.deepcopy(value, memo)
        finally:
            _install(model, session)
            for block, forward in zip(session.core, compiled, strict=True):
                core_hook(block).compiled = forward
        other = Session(copied.elit, session.layout, session.settings)
        other.branches = copy.copy(session.branches)
        _install(copied, other)
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

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as any diffusers model, but refuse weights without an interface that fits."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        keys = [*info["missing_keys"], *info["unexpected_keys"]]
        keys += [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
        wrong = sorted(key for key in keys if key.startswith(f"{PREFIX}."))
        if wrong:
            raise ValueError(
                f"{args[0] if args else 'the checkpoint'} does not hold the interface of its "
                f"config: {len(wrong)} parameters are missing, unknown or of other shapes "
                f"({', '.join(wrong[:3])}, ...)"
            )
        return (model, info) if wants_info else model


def elastic_class(base: type) -> Any:
    """The elastic class of a transformer's class: the same one each time."""
    return _elastic_class(base)


@cache
def _elastic_class(base: Any) -> Any:
    own: dict[str, Any] = {
        "__doc__": f"An elastic {base.__name__}: see `elasticize`.",
        "__module__": __name__ if issubclass(base, ModelMixin) else base.__module__,
        "original_class": base,
    }
    for name, added in (
        ("_no_split_modules", "LatentInterface"),
        ("_skip_layerwise_casting_patterns", PREFIX),
    ):
        own[name] = [*(getattr(base, name, None) or []), added]
    return type(f"Elastic{base.__name__}", (ElasticTransformer, base), own)


def __getattr__(name: str) -> type:
    """`ElasticXY` of diffusers' or our transformer `XY`."""
    base = name.removeprefix("Elastic")
    if base != name and not name.startswith("_"):
        original = {"DiT": DiT, "SiT": SiT}.get(base) or getattr(diffusers, base, None)
        if isinstance(original, type) and issubclass(original, ModelMixin):
            return elastic_class(original)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def attach(model: Any, settings: Settings, layout: Layout) -> None:
    """Make a transformer elastic, with a fresh interface."""
    blocks = layout.find_blocks(model)
    if len(blocks) != settings.depth:
        raise ValueError(
            f"the settings are of {settings.depth} blocks, but this {type(model).__name__} has "
            f"{len(blocks)}"
        )
    weight = _weight_like(blocks[settings.head], model)
    max_latents = math.prod(settings.group)

    def make(device: torch.device | str) -> LatentInterface:
        with torch.device(device):
            adapters = make_adapters(blocks, settings.rank) if settings.rank else None
            return LatentInterface(
                layout.width(model), layout.heads(model), max_latents, settings.init, adapters
            )

    _check_size(make, model, settings)
    # Parameters made in inference mode could never be trained.
    with torch.inference_mode(False):
        interface = make(weight.device)
        interface.apply(init_weights)
        interface.to(dtype=weight.dtype).train(model.training)
    session = Session(interface, layout, settings)
    if not isinstance(model, ElasticTransformer):
        model.__class__ = elastic_class(type(model))
    model.elit, model.max_latents = interface, max_latents
    model.min_latents = settings.min_latents
    if not getattr(model, "_repeated_blocks", None):  # of SD3, DiT, ...: compiles them by region
        model._repeated_blocks = sorted({type(block).__name__ for block in blocks})
    if hasattr(model, "register_to_config"):
        model.register_to_config(**{CONFIG_KEY: settings.to_config()})
    try:
        _install(model, session)
    except Exception:
        detach(model)  # nothing is left half patched
        raise


def _check_size(make: Callable[[str], nn.Module], model: nn.Module, settings: Settings) -> None:
    """Raise a ValueError if the interface would be out of all proportion to the model."""
    try:
        size = sum(p.nbytes for p in make("meta").parameters())
    except RuntimeError:  # more bytes than there are numbers for them
        size = MOST_BYTES << 30
    if size > max(MOST_BYTES, 4 * sum(p.nbytes for p in model.parameters())):
        raise ValueError(
            f"the interface would take {size / 2**30:,.0f} GiB, out of proportion to this "
            f"{type(model).__name__}: group={settings.group}, rank={settings.rank} or the layout's "
            f"hidden_size is too large"
        )


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


def _install(model: Any, session: Session) -> None:
    model._elit_session = session
    install_hooks(model, session)
