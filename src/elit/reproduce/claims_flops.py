"""Claims of loss at equal FLOPs and over budgets: (a), (b), and (i), the same with a U-ViT."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from elit.interface.budget import format_budget
from elit.reproduce.evidence import (
    FRECHET_AXIS,
    LOSS_AXIS,
    Claim,
    Finding,
    Row,
    Study,
    figure,
    less,
    point,
    series,
    with_error,
)
from elit.reproduce.pieces import Piece
from elit.reproduce.scales import Size
from elit.reproduce.verdict import FAILS, HOLDS, UNDECIDED, Verdict, judge, judge_order, mean

BACKBONES = {"dit": ("dit", "elit", "elit-mb"), "uvit": ("uvit", "elit-uvit", "elit-uvit-mb")}
SAME = 0.01  # "as good" of losses: at most so much worse
ORDERED = "the lowest budget is worse than the full one, none is better than the next larger one"


# ---- (a) and (i): equal training FLOPs ----


def equal_flops_rows(
    study: Study, backbone: str, few: bool, size: Size, paper: Sequence[str]
) -> list[Row]:
    """The elastic forms against the plain one."""
    plain, *elastic = BACKBONES[backbone]
    base = study.losses(plain, few=few, size=size)
    rows = []
    for variant, figures in zip(elastic, paper, strict=True):
        found = study.losses(variant, few=few, size=size)
        gain = mean(less(base, found)) / mean(base)
        rows.append(
            Row(
                f"{study.title(variant)} is better than {study.title(plain)} at equal training "
                f"FLOPs ({size.name})",
                figures,
                f"loss {with_error(found)} ({-100 * gain:+.1f} %)",
                f"{study.title(plain)}: {with_error(base)}",
                judge(less(base, found)),
            )
        )
    return rows


def flops_to_reach(study: Study, size: Size) -> tuple[list[float], int]:
    """Share of the DiT's training FLOPs at which ELIT-MB has its final loss; how many do.

    The share of a seed that never has it is 1, though it would be more.
    """
    shares, reached = [], 0
    plains = study.train(["dit"], size=size)
    for plain, elastic in zip(plains, study.train(["elit-mb"], size=size), strict=True):
        goal = study.of(plain)["curve"][-1][1]
        step = first_below(study.of(elastic)["curve"], goal)
        reached += step is not None
        cost = plain.training.flops if step is None else step * elastic.training.step_flops
        shares.append(cost / plain.training.flops)
    return shares, reached


def judge_reach(shares: Sequence[float], reached: int) -> Verdict:
    """Judge shares of which some may be of seeds that never reach the goal."""
    found = judge([1 - share for share in shares])
    if reached == 0 and len(shares) > 1:
        return replace(found, word=FAILS)
    if reached < len(shares) and found.word == HOLDS:
        return replace(found, word=UNDECIDED)
    return found


def reach_row(study: Study, size: Size) -> Row:
    """The DiT's final loss for fewer FLOPs."""
    shares, reached = flops_to_reach(study, size)
    least = "" if reached == len(shares) else "at least "
    share = with_error(shares, 2) if reached else "1"
    return Row(
        f"ELIT-MB reaches the DiT's final loss with fewer training FLOPs ({size.name})",
        "3.3x to 4.0x fewer steps (FDD), a share of 0.25 to 0.30",
        f"share {least}{share}; reached by {reached} of {len(shares)} seeds",
        "DiT: 1 (the cosine schedule gains most at the end of each run, the paper's rate "
        "is constant: shares are nearer to 1 here)",
        judge_reach(shares, reached),
    )


def first_below(curve: Sequence[Sequence[float]], goal: float) -> float | None:
    """Step at which a curve first is at `goal` or below, between its points on straight lines."""
    before = None
    for step, loss in curve:
        if loss <= goal:
            if before is None or before[1] == loss:
                return step
            return before[0] + (step - before[0]) * (before[1] - goal) / (before[1] - loss)
        before = step, loss
    return None


