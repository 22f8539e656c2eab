"""Which charts a sweep's rows make: against cost, over steps and budgets, over guidance."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from elit._pareto import best_within, is_number, pareto_front
from elit.interface.budget import format_budget
from elit.viz.charts import ScoreInfo, Series, chart

Row = Mapping[str, Any]
Guide = tuple[Any, ...]

COSTS = {"gflops_per_image": "GFLOPs per image", "ms_per_image": "ms per image"}
KINDS = {
    "none": "no guidance",
    "cfg": "CFG",
    "ag": "autoguidance",
    "ccfg": "cheap CFG",
}
_MOST_TICKS = 10


class Rows:
    """The rows of one or more reports, with the colour of each.

    Attributes:
        rows: all of them; a row's number is its place.
        models: name of the model of each.
        names: of the models.
        budgets: that occur, lowest first.
        colours: of each row: of its budget, or of its model where there are several.
    """

    def __init__(self, reports: Mapping[str, Mapping[str, Any]]):
        self.names = list(reports)
        pairs = [(name, row) for name, report in reports.items() for row in report["rows"]]
        if not pairs:
            raise ValueError("nothing to show: the sweep has no rows; run `elit sweep` first")
        self.models = [name for name, _ in pairs]
        self.rows: list[Row] = [row for _, row in pairs]
        self.budgets = sorted({row["budget"] for row in self.rows})
        if len(self.names) > 1:
            self.colours = [self.names.index(name) for name in self.models]
        else:
            self.colours = [self.budgets.index(row["budget"]) for row in self.rows]

    def score(self, number: int, name: str) -> float | None:
        """A score of a row; None where it has none."""
        value = self.rows[number]["scores"].get(name)
        return float(value) if is_number(value) else None

    def scored(self, name: str) -> list[int]:
        """Rows that have the score."""
        return [i for i in range(len(self.rows)) if self.score(i, name) is not None]

    def grouped(self, rows: Iterable[int], key: Callable[[int], Hashable]) -> dict[Any, list[int]]:
        """Rows of each key, keys in the order of their first rows."""
        groups: dict[Any, list[int]] = {}
        for i in rows:
            groups.setdefault(key(i), []).append(i)
        return groups

    def points(self, rows: Iterable[int], x: str, score: str) -> list[tuple[float, float, int]]:
        """(x, score, row) by x, of the rows that have both and x above 0."""
        found = []
        for i in rows:
            along, value = self.rows[i].get(x), self.score(i, score)
            if is_number(along) and along > 0 and value is not None:
                found.append((float(along), value, i))
        return sorted(found)


def best_at_costs(
    rows: Rows, score: str, info: ScoreInfo, most: int = 12
) -> list[tuple[float, dict[str, int | None]]]:
    """The best row of each model at or below a cost, for the costs at which a front has a step.

    Args:
        rows: of all models.
        score: its name.
        info: its direction.
        most: costs, evenly chosen, the lowest and the highest among them.

    Returns:
        (GFLOPs per image, row of each model or None).
    """
    own = rows.grouped(range(len(rows.rows)), lambda i: rows.models[i])
    costs = {name: [rows.rows[i].get("gflops_per_image") for i in own[name]] for name in own}
    values = {name: [rows.score(i, score) for i in own[name]] for name in own}
    steps: set[float] = set()
    for name in own:
        front = pareto_front(costs[name], values[name], info.lower_is_better)
        steps.update(float(costs[name][k] or 0) for k in front)
    caps = sorted(steps)
    if len(caps) > most:
        caps = [caps[round(k * (len(caps) - 1) / (most - 1))] for k in range(most)]
    table: list[tuple[float, dict[str, int | None]]] = [(cap, {}) for cap in caps]
    for name in rows.names:
        rest = own.get(name, []), costs.get(name, []), values.get(name, [])
        found = best_within(rest[1], rest[2], info.lower_is_better, caps)
        for (_, best), k in zip(table, found, strict=True):
            best[name] = None if k is None else rest[0][k]
    return table


def guide_of(row: Row) -> Guide:
    """What a row's guidance depends on."""
    interval = row.get("interval")
    return (
        row["guidance"],
        row.get("scale"),
        row.get("guide_budget"),
        None if interval is None else tuple(interval),
        row.get("sampler"),
    )


def guide_name(guide: Guide) -> str:
    """A guide in words: 'cheap CFG 3, guide 1/16'."""
    kind, scale, budget, interval, _ = guide
    words = KINDS.get(kind, str(kind))
    words += f" {scale:g}" if is_number(scale) else ""
    words += f", guide {format_budget(budget)}" if is_number(budget) else ""
    if interval is not None and tuple(interval) != (0, 1):
        words += f", noise levels {interval[0]:g} to {interval[1]:g}"
    return words


