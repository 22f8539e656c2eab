"""Operating points: budgets, steps, guide and step cache of a run."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from elit._choices import check_choice
from elit._plain import from_plain
from elit.caching.step_cache import StepCache
from elit.flow.guidance import WHOLE, Guidance, make_guidance
from elit.flow.words import DEFAULT_SCALE, DEFAULT_STEPS, GUIDANCES
from elit.interface.budget import format_budget, read_budget
from elit.models.elastic import ElasticMixin


def _budgets(given: Any, name: str) -> tuple[float | None, ...]:
    if not isinstance(given, list | tuple):
        raise ValueError(f"{name} {given!r:.60} are none; give one for each call of the model")
    may_lack = name == "guide_budgets_of_steps"
    return tuple(None if may_lack and one is None else read_budget(one) for one in given)


def guided_by(guidance: Guidance | None) -> dict[str, Any]:
    """Fields of a point that is guided by CFG, or by nothing."""
    if guidance is None:
        return {"guidance": "none", "scale": None, "interval": None}
    interval = None if guidance.interval == WHOLE else guidance.interval
    return {"guidance": "cfg", "scale": guidance.scale, "interval": interval}


@dataclass(frozen=True)
class OperatingPoint:
    """One way to draw.

    Attributes:
        budget: fraction of the latents kept; of budgets over the steps their mean.
        steps: of the sampler.
        guidance: "none", "cfg", "ag" or "ccfg".
        scale: of guidance; None without.
        guide_budget: the guide's, of "ag" and "ccfg"; None is the lowest trained.
        interval: noise levels in which guidance acts; None is everywhere.
        budgets_of_steps: of each call of the model; None is the same in all.
        guide_budgets_of_steps: likewise of the guide of "cfg", None where there is none.
        cache: that leaves steps out; None is none.
    """

    budget: float = 1.0
    steps: int = DEFAULT_STEPS
    guidance: str = "none"
    scale: float | None = None
    guide_budget: float | None = None
    interval: tuple[float, float] | None = None
    budgets_of_steps: tuple[float, ...] | None = None
    guide_budgets_of_steps: tuple[float | None, ...] | None = None
    cache: StepCache | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "guide_budget"):
            if (typed := getattr(self, name)) is not None:
                object.__setattr__(self, name, read_budget(typed))
        for name in ("budgets_of_steps", "guide_budgets_of_steps"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, _budgets(given, name))
        if self.budgets_of_steps is None and self.guide_budgets_of_steps is not None:
            raise ValueError("guide_budgets_of_steps go with budgets_of_steps; give both")
        check_choice(self.guidance, GUIDANCES, "guidance")
        if not isinstance(self.cache, StepCache | None):
            raise ValueError(f"cache {self.cache!r:.60} is none; give a StepCache")

    def arguments(self) -> dict[str, Any]:
        """What a pipeline is called with: `pipeline(labels, **point.arguments())`."""
        cache = {} if self.cache is None else {"step_cache": self.cache.config()}
        return {
            **({"budget": self.budget} if self.budgets_of_steps is None else self.of_steps()),
            "num_inference_steps": self.steps,
            "guidance": self.make_guidance(),
            **cache,
        }

    def of_steps(self) -> dict[str, Any]:
        """Its budgets over the steps, as arguments of a pipeline."""
        names = "budgets_of_steps", "guide_budgets_of_steps"
        return {name: list(x) for name in names if (x := getattr(self, name)) is not None}

    def make_guidance(self) -> Guidance | None:
        """Its guidance."""
        scale = DEFAULT_SCALE if self.scale is None else self.scale
        interval = (0.0, 1.0) if self.interval is None else self.interval
        return make_guidance(self.guidance, scale, self.guide_budget or "lowest", interval)

    def resolved(self, model: ElasticMixin) -> "OperatingPoint":
        """The same at the budgets that really run, and with all that is left to defaults."""
        budget = model.budget_of(model.resolve_budget(self.budget))
        if self.guidance == "none":
            return replace(self, budget=budget, scale=None, guide_budget=None, interval=None)
        guide = None
        if self.guidance in ("ag", "ccfg"):
            if not model.is_elastic:
                raise ValueError(
                    f"guidance {self.guidance} needs a lower budget; this model has none"
                )
            given = self.guide_budget
            guide = model.budget_of(model.resolve_budget(given) if given else model.min_latents)
        scale = DEFAULT_SCALE if self.scale is None else self.scale
        return replace(self, budget=budget, scale=scale, guide_budget=guide)

    def guide(self) -> str:
        """Its guidance in words: 'ccfg 3, guide 1/16'."""
        if self.guidance == "none":
            return "none"
        words = f"{self.guidance} {DEFAULT_SCALE if self.scale is None else self.scale:g}"
        if self.guide_budget is not None:
            words += f", guide {format_budget(self.guide_budget)}"
        if self.interval is not None:
            words += f", levels {self.interval[0]:g} to {self.interval[1]:g}"
        return words

    def __str__(self) -> str:
        mean = "" if self.budgets_of_steps is None else " on average"
        words = f"budget {format_budget(self.budget)}{mean}, {self.steps} steps, guidance "
        return words + self.guide() + (f", {self.cache}" if self.cache else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON; what a plain point lacks is left out."""
        late = "budgets_of_steps", "guide_budgets_of_steps", "cache"
        return {k: x for k, x in asdict(self).items() if not (k in late and x is None)}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "OperatingPoint":
        """Of a row of a sweep's file, which holds more."""
        known = {field.name: row[field.name] for field in fields(cls) if field.name in row}
        return from_plain(cls, known)
