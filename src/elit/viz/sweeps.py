"""What the report of a sweep says: its rows, scores, the best at each cost, its facts in words."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from elit._pareto import best_within, is_number, pareto_front
from elit._tables import counted, in_units
from elit.interface.budget import format_budget

Row = dict[str, Any]
Guide = tuple[Any, ...]
Point = tuple[float, float, int]  # x, score, row
Item = TypeVar("Item")

GUIDES = {"none": "no guidance", "cfg": "CFG", "ag": "autoguidance", "ccfg": "cheap CFG"}
KINDS = GUIDES | {
    "planned": "budgets over the steps", "cached": "step cache",
    "both": "budgets over the steps and step cache",
}  # fmt: skip
_LABELS = {
    "path": "model", "max_latents": "latents per group", "eight_bit": "images rounded to 8 bit",
    "vae": "VAE", "dtype": "precision", "device_name": "device's name",
}  # fmt: skip


@dataclass(frozen=True)
class ScoreInfo:
    """What a score is called, and whether lower is better."""

    title: str
    lower_is_better: bool

    def axis(self) -> str:
        """Title with its direction."""
        return f"{self.title}, {'lower' if self.lower_is_better else 'higher'} is better"

    def column(self) -> str:
        """Title with an arrow for its direction."""
        return f"{self.title} {'↓' if self.lower_is_better else '↑'}"


# In the order that tables show them.
SCORES = {
    "fid": ScoreInfo("FID", True),
    "sfid": ScoreInfo("sFID", True),
    "fdd": ScoreInfo("FDD (DINOv2)", True),
    "fd": ScoreInfo("Frechet distance (own network)", True),  # neither Inception nor DINOv2
    "kid": ScoreInfo("KID", True),
    "fvd": ScoreInfo("FVD", True),
    "is": ScoreInfo("Inception Score", False),
    "precision": ScoreInfo("precision", False),
    "recall": ScoreInfo("recall", False),
    "density": ScoreInfo("density", False),
    "coverage": ScoreInfo("coverage", False),
    "clip": ScoreInfo("CLIP score", False),
    "accuracy": ScoreInfo("classifier accuracy", False),
}


class Rows:
    """The rows of one or more reports.

    A row's number is its place in all of them. Colours are numbers: of the rows' budgets, or of
    their models where there are several.
    """

    def __init__(self, reports: Mapping[str, Mapping[str, Any]]):
        pairs = [(name, row) for name, report in reports.items() for row in report["rows"]]
        if not pairs:
            raise ValueError("nothing to show: the sweep has no rows; run `elit sweep` first")
        self.rows: list[Row] = [row for _, row in pairs]
        self.names, self.models = list(reports), [name for name, _ in pairs]  # of the reports, rows
        self.kinds = list(map(kind_of, self.rows))
        # those of one budget for all steps, without a step cache
        self.plain = [i for i, row in enumerate(self.rows) if self.kinds[i] == row["guidance"]]
        of = self.plain or range(len(self.rows))
        self.budgets = sorted({self.rows[i]["budget"] for i in of})
        by_model = [self.names.index(name) for name in self.models]
        # of budgets over the steps, the nearest to their mean
        near = [[abs(row["budget"] - budget) for budget in self.budgets] for row in self.rows]
        by_budget = [distances.index(min(distances)) for distances in near]
        self.colours = by_model if len(self.names) > 1 else by_budget

    def of(self, number: int, key: str) -> tuple[str, Any]:
        """The model of a row, and something of the row."""
        return self.models[number], self.rows[number][key]

    def score(self, number: int, name: str) -> float | None:
        """A score of a row; None where it has none."""
        value = self.rows[number]["scores"].get(name)
        return float(value) if is_number(value) else None

    def error(self, number: int, name: str) -> float:
        """Of a Frechet distance the standard error; the standard deviation over parts of the
        samples, where a score is their mean; else 0.
        """
        value = (self.rows[number].get("deviations") or {}).get(name)
        return float(value) if is_number(value) else 0.0

    def told_apart(self, name: str) -> bool:
        """Whether the best of all is better than the second by its `error` or more.

        A distance that is estimated as 0 or less is not told from 0.
        """
        lower = SCORES[name].lower_is_better
        if lower and (self.best(self.scored(name), name) or 0) <= 0:
            return False
        values = [(self.score(i, name) or 0.0, i) for i in self.scored(name)]
        if len(values) < 2:
            return True
        (best, first), (second, _) = sorted(values, reverse=not lower)[:2]
        return abs(best - second) >= self.error(first, name)

    def scored(self, name: str) -> list[int]:
        """Rows that have the score."""
        return [i for i in range(len(self.rows)) if self.score(i, name) is not None]

    def best(self, numbers: Iterable[int], name: str) -> float | None:
        """The best score of some rows that have it; None of none."""
        best = min if SCORES[name].lower_is_better else max
        return best(filter(is_number, (self.score(i, name) for i in numbers)), default=None)

    def points(self, rows: Iterable[int], x: str, score: str) -> list[Point]:
        """Points by x, of the rows that have both and x above 0."""
        points = ((self.rows[i].get(x), self.score(i, score), i) for i in rows)
        return sorted(
            (float(x), y, i) for x, y, i in points if is_number(x) and x > 0 and y is not None
        )

    def guides(self) -> list[Guide]:
        """Guides of at least two plain rows, those of the most rows first."""
        groups = grouped(self.plain, lambda i: guide_of(self.rows[i]))
        often = [guide for guide, own in groups.items() if len(own) > 1]
        return sorted(often, key=lambda guide: -len(groups[guide]))


def kind_of(row: Row) -> str:
    """What of a row its mark shows: a key of KINDS, or an unknown guidance."""
    planned, cached = (row.get(name) is not None for name in ("budgets_of_steps", "cache"))
    if planned or cached:
        return "both" if planned and cached else "planned" if planned else "cached"
    return str(row["guidance"])


def cache_name(row: Row) -> str | None:
    """The step cache of a row in words, None where it has none."""
    return row.get("cache") and f"{row['cache']['kind']} {row['cache']['threshold']:.3g}"


def grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> dict[Any, list[Item]]:
    """Items of each key, keys in the order of their first items."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def best_at_costs(
    rows: Rows, score: str, most: int = 12
) -> list[tuple[float, dict[str, int | None]]]:
    """GFLOPs per image, and the row of each model that is best at or below them.

    The costs are those at which a front has a step: at most so many, evenly chosen, the lowest and
    the highest among them. Rows are None where a model has none.
    """
    own = {n: [i for i, model in enumerate(rows.models) if model == n] for n in rows.names}
    costs = {n: [rows.rows[i].get("gflops_per_image") for i in own[n]] for n in own}
    values = {n: [rows.score(i, score) for i in own[n]] for n in own}
    lower_is_better = SCORES[score].lower_is_better
    fronts = {n: pareto_front(costs[n], values[n], lower_is_better) for n in own}
    caps = sorted({float(costs[n][k] or 0) for n in own for k in fronts[n]})
    if len(caps) > most:
        caps = [caps[round(k * (len(caps) - 1) / (most - 1))] for k in range(most)]
    best = {n: best_within(costs[n], values[n], lower_is_better, caps) for n in own}
    places = {n: [None if k is None else own[n][k] for k in best[n]] for n in own}
    return [(cap, {n: places[n][i] for n in own}) for i, cap in enumerate(caps)]


