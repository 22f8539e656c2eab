"""A list of budgets, one for each call of the model, and how to draw with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elit.caching.step_cache import StepCache
from elit.choosing.points import OperatingPoint, guided_by
from elit.flow.guidance import Forwards, Guidance


@dataclass(frozen=True)
class Plan:
    """Budgets of a run, call by call: `pipeline(labels, **plan.arguments())`."""

    levels: tuple[float, ...]  # noise level of each call
    latents: tuple[int, ...]  # of each call, per group
    guides: tuple[int, ...]  # likewise of the guide; 0 is no guide
    max_latents: int
    guidance: Guidance | None
    num_inference_steps: int
    cost: float  # of an image, in what the cap was in
    error: float | None  # predicted mean square of what the samples lose, per element

    @property
    def calls(self) -> list[Forwards]:
        """Forwards of the model in each call, as `pipeline.calls` has them."""
        return [call_of(n, m) for n, m in zip(self.latents, self.guides, strict=True)]

    def budgets(self) -> list[float]:
        """Budget of each call."""
        return [n / self.max_latents for n in self.latents]

    def guide_budgets(self) -> list[float | None]:
        """Budget of the guide in each call, None where there is to be none."""
        return [n / self.max_latents if n else None for n in self.guides]

    def arguments(self) -> dict[str, Any]:
        """What a pipeline of ours is called with."""
        guides = {} if self.guidance is None else {"guide_budgets_of_steps": self.guide_budgets()}
        return {
            "budgets_of_steps": self.budgets(),
            "num_inference_steps": self.num_inference_steps,
            "guidance": self.guidance,
            **guides,
        }

    def point(self, cache: StepCache | None = None) -> OperatingPoint:
        """The same as an operating point, of one budget where that is all there is to it."""
        budgets = tuple(self.budgets())
        guides = None if self.guidance is None else tuple(self.guide_budgets())
        plain = len({*budgets, *(guides or ())}) == 1
        return OperatingPoint(
            budgets[0] if plain else sum(budgets) / len(budgets),
            self.num_inference_steps,
            budgets_of_steps=None if plain else budgets,
            guide_budgets_of_steps=None if plain else guides,
            cache=cache,
            **guided_by(self.guidance),
        )

    def settings(self) -> str:
        """What it is a plan for, in words: '20 steps, guidance cfg 1.5'."""
        return f"{self.num_inference_steps} steps, guidance {self.point().guide()}"

    def callback(self, transformer: Any) -> Callable[..., dict[str, Any]]:
        """A `callback_on_step_end` for a stock pipeline whose transformer was elasticized.

        It sets the budgets of the first step now, those of the next after each, and those of the
        first after the last. Such a pipeline guides at all steps or none: plan with
        `drops_guide=False`, and without an interval.
        """
        if self.guidance is not None and not all(self.guides):
            raise ValueError(
                "a stock pipeline leaves its guide out at no step; plan with drops_guide=False, "
                "and without an interval of guidance"
            )
        if transformer.max_latents != self.max_latents:
            raise ValueError(
                f"this plan is of {self.max_latents} latents per group, but the transformer has "
                f"{transformer.max_latents}; plan for it"
            )
        planned = len(self.latents)

        def set_step(step: int) -> None:
            place = step % planned
            transformer.set_budget(self.budgets()[place], guide=self.guide_budgets()[place])

        def after_step(pipeline: Any, step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
            calls = getattr(pipeline, "num_timesteps", planned)
            if calls != planned:
                raise ValueError(
                    f"this plan is of {planned} calls of the transformer, but the run has {calls}; "
                    f"plan for as many steps"
                )
            set_step(step + 1)
            return {}

        set_step(0)
        return after_step


def call_of(latents: int, guide: int) -> Forwards:
    """Forwards of a call with a guide of so many latents; 0 is none."""
    if guide == 0:
        return ((latents, 1),)
    return ((latents, 2),) if guide == latents else ((latents, 1), (guide, 1))
