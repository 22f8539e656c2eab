"""Claims of loss about latents, tokens and groups: (c) order, (f) spread pictures, (h) groups."""

from fractions import Fraction

from elit.reproduce.evidence import (
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
from elit.reproduce.verdict import judge, mean

QUARTER = "1/4"
NOTHING = 0.01  # gains less than this share of the loss


# ---- (c): order of the latents ----


def needs_c(study: Study) -> list[Piece]:
    """List what claim (c) trains and measures."""
    return study.train(["elit-mb", "elit-mb-random"])


def find_c(study: Study) -> Finding:
    """Judge claim (c)."""
    low = [budget for budget in study.budgets("elit-mb") if budget != "1"]
    quarter = QUARTER if QUARTER in low else low[-1]
    first = study.losses("elit-mb", quarter)
    anyone = study.losses("elit-mb", quarter, random=True)
    rows = [
        Row(
            f"the first latents are worth more than random ones of the same model (at {quarter})",
            "early latents carry global structure",
            f"first: {with_error(first)}",
            f"random: {with_error(anyone)}",
            judge(less(anyone, first)),
        )
    ]
    for budget, paper in (("1", "FID 26.6 against 27.0"), (quarter, "FID 36.3 against 38.6")):
        tail, other = study.losses("elit-mb", budget), study.losses("elit-mb-random", budget)
        rows.append(
            Row(
                f"dropping the tail in training is better than dropping at random (at {budget})",
                paper,
                f"tail: {with_error(tail)}",
                f"random: {with_error(other)}",
                judge(less(other, tail)),
            )
        )
    x = [float(Fraction(budget)) for budget in low]
    lines = [
        series("first latents", x, [study.losses("elit-mb", b) for b in low]),
        series("random latents", x, [study.losses("elit-mb", b, random=True) for b in low]),
        series("trained with random dropping", x, [study.losses("elit-mb-random", b) for b in low]),
    ]
    sentence = (
        "ELIT-MB with its first latents and with random ones, and a model trained with random "
        "dropping; bars are standard errors over seeds."
    )
    shown = figure(
        "lines", "(c) first or random latents", "budget (share of the latents kept)", LOSS_AXIS,
        series=lines, budgets=True,
    )  # fmt: skip
    return Finding(sentence, rows, [shown])


# ---- (f): padding ----

SPREAD = ("dit", "spread-dit", "elit", "spread-elit")


def needs_f(study: Study) -> list[Piece]:
    """List what claim (f) trains and measures."""
    return study.train(SPREAD, few=True, steps=study.scale.spread_steps)


def find_f(study: Study) -> Finding:
    """Judge claim (f)."""
    steps = study.scale.spread_steps
    dit, wide_dit, elit, wide = (study.losses(v, few=True, steps=steps) for v in SPREAD)
    gains, control = less(elit, wide), less(dit, wide_dit)
    costs = [study.training(variant, 0, steps=steps).step_flops for variant in SPREAD]
    what = f"at {steps} steps each"
    rows = [
        Row(
            f"spread among zero tokens, ELIT gains ({what})",
            "more tokens become quality",
            f"loss {with_error(elit)} -> {with_error(wide)} for {costs[3] / costs[2]:.1f}x the "
            f"FLOPs",
            f"DiT: {with_error(dit)} -> {with_error(wide_dit)} for {costs[1] / costs[0]:.1f}x",
            judge(gains),
        ),
        Row(
            f"ELIT gains more by it than the DiT ({what})",
            "DiT: nothing for 4x the FLOPs",
            f"gain {with_error(gains)}",
            f"DiT's gain: {with_error(control)}",
            judge(less(gains, control)),
        ),
        Row(
            f"the DiT gains nothing by it: at most {NOTHING:.0%} ({what})",
            "DiT: nothing for 4x the FLOPs",
            f"gain {with_error(control)} ({mean(control) / mean(dit):+.1%})",
            f"DiT as it is: {with_error(dit)}",
            judge(less([NOTHING * value for value in dit], control)),
        ),
    ]
    groups = ["DiT", "ELIT"]
    bars = [
        series("as it is", [0, 1], [dit, elit]), series("spread", [0, 1], [wide_dit, wide])
    ]  # fmt: skip
    sentence = (
        f"Each picture as it is, and spread among zero tokens (4x the tokens), {steps} steps each; "
        f"bars are standard errors over seeds."
    )
    shown = figure("bars", "(f) spread among zeros", "model", LOSS_AXIS, series=bars, names=groups)
    return Finding(sentence, rows, [shown])


# ---- (h): sizes of groups ----

GROUPS = ("elit-1x1", "elit-2x2", "elit", "elit-whole")


def needs_h(study: Study) -> list[Piece]:
    """List what claim (h) trains and measures."""
    return study.train(GROUPS, few=True)


def find_h(study: Study) -> Finding:
    """Judge claim (h)."""
    side, tokens = study.scale.group, study.scale.tokens
    names = ["1x1", "2x2", f"{side}x{side}", f"{tokens}x{tokens} (whole)"]
    losses = [study.losses(variant, few=True) for variant in GROUPS]
    best = losses[2]
    rows = [
        Row(
            f"groups of {names[2]} are better than {name}",
            "4x4 of 16x16 tokens is best; 1x1 and the whole picture are worse",
            f"{names[2]}: {with_error(best)}",
            f"{name}: {with_error(loss)}",
            judge(less(loss, best)),
        )
        for name, loss in zip(names, losses, strict=True)
        if loss is not best
    ]
    pairs = [point(loss) for loss in losses]
    low, high = min(y - e for y, e in pairs), max(y + e for y, e in pairs)
    shown = figure(
        "points", f"(h) tokens of a group, of {tokens}x{tokens}", "group", LOSS_AXIS, names=names,
        series=[series("ELIT, equal training FLOPs", range(len(names)), losses)],
        bottom=low - 0.2 * (high - low), top=high + 0.2 * (high - low),
    )  # fmt: skip
    sentence = (
        "Single-budget models of equal training FLOPs by the tokens of a group; bars are standard "
        "errors over seeds."
    )
    return Finding(sentence, rows, [shown])


LATENT_CLAIMS = [
    Claim("c", "latents are ordered by importance", needs_c, find_c),
    Claim("f", "ELIT makes use of tokens that a DiT wastes", needs_f, find_f),
    Claim("h", "groups of middle size are best", needs_h, find_h),
]