def guide_of(row: Row) -> Guide:
    """What a row's guidance depends on."""
    interval = None if row.get("interval") is None else tuple(row["interval"])
    return row["guidance"], row.get("scale"), row.get("guide_budget"), interval, row.get("sampler")


def guide_name(guide: Guide) -> str:
    """A guide in words: 'cheap CFG 3, guide 1/16'."""
    kind, scale, budget, interval, _ = guide
    words = GUIDES.get(kind, str(kind))
    words += f" {scale:g}" if is_number(scale) else ""
    words += f", guide {format_budget(budget)}" if is_number(budget) else ""
    if interval is not None and tuple(interval) != (0, 1):
        words += f", noise levels {interval[0]:g} to {interval[1]:g}"
    return words


def in_words(row: Row) -> str:
    """How a row was drawn: 'budget 1/4, 20 steps, cheap CFG 3, guide 1/16'."""
    guide = guide_name(guide_of(row))
    mean = " on average" if row.get("budgets_of_steps") else ""
    cache = f", {cache_name(row)}" if row.get("cache") else ""
    steps = counted(row["steps"], "step")
    return f"budget {format_budget(row['budget'])}{mean}, {steps}, {guide}{cache}"


def within_caps(rows: Rows) -> dict[str, list[tuple[int, str]]]:
    """Rows that searches found within each cap, and their ways, by the caps in words."""
    found: dict[str, list[tuple[int, str]]] = {}
    for i, row in enumerate(rows.rows):
        for one in row.get("searches") or ():
            for name, (size, unit) in {"max_flops": (1e9, "GFLOPs"), "max_ms": (1, "ms")}.items():
                if is_number(cap := one.get(name)):
                    found.setdefault(f"{cap / size:.4g} {unit}", []).append((i, one["way"]))
    return found


def facts_of(report: Mapping[str, Any]) -> dict[str, str]:
    """All facts of a report's model and settings, by what they are called, in its order."""
    return {
        _LABELS.get(key, key.replace("_", " ")): _text(value, key)
        for part in ("model", "settings")
        for key, value in report.get(part, {}).items()
    }


def stamp(report: Mapping[str, Any]) -> str:
    """What any of a report's scores must be read with, in a line."""
    settings = report.get("settings", {})
    reference = settings.get("reference")
    networks = [str(network.get("name")) for network in settings.get("networks", ())]
    parts = [
        f"{settings.get('samples', '?')} samples",
        f"seed {settings.get('seed', '?')}",
        str(settings.get("drawn") or ""),
        f"against {_text(reference, 'reference')}" if reference else "no reference",
        f"networks: {', '.join(networks)}" if networks else "",
        _text(settings["size"], "size") + " px" if settings.get("size") else "",
        "8 bit" if settings.get("eight_bit") else "",
        *(str(settings[key]) for key in ("sampler", "dtype", "device") if settings.get(key)),
    ]
    return ", ".join(filter(None, parts))


def training_flops(report: Mapping[str, Any]) -> str:
    """How much a model was trained, in words."""
    training = report.get("model", {}).get("training") or {}
    eflops, steps = training.get("eflops"), training.get("steps")
    if not is_number(eflops):
        return "training FLOPs not known"
    spent = in_units(1e18 * eflops, "FLOPs")
    return f"trained with {spent}" + (f" in {counted(steps, 'step')}" if steps else "")


def _text(value: Any, key: str = "") -> str:
    """Plain types as a person writes them."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if key == "size" and isinstance(value, list | tuple):
        return "x".join(map(str, value))
    if key == "reference" and isinstance(value, Mapping):
        count = f"{value['images']} images" if value.get("images") else ""
        details = ", ".join(filter(None, [count, str(value.get("digest") or "")]))
        return str(value.get("name", "?")) + (f" ({details})" if details else "")
    if isinstance(value, Mapping):
        return ", ".join(f"{k.replace('_', ' ')} {_text(v, k)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(_text(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