def cost_chart(rows: Rows, score: str, info: ScoreInfo, cost: str) -> str | None:
    """A score against a cost, the Pareto front of each model joined; None without points."""
    points = rows.points(rows.scored(score), cost, score)
    if not points:
        return None
    fronts = []
    for name in rows.names:
        own = [point for point in points if rows.models[point[2]] == name]
        front = pareto_front([p[0] for p in own], [p[1] for p in own], info.lower_is_better)
        if front:
            colour = rows.colours[own[0][2]] if len(rows.names) > 1 else None
            best = [own[i] for i in front]
            fronts.append(Series(best, colour, line="front", dots=False))
    places = {point[2]: point for point in points}
    kinds = rows.grouped(places, lambda i: (rows.colours[i], rows.rows[i]["guidance"]))
    series = [Series([places[i] for i in own], *kind) for kind, own in kinds.items()]
    return chart(series + fronts, f"{COSTS[cost]} (log scale)", info.axis())


def steps_chart(rows: Rows, score: str, info: ScoreInfo, guide: Guide) -> str | None:
    """A score over the steps, a line for each budget, the full one strong."""
    own = [i for i in rows.scored(score) if guide_of(rows.rows[i]) == guide]
    series = []
    for (_, budget), members in rows.grouped(own, lambda i: _budget_of(rows, i)).items():
        points = rows.points(members, "steps", score)
        line = "strong" if budget == rows.budgets[-1] else "thin"
        label = f"budget {format_budget(budget)}"
        series.append(Series(points, rows.colours[members[0]], guide[0], line, label=label))
    if not series:
        return None
    steps = sorted({rows.rows[i]["steps"] for i in own})
    ticks = steps if len(steps) <= _MOST_TICKS else ()
    return chart(series, "steps (log scale)", info.axis(), x_ticks=ticks)


def budgets_chart(rows: Rows, score: str, info: ScoreInfo, guide: Guide) -> str | None:
    """Budget versus steps, the paper's figure: fewer latents or fewer steps, at the same cost.

    A thin line for each number of steps runs over the budgets; the strong one runs over the steps
    at full budget.
    """
    own = [i for i in rows.scored(score) if guide_of(rows.rows[i]) == guide]
    several, series = len(rows.names) > 1, []
    by_steps = rows.grouped(own, lambda i: (rows.models[i], rows.rows[i]["steps"]))
    for (_, steps), members in by_steps.items():
        points = rows.points(members, "gflops_per_image", score)
        colour = rows.colours[members[0]] if several else None
        if points:
            series.append(Series(points, colour, line="thin", dots=False, label=f"{steps} steps"))
    for (_, budget), members in rows.grouped(own, lambda i: _budget_of(rows, i)).items():
        points = rows.points(members, "gflops_per_image", score)
        line = "strong" if budget == rows.budgets[-1] else ""
        if points:
            series.append(Series(points, rows.colours[members[0]], guide[0], line))
    if not series:
        return None
    return chart(series, "GFLOPs per image (log scale)", info.axis())


def guidance_chart(rows: Rows, score: str, info: ScoreInfo, steps: int) -> str | None:
    """A score over the scale of guidance at one number of steps, a line for a guide and a budget.

    At scale 1 every guide is no guidance: there each line starts, if that was measured.
    """
    own = [i for i in rows.scored(score) if rows.rows[i]["steps"] == steps]
    plain = {_start_of(rows, i): i for i in own if rows.rows[i]["guidance"] == "none"}
    guided = [i for i in own if is_number(rows.rows[i].get("scale"))]
    lines = rows.grouped(guided, lambda i: (*_start_of(rows, i), _kind_of(rows.rows[i])))
    series, starts = [], set()
    for key, members in lines.items():
        start = plain.get(key[:3])
        points = sorted((rows.rows[i]["scale"], rows.score(i, score) or 0.0, i) for i in members)
        colour, kind = rows.colours[members[0]], key[3][0]
        joined, label = points, f"budget {format_budget(key[2])}"
        if start is not None and points[0][0] > 1:
            joined = [(1.0, rows.score(start, score) or 0.0, start), *points]
            starts.add(start)
        series.append(Series(joined, colour, kind, "thin dashed", dots=False, label=label))
        series.append(Series(points, colour, kind))
    for i in sorted(starts):
        series.append(Series([(1.0, rows.score(i, score) or 0.0, i)], rows.colours[i]))
    if not series:
        return None
    return chart(series, "guidance scale", info.axis(), log_x=False)


def guides_by_use(rows: Rows) -> list[Guide]:
    """Guides of at least two rows, those of the most rows first."""
    groups = rows.grouped(range(len(rows.rows)), lambda i: guide_of(rows.rows[i]))
    groups = {guide: own for guide, own in groups.items() if len(own) > 1}
    return sorted(groups, key=lambda guide: -len(groups[guide]))


def guided_steps(rows: Rows) -> list[int]:
    """Numbers of steps at which a scale was tried, most first."""
    return sorted({row["steps"] for row in rows.rows if is_number(row.get("scale"))}, reverse=True)


def _budget_of(rows: Rows, i: int) -> tuple[str, float]:
    return rows.models[i], rows.rows[i]["budget"]


def _start_of(rows: Rows, i: int) -> tuple[str, Any, float]:
    """What a guided row shares with the unguided one that it starts from."""
    return rows.models[i], rows.rows[i].get("sampler"), rows.rows[i]["budget"]


def _kind_of(row: Row) -> Guide:
    """The guide without its scale."""
    return tuple(part for k, part in enumerate(guide_of(row)) if k != 1)
