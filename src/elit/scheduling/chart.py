"""`schedule.png`: errors over the noise levels, and the budgets that are chosen for a few caps."""

from typing import Any

from PIL import Image

from elit.interface.budget import format_budget
from elit.scheduling.plan import Plan
from elit.scheduling.schedule import Schedule
from elit.viz.charts import Chart, Line, picture, ramp

FEW = 1e-12  # below it there is nothing to show on a logarithmic axis


def schedule_picture(schedule: Schedule, plans: dict[str, Plan]) -> Image.Image:
    """Charts of the measured errors, or of the spectrum, and of plans by their names."""
    charts, level = [], "noise level sigma (sampling goes from 1 to 0)"
    if schedule.gram:
        squares, count = schedule.squares(), len(schedule.latents)
        colours = ramp(count + 1)
        for first, title in ((0, "Guided prediction"), (count, "Guide")):
            lines = [
                _line(schedule, first + k, squares,
                      f"budget {format_budget(n / schedule.max_latents)}", colours[k])
                for k, n in reversed(list(enumerate(schedule.latents)))
            ]  # fmt: skip
            lines.append(_line(schedule, 2 * count, squares, "no guide", colours[-1], "--"))
            charts.append(
                Chart(title, level, "square of the velocity's error (lower is better)", lines,
                      log_y=True, bands=True, labels="right")
            )  # fmt: skip
    else:
        rings = len(schedule.spectrum)
        share = [(i + 1) / rings for i in range(rings)]
        line = Line(share, [max(p, FEW) for p in schedule.spectrum], marker="")
        charts.append(
            Chart("Data", "frequency, of the highest", "power (white noise has 1)", [line],
                  log_y=True)
        )  # fmt: skip
    colours = ramp(len(plans))[::-1]  # the most FLOPs stand out most
    lines = [
        Line(plan.levels, [n / schedule.max_latents for n in numbers], label, colour=colour,
             style=style, marker="")
        for colour, (name, plan) in zip(colours, plans.items(), strict=True)
        for numbers, style, label in (
            (plan.latents, "-", f"{name} of the FLOPs"), (plan.guides, ":", ""),
        )
    ]  # fmt: skip
    what = next((f" for {plan.settings()}" for plan in plans.values()), "")
    charts.append(
        Chart(f"Plans{what} (dotted: the guide)", level, "budget (0: no guide)", lines,
              bottom=-0.02, labels="right")
    )  # fmt: skip
    return picture(charts, sentence=_told(schedule, plans))


def _told(schedule: Schedule, plans: dict[str, Plan]) -> str:
    """Where few latents err most, and where a plan spends its latents."""
    texts = []
    if schedule.gram:
        few = [row[0] for row in schedule.squares()]
        worst = schedule.levels[few.index(max(few))]
        texts.append(f"The fewest latents err most at noise level {worst:g}")
    if plans:
        name, plan = list(plans.items())[len(plans) // 2]
        most = max(plan.latents)
        levels = [s for s, n in zip(plan.levels, plan.latents, strict=True) if n == most]
        place = " to ".join(dict.fromkeys(f"{s:.2g}" for s in (max(levels), min(levels))))
        budget = format_budget(most / schedule.max_latents)
        share = f"{'with' if texts else 'With'} {name} of full budget's FLOPs"
        texts.append(f"{share} the plan's highest budget, {budget}, is at noise level {place}")
    return "; ".join(texts) + "." * bool(texts)


def _line(
    schedule: Schedule, place: int, squares: Any, name: str, colour: str,
    style: str = "-",
) -> Line:  # fmt: skip
    y = [max(row[place], FEW) for row in squares]
    error = [row[place] for row in schedule.standard_errors]
    return Line(schedule.levels, y, name, error=error, colour=colour, style=style, marker="")
