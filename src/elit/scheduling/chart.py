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
    charts, level = [], "noise level sigma"
    if schedule.gram:
        squares, count = schedule.squares(), len(schedule.latents)
        colours = ramp(count + 1)
        for first, title in ((0, "Guided prediction"), (count, "Guide")):
            lines = [
                _line(schedule, first + k, squares, format_budget(n / schedule.max_latents),
                      colours[k])
                for k, n in enumerate(schedule.latents)
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
    colours = ramp(len(plans))
    lines = [
        Line(plan.levels, [n / schedule.max_latents for n in numbers], label, colour=colour,
             style=style, marker="")
        for colour, (name, plan) in zip(colours, plans.items(), strict=True)
        for numbers, style, label in ((plan.latents, "-", name), (plan.guides, ":", ""))
    ]  # fmt: skip
    charts.append(
        Chart("Plans (dotted: the guide)", level, "budget, 0 is no guide", lines, bottom=-0.02,
              labels="right")
    )  # fmt: skip
    return picture(charts)


def _line(
    schedule: Schedule, place: int, squares: Any, name: str, colour: str,
    style: str = "-",
) -> Line:  # fmt: skip
    y = [max(row[place], FEW) for row in squares]
    error = [row[place] for row in schedule.standard_errors]
    return Line(schedule.levels, y, name, error=error, colour=colour, style=style, marker="")
