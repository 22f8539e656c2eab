"""Claims that samples decide, (d) guidance and (e) budget or steps; and (g), what is inside."""

from collections.abc import Sequence
from typing import Any

from elit.choosing.points import OperatingPoint
from elit.interface.budget import format_budget
from elit.reproduce.evidence import (
    FRECHET_AXIS,
    NOT_DEFINED,
    Claim,
    Finding,
    Row,
    Study,
    figure,
    in_words,
    less,
    series,
    with_error,
)
from elit.reproduce.pieces import Piece
from elit.reproduce.verdict import judge, mean

GUIDES = {"cfg": "CFG", "ag": "autoguidance", "ccfg": "cheap CFG"}
MARGIN = 0.05  # "as good": at most so much worse
LOSS_ONLY = "not measured at this scale: loss only"
INSIDE = "spearman_in_groups"  # Read's weights share out each group alike
OTHERS = "attention with the loss of other pictures"


# ---- (d): guidance ----


def guided(study: Study, name: str, scale: float) -> OperatingPoint:
    """A guide at full budget."""
    return OperatingPoint(1.0, study.scale.sampling_steps, name, scale)


def needs_d(study: Study) -> list[Piece]:
    """List what claim (d) trains and measures."""
    scales = study.scale.guidance_scales
    points = [guided(study, name, scale) for name in GUIDES for scale in scales]
    return study.draw("elit-mb", [study.unguided(), *points])


def best_scale(study: Study, name: str) -> OperatingPoint:
    """The point of a guide with the least mean distance."""
    points = [guided(study, name, scale) for scale in study.scale.guidance_scales]
    return min(points, key=lambda point: mean(study.scores(point)))


def find_d(study: Study) -> Finding:
    """Judge claim (d)."""
    if not study.scale.samples:
        return Finding(LOSS_ONLY, [Row("cheap CFG is as good as CFG", "-33 % FLOPs",
                                       "-", "-", note=LOSS_ONLY)])  # fmt: skip
    cfg, ag, ccfg = (best_scale(study, name) for name in GUIDES)
    flops = {p: mean(study.scores(p, "flops")) for p in (cfg, ag, ccfg, study.unguided())}
    best, cheap = study.scores(cfg), study.scores(ccfg)
    most = max(study.scale.guidance_scales)
    strong_cfg, strong_ag = guided(study, "cfg", most), guided(study, "ag", most)
    plain, right = (study.scores(p, "accuracy") for p in (study.unguided(), cfg))
    rows = [
        Row(
            f"cheap CFG is as good as CFG: at most {MARGIN:.0%} worse, each at its best scale",
            "as good or better",
            f"Frechet {with_error(cheap, 2)} at scale {ccfg.scale:g}",
            f"CFG: {with_error(best, 2)} at scale {cfg.scale:g}",
            judge(less([(1 + MARGIN) * value for value in best], cheap)),
        ),
        Row(
            "cheap CFG saves sampling FLOPs",
            "about 33 %",
            f"{1 - flops[ccfg] / flops[cfg]:.0%}",
            f"CFG: {flops[cfg] / 1e9:.2f} GFLOPs a picture",
            note="counted",
        ),
        Row(
            "guidance draws the wanted class more often (CFG at its best scale)",
            "-",
            f"accuracy {with_error(right, 3)}",
            f"no guidance: {with_error(plain, 3)}",
            judge(less(right, plain)),
        ),
        Row(
            f"autoguidance has the lower distance at a large scale ({most:g})",
            "best FID at large scales",
            f"Frechet {with_error(study.scores(strong_ag), 2)}",
            f"CFG: {with_error(study.scores(strong_cfg), 2)}",
            judge(less(study.scores(strong_cfg), study.scores(strong_ag))),
        ),
        Row(
            f"autoguidance is less true to the class ({most:g})",
            "weaker class alignment",
            f"accuracy {with_error(study.scores(strong_ag, 'accuracy'), 3)}",
            f"CFG: {with_error(study.scores(strong_cfg, 'accuracy'), 3)}",
            judge(less(*(study.scores(p, "accuracy") for p in (strong_cfg, strong_ag)))),
        ),
    ]
    return Finding(
        "Samples of ELIT-MB at full budget with each guide, numbers are guidance scales; bars are "
        "standard errors over seeds.",
        rows,
        [guidance_figure(study, "frechet", FRECHET_AXIS),
         guidance_figure(study, "accuracy", "accuracy (higher is better)")],
    )  # fmt: skip


def guidance_figure(study: Study, name: str, axis: str) -> dict[str, Any]:
    """A score over sampling FLOPs: a point for each scale, a series for each guide."""
    found = []
    for guide, title in {"none": "no guidance", **GUIDES}.items():
        points = [guided(study, guide, scale) for scale in study.scale.guidance_scales]
        points = [study.unguided()] if guide == "none" else points
        x = [mean(study.scores(p, "flops")) / 1e9 for p in points]
        found.append(series(title, x, [study.scores(p, name) for p in points]))
        found[-1]["texts"] = ["" if p.scale is None else f"{p.scale:g}" for p in points]
    title = f"(d) guidance: {'distance' if name == 'frechet' else 'accuracy'}"
    return figure("scatter", title, "sampling GFLOPs a picture", axis, series=found)


# ---- (e): budget or steps ----


