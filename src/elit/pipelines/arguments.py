"""Arguments of a call as plain JSON and as people of diffusers type them, turned into ours."""

import inspect
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from elit._choices import hint_at
from elit._locks import alone_with
from elit._numbers import is_real, is_whole
from elit.flow.guidance import Budget, Guidance, make_guidance
from elit.flow.sampling import Generators
from elit.flow.words import DEFAULT_SCALE

logger = logging.getLogger(__name__)

_NO_WORDS = ("self", "options", "condition", "null_condition")  # of what users call
_RUNNING: "weakref.WeakSet[Any]" = weakref.WeakSet()


def one_at_a_time(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let threads that call a pipeline's method wait for each other.

    A run changes the scheduler and the transformer's caches, which pipelines may share; a step
    callback of a run can't begin another with them.
    """

    @wraps(method)
    def waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as taken:
            for part in (self.transformer, self.scheduler):  # in one order: no ring of waiting
                taken.enter_context(alone_with(part))
                if part in _RUNNING:
                    raise ValueError(
                        f"this {type(part).__name__} is in a run, whose step callback can't begin "
                        f"another with it; use a pipeline of other parts there, such as a deepcopy"
                    )
                _RUNNING.add(part)
                taken.callback(_RUNNING.discard, part)
            return method(self, *args, **kwargs)

    return waiting


def known_words(method: Callable[..., Any]) -> Callable[..., Any]:
    """Tell what a keyword that a pipeline doesn't take may mean, of all that its call takes."""
    taken = inspect.signature(method).parameters

    @wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs.keys() - taken:
            words = dict.fromkeys((*inspect.signature(self.__call__).parameters, *taken))
            known = [word for word in words if word not in _NO_WORDS]
            hint = hint_at(name, known, f"it takes {', '.join(known)}")
            raise TypeError(f"unknown argument {name!r:.60} of {type(self).__name__}: {hint}")
        return method(self, *args, **kwargs)

    return checked


def read_guidance(
    guidance: Guidance | str | None, scale: float | None, guide_budget: Budget | None
) -> Guidance | None:
    """Guidance as an object, by its name and scale, or by a scale alone, which is CFG's."""
    if isinstance(guidance, Guidance):
        given = {"guidance_scale": scale, "guide_budget": guide_budget}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}={value!r:.60} beside a Guidance, which has it; give one")
        return guidance
    unguided = scale is None or (is_real(scale) and scale == 1)
    if guidance is None and not unguided:
        guidance = "cfg"
    if isinstance(guidance, str) and guidance == "none" and not unguided:
        raise ValueError(
            f"guidance_scale={scale!r:.60} has no effect with guidance='none'; give 'cfg' or 'ccfg'"
        )
    if guide_budget is not None and guidance not in ("ag", "ccfg"):
        raise ValueError(
            f"guide_budget={guide_budget!r:.60} has no effect with guidance={guidance!r}; use 'ag' "
            f"or 'ccfg'"
        )
    if guidance is None:
        return None
    if not isinstance(guidance, str):
        raise ValueError(
            f"guidance {guidance!r:.60} is not a Guidance; give CFG(3.0), AutoGuidance(2.0), "
            f"CheapCFG(3.0), their names 'cfg', 'ag', 'ccfg' with guidance_scale=3.0, or None"
        )
    return make_guidance(guidance, DEFAULT_SCALE if scale is None else scale,
                         "lowest" if guide_budget is None else guide_budget)  # fmt: skip


def read_generators(
    generator: Generators, seed: int | Sequence[int] | None, count: int
) -> Generators:
    """Generators of the images: those given, or of seeds: image i of one seed has seed + i."""
    if seed is None:
        generator = list(generator) if isinstance(generator, Sequence) else generator
        each: list[Any] = generator if isinstance(generator, list) else [generator] * count
        if len(each) != count:
            raise ValueError(
                f"{len(each)} generators for {count} samples; give one for each, or one"
            )
        for one in each if generator is not None else ():
            if not isinstance(one, torch.Generator):
                raise ValueError(
                    f"generator {one!r:.60} is not a torch.Generator; "
                    f"give torch.Generator().manual_seed({one if isinstance(one, int) else 0})"
                )
        return generator
    if generator is not None:
        raise ValueError(f"seed={seed!r:.60} beside a generator; give one")
    seeds = [seed + i for i in range(count)] if is_whole(seed, 0, 2**63 - count) else seed
    if not isinstance(seeds, list | tuple) or not all(is_whole(one, 0, 2**63 - 1) for one in seeds):
        raise ValueError(
            f"seed={seed!r:.60} is not allowed; give a whole number, or a list of them"
        )
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} samples; give one for each, or one")
    return [torch.Generator().manual_seed(int(one)) for one in seeds]


def repeat_each(condition: Any, times: int | None) -> dict[str, Tensor]:
    """A condition whose rows, (B, ...) each, stand `num_images_per_prompt` times in a row."""
    if times is None:
        return dict(condition)
    if not is_whole(times):
        raise ValueError(f"num_images_per_prompt={times!r:.60} is no positive whole number")
    return {name: value.repeat_interleave(times, 0) for name, value in condition.items()}