def curves(study: Study, size: Size) -> dict[str, Any]:
    """Held-out loss over training FLOPs."""
    lines, least, early = [], float("inf"), 0.0
    for variant in BACKBONES["dit"]:
        pieces = study.train([variant], size=size)
        found = [study.of(piece)["curve"] for piece in pieces]
        steps = [step for step, _ in found[0]]
        rows = [[curve[i][1] for curve in found] for i in range(len(steps))]
        cost = pieces[0].training.step_flops / 1e12
        lines.append(series(study.title(variant), [step * cost for step in steps], rows))
        values = lines[-1]["y"]
        least, early = min(least, *values), max(early, values[len(values) // 4])
    return figure(
        "lines", f"(a) loss over training, {size.name}", "training TFLOPs", LOSS_AXIS,
        series=lines, bands=True, top=early, bottom=least - 0.05 * (early - least),
    )  # fmt: skip


def needs_a(study: Study) -> list[Piece]:
    """List what claim (a) trains and measures."""
    trainings = [p for size in study.scale.sizes for p in study.train(BACKBONES["dit"], size=size)]
    points = [study.unguided()]
    return trainings + study.draw("dit", points) + study.draw("elit-mb", points)


def find_a(study: Study) -> Finding:
    """Judge claim (a)."""
    rows = []
    for size in study.scale.sizes:
        paper = ("FID 13.0 -> 8.2 (256 px)", "FID 13.0 -> 7.8 (256 px)")
        rows += equal_flops_rows(study, "dit", False, size, paper)
        rows.append(reach_row(study, size))
    if study.scale.samples:
        drawn, base = (study.scores(study.unguided(), variant=v) for v in ("elit-mb", "dit"))
        rows.append(
            Row(
                "ELIT-MB's samples are nearer to real ones than DiT's at equal training FLOPs",
                "FID 13.0 -> 7.8 (256 px)",
                study.drawn(study.unguided()),
                f"DiT: {study.drawn(study.unguided(), 'dit')}; {study.real(study.unguided())}",
                judge(less(base, drawn)),
            )
        )
    sentence = (
        "Held-out loss at full budget over training FLOPs, bands are standard errors over seeds: "
        "the lower curve gets more out of the same compute."
    )
    return Finding(sentence, rows, [curves(study, size) for size in study.scale.sizes])


# ---- (b): budgets ----


def ladder_rows(
    study: Study, backbone: str, few: bool = False, size: Size | None = None
) -> list[Row]:
    """Loss by budget, of training at all budgets and at one."""
    _, single, multi = BACKBONES[backbone]
    budgets = study.budgets(multi, size)
    first, last = budgets[0], budgets[-1]
    rows = [study.losses(multi, budget, few, size) for budget in budgets]
    rise = less(rows[-1], rows[0])
    alone = less(study.losses(single, last, few, size), study.losses(single, first, few, size))
    name = study.title(multi) + ("" if size is None else f" ({size.name})")
    listed = listed_by_budget(budgets, rows, 4)
    return [
        Row(
            f"{name}, loss: {ORDERED}",
            "FID rises smoothly from full budget to 1/16",
            listed,
            f"from {first} to {last}: {with_error(rise)} ({mean(rise) / mean(rows[0]):+.1%})",
            judge_order(rows),
        ),
        Row(
            f"trained at full budget alone, {study.title(single)} collapses at low budgets",
            "only multi-budget training serves all budgets",
            f"from {first} to {last}: {with_error(alone)}",
            f"{name}: {with_error(rise)}",
            judge(less(alone, rise)),
        ),
    ]


def listed_by_budget(budgets: Sequence[str], rows: Sequence[Sequence[float]], digits: int) -> str:
    """Means over seeds, behind their budgets."""
    pairs = zip(budgets, rows, strict=True)
    return ", ".join(f"{budget}: {mean(row):.{digits}f}" for budget, row in pairs)


def same_steps_row(study: Study) -> Row:
    """A single budget for as many steps, at more FLOPs: what serving all budgets costs."""
    steps = study.training("elit-mb", 0).steps
    alone, both = study.losses("elit", steps=steps), study.losses("elit-mb")
    return Row(
        f"at equal steps ({steps}), so for more FLOPs, ELIT at full budget alone is as good as "
        f"ELIT-MB: at most {SAME:.0%} worse",
        "-",
        f"ELIT: {with_error(alone)}",
        f"ELIT-MB: {with_error(both)}",
        judge(less([(1 + SAME) * value for value in both], alone)),
    )


def drawn_budgets(study: Study) -> list[float]:
    """Budgets at which samples are judged."""
    return study.trainings.measured_budgets("elit-mb", study.scale.group)


def samples_row(study: Study) -> Row:
    """Distance of samples by budget."""
    budgets = drawn_budgets(study)
    points, names = [study.unguided(b) for b in budgets], [format_budget(b) for b in budgets]
    rows = [study.scores(point) for point in points]
    right = [study.scores(point, "accuracy") for point in points]
    return Row(
        f"ELIT-MB, distance of samples: {ORDERED}",
        "FID rises smoothly from full budget to 1/16",
        f"Frechet {listed_by_budget(names, rows, 2)}; accuracy {listed_by_budget(names, right, 3)}",
        f"from 1 to {names[-1]}: {with_error(less(rows[-1], rows[0]), 2)}; {study.real(points[0])}",
        judge_order(rows),
    )


def ladder(study: Study, backbone: str, letter: str, few: bool = False) -> dict[str, Any]:
    """Loss over budgets."""
    lines = []
    for variant in BACKBONES[backbone][1:]:
        budgets = study.budgets(variant)
        rows = [study.losses(variant, budget, few) for budget in budgets]
        lines.append(series(study.title(variant), [float(Fraction(b)) for b in budgets], rows))
    shown = [*lines[1]["y"], lines[0]["y"][0]]  # the other model leaves the frame
    least, most = min(shown), max(shown)
    return figure(
        "lines", f"({letter}) loss over budgets", "budget (share of the latents kept)", LOSS_AXIS,
        series=lines, budgets=True, top=most + 1.5 * (most - least),
    )  # fmt: skip


def needs_b(study: Study) -> list[Piece]:
    """List what claim (b) trains and measures."""
    trainings = [
        p for size in study.scale.sizes for p in study.train(["elit", "elit-mb"], size=size)
    ]
    trainings += study.train(["elit"], steps=study.training("elit-mb", 0).steps)
    points = [study.unguided(budget) for budget in drawn_budgets(study)]
    return trainings + study.draw("elit-mb", points) + study.draw("dit", points[:1])


def find_b(study: Study) -> Finding:
    """Judge claim (b)."""
    sentence = (
        "One multi-budget model at every budget, beside one trained at full budget alone (cut off "
        "where it leaves the frame); bars are standard errors over seeds."
    )
    rows = [row for size in study.scale.sizes for row in ladder_rows(study, "dit", size=size)]
    rows.append(same_steps_row(study))
    shown = [ladder(study, "dit", "b")]
    if study.scale.samples:
        rows.append(samples_row(study))
        budgets = drawn_budgets(study)
        found = [study.scores(study.unguided(budget)) for budget in budgets]
        plain = study.scores(study.unguided(), variant="dit")
        lines = [series("ELIT-MB", budgets, found), series("DiT", [1.0], [plain])]
        shown.append(
            figure(
                "lines", "(b) distance over budgets", "budget (share of the latents kept)",
                FRECHET_AXIS, series=lines, budgets=True, log_y=True,
            )
        )  # fmt: skip
    return Finding(sentence, rows, shown)


# ---- (i): another backbone ----


def needs_i(study: Study) -> list[Piece]:
    """List what claim (i) trains and measures."""
    return study.train(BACKBONES["uvit"], few=True)


def find_i(study: Study) -> Finding:
    """Judge claim (i)."""
    size = study.scale.sizes[0]
    paper = ("FID 8.3 -> 7.5 (256 px)", "FID 8.3 -> 7.1 (256 px)")
    rows = equal_flops_rows(study, "uvit", True, size, paper)
    rows += ladder_rows(study, "uvit", few=True)
    shown = ladder(study, "uvit", "i", few=True)
    plain = point(study.losses("uvit", few=True))
    shown["series"].append({"label": "U-ViT", "x": [1.0], "y": [plain[0]], "error": [plain[1]]})
    shown["title"] = "(i) U-ViT: loss over budgets"
    sentence = (
        "The same as (a) and (b) with a U-ViT, whose long skips tie early blocks to late ones; "
        "bars are standard errors over seeds."
    )
    return Finding(sentence, rows, [shown])


FLOPS_CLAIMS = [
    Claim("a", "ELIT is better than DiT at equal training FLOPs", needs_a, find_a),
    Claim("b", "quality falls smoothly with the budget", needs_b, find_b),
    Claim("i", "another backbone gains alike: U-ViT", needs_i, find_i),
]