def equal_points(study: Study, steps: int) -> dict[float, OperatingPoint]:
    """At each budget, the steps that cost what `steps` cost at full budget."""
    full = study.trainings.forward_flops("elit-mb", 1.0)
    points = {}
    for budget in study.scale.draw_budgets:
        cost = study.trainings.forward_flops("elit-mb", budget)
        points[budget] = OperatingPoint(budget, max(1, round(steps * full / cost)))
    return points


def needs_e(study: Study) -> list[Piece]:
    """List what claim (e) trains and measures."""
    rows = (equal_points(study, steps) for steps in study.scale.equal_steps)
    return study.draw("elit-mb", [point for row in rows for point in row.values()])


def over_targets(study: Study, points: Sequence[OperatingPoint], name: str) -> list[float]:
    """Mean of a score over some points, one for each seed."""
    columns = zip(*(study.scores(point, name) for point in points), strict=True)
    return [mean(column) for column in columns]


def apart(study: Study, one: OperatingPoint, other: OperatingPoint) -> float:
    """How far from equal the FLOPs of two points are, as a share."""
    return abs(mean(study.scores(one, "flops")) / mean(study.scores(other, "flops")) - 1)


def find_e(study: Study) -> Finding:
    """Judge claim (e)."""
    claim = "at equal sampling FLOPs, fewer latents are better than fewer steps"
    if not study.scale.samples:
        return Finding(LOSS_ONLY, [Row(claim, "so at all FLOPs", "-", "-", note=LOSS_ONLY)])
    targets = {steps: equal_points(study, steps) for steps in study.scale.equal_steps}
    full, *lower = study.scale.draw_budgets
    real = study.real(next(iter(targets.values()))[full])
    rows = []
    for budget in lower:
        found, control, right, control_right = (
            over_targets(study, [points[b] for points in targets.values()], name)
            for name in ("frechet", "accuracy")
            for b in (budget, full)
        )
        off = max(apart(study, points[budget], points[full]) for points in targets.values())
        rows.append(
            Row(
                f"{claim} (budget {format_budget(budget)}, mean over "
                f"{', '.join(map(str, targets))} full steps' FLOPs)",
                "fewer latents beat fewer steps",
                f"{in_words(found, right)}; FLOPs equal within {off:.1%}",
                f"budget 1: {in_words(control, control_right)}; {real}",
                judge(less(control, found)),
            )
        )
    lines = []
    for budget in study.scale.draw_budgets:
        points = [row[budget] for row in targets.values()]
        x = [mean(study.scores(point, "flops")) / 1e9 for point in points]
        lines.append(
            series(f"budget {format_budget(budget)}", x, [study.scores(p) for p in points])
        )
        lines[-1]["texts"] = [str(point.steps) for point in points]
    shown = figure(
        "lines", "(e) budget or steps", "sampling GFLOPs a picture", FRECHET_AXIS, series=lines,
        log_x=True, log_y=True,
    )  # fmt: skip
    return Finding(
        "ELIT-MB without guidance, each line a budget, numbers are steps: at the same abscissa "
        "the same FLOPs; bars are standard errors over seeds.",
        rows,
        [shown],
    )


# ---- (g): Read's attention ----


def needs_g(study: Study) -> list[Piece]:
    """List what claim (g) trains and measures."""
    trainings = [study.training("elit-mb", seed) for seed in study.seeds()]
    return study.train(["elit-mb"]) + [study.pieces.look(training) for training in trainings]


def find_g(study: Study) -> Finding:
    """Judge claim (g)."""
    looks = [study.of(study.pieces.look(study.training("elit-mb", s))) for s in study.seeds()]
    rows, found, controls, places = [], [], [], []
    for i, sigma in enumerate(study.scale.sigmas):
        at_level = [(look["levels"][i].get(INSIDE) or {}) for look in looks]
        sound = [x for x in at_level if None not in (x.get("value"), x.get("shuffled"))]
        what = f"within a group, Read attends where the loss is high (noise level {sigma:g})"
        paper = "high where the loss is high, shown in pictures"
        if not sound:
            rows.append(Row(what, paper, "-", "-", note=NOT_DEFINED))
            continue
        places.append(i)
        found.append([x["value"] for x in sound])
        controls.append([x["shuffled"] for x in sound])
        count = "" if len(sound) == len(looks) else f" (of {len(sound)} of {len(looks)} seeds)"
        rows.append(
            Row(
                what,
                paper,
                f"rank correlation {with_error(found[-1], 3)}{count}",
                f"{OTHERS}: {with_error(controls[-1], 3)}",
                judge(less(found[-1], controls[-1])),
            )
        )
    shown = figure(
        "bars", "(g) Read's attention and the loss", "noise level", "rank correlation",
        names=[f"{sigma:g}" for sigma in study.scale.sigmas], zero=True,
        series=[series("attention with the loss", places, found), series(OTHERS, places, controls)],
    )  # fmt: skip
    return Finding(
        f"Rank correlation of Read's weights with the loss of the same picture's tokens, within "
        f"groups, and the control: {OTHERS}; bars are standard errors over seeds.",
        rows,
        [shown] if places else [],
    )


SAMPLE_CLAIMS = [
    Claim("d", "cheap CFG saves a third and is as good", needs_d, find_d),
    Claim("e", "at equal sampling FLOPs, fewer latents beat fewer steps", needs_e, find_e),
    Claim("g", "Read attends where the loss is", needs_g, find_g),
]
