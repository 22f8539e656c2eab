"""The paper's claims, (a) to (i): what each trains and draws, its rows, its figures.

A row has the claim, the paper's figure, what is found here, what that is held against, and the
verdict on a difference, seed by seed, that is above 0 where the claim holds. Less loss and less
distance are better.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from elit.choosing.points import OperatingPoint
from elit.interface.budget import format_budget
from elit.reproduce.evidence import (
    NOT_DEFINED,
    Claim,
    Figure,
    Models,
    Row,
    Study,
    Values,
    figure,
    judge,
    judge_order,
    judge_reach,
    series,
)

SAME = 0.01  # "as good" and "nothing" of losses: at most such a share of them
MARGIN = 0.05  # "as good" of distances: at most so much worse
ORDERED = "the lowest budget is worse than the full one, none is better than the next larger one"
SMOOTHLY = "FID rises smoothly from full budget to 1/16"
FEWER = "at equal sampling FLOPs, fewer latents are better than fewer steps"
LOSS_AXIS = "held-out loss (lower is better)"
FRECHET_AXIS = "Frechet distance (lower is better)"
BUDGET_AXIS = "budget (share of the latents kept)"
SAMPLING_AXIS = "sampling GFLOPs a picture"
Told = Iterator[Row | Figure]

CLAIMS: dict[str, Claim] = {}


def claim(letter: str, title: str, sentence: str, *trains: str, **more: Any) -> Callable:
    """Make a function of a study and of the models trained that tells rows and figures a claim."""

    def add(tell: Callable[..., Told]) -> Callable[..., Told]:
        CLAIMS[letter] = Claim(letter, title, sentence, trains, tell, **more)
        return tell

    return add


@claim(
    "a", "ELIT is better than DiT at equal training FLOPs",
    "Held-out loss at full budget over training FLOPs, bands are standard errors over seeds: the "
    "lower curve gets more out of the same compute.",
    "dit", "elit", "elit-mb", all_sizes=True,
    also=lambda study: [
        *study.samples("elit-mb", study.unguided()), *study.samples("dit", study.unguided())
    ],
)  # fmt: skip
def equal_training_flops(study: Study, dit: Models, elit: Models, multi: Models) -> Told:
    """Three forms of one backbone, trained for as many FLOPs."""
    point = study.unguided()
    for size in study.scale.sizes:
        forms = [form.at(size) for form in (dit, elit, multi)]
        yield better_at_equal_flops(forms[1], forms[0], "FID 13.0 -> 8.2 (256 px)")
        yield better_at_equal_flops(forms[2], forms[0], "FID 13.0 -> 7.8 (256 px)")
        yield reaches_final_loss(forms[2], forms[0])
        lines = [loss_over_training(form) for form in forms]
        early = max(line["y"][len(line["y"]) // 4] for line in lines)
        least = min(min(line["y"]) for line in lines)
        yield figure(
            "lines", f"(a) loss over training, {size.name}", "training TFLOPs", LOSS_AXIS, lines,
            bands=True, top=early, bottom=least - 0.05 * (early - least),
        )  # fmt: skip
    if study.scale.samples:
        yield Row(
            "ELIT-MB's samples are nearer to real ones than DiT's at equal training FLOPs",
            "FID 13.0 -> 7.8 (256 px)", multi.in_words(point),
            f"DiT: {dit.in_words(point)}; {multi.real(point)}",
            judge(dit.distance(point) - multi.distance(point)),
        )  # fmt: skip


def better_at_equal_flops(elastic: Models, plain: Models, paper: str) -> Row:
    """An elastic form against the plain one."""
    loss, base = elastic.loss(), plain.loss()
    what = f"{elastic.title} is better than {plain.title} at equal training FLOPs ({plain.size})"
    here = f"loss {loss} ({-100 * ((base - loss).mean / base.mean):+.1f} %)"
    return Row(what, paper, here, f"{plain.title}: {base}", judge(base - loss))


def reaches_final_loss(multi: Models, dit: Models) -> Row:
    """The DiT's final loss for fewer FLOPs; of a seed that never has it the share is 1 or more."""
    goals = [curve[-1][1] for curve in dit.curves]
    steps = [first_below(curve, goal) for curve, goal in zip(multi.curves, goals, strict=True)]
    seeds, reached = len(steps), len(steps) - steps.count(None)
    costs = (multi.step_flops * step if step else dit.trainings[0].flops for step in steps)
    shares = Values(cost / dit.trainings[0].flops for cost in costs)
    share = f"{shares:.2f}" if reached else "1"
    return Row(
        f"ELIT-MB reaches the DiT's final loss with fewer training FLOPs ({dit.size})",
        "3.3x to 4.0x fewer steps (FDD), a share of 0.25 to 0.30",
        f"share {'' if reached == seeds else 'at least '}{share}; "
        f"reached by {reached} of {seeds} seeds",
        "DiT: 1 (the cosine schedule gains most at the end of each run, the paper's rate "
        "is constant: shares are nearer to 1 here)",
        judge_reach(shares, reached),
    )  # fmt: skip


def first_below(curve: Sequence[Sequence[float]], goal: float) -> float | None:
    """Step at which a curve first is at `goal` or below, between its points on straight lines."""
    if curve[0][1] <= goal:
        return curve[0][0]
    for (step, loss), (later, less) in pairwise(curve):
        if less <= goal:
            return step + (later - step) * (loss - goal) / (loss - less)
    return None


def loss_over_training(models: Models) -> Figure:
    """A line of held-out loss over training FLOPs."""
    columns = list(zip(*models.curves, strict=True))  # a point of each seed
    x = [column[0][0] * (models.step_flops / 1e12) for column in columns]
    return series(models.title, x, [Values(loss for _, loss in column) for column in columns])


def as_long(study: Study) -> Models:
    """A single budget for as many steps as all of them take, at more FLOPs."""
    return study.models("elit", steps=study.models("elit-mb").steps)


def at_each_budget(study: Study) -> dict[str, OperatingPoint]:
    """How ELIT-MB is drawn at its budgets, the largest first."""
    budgets = study.budgets(study.models("elit-mb").trainings[0])
    return {format_budget(budget): study.unguided(budget) for budget in budgets}


@claim(
    "b", "quality falls smoothly with the budget",
    "One multi-budget model at every budget, beside one trained at full budget alone (cut off "
    "where it leaves the frame); bars are standard errors over seeds.",
    "elit", "elit-mb", all_sizes=True,
    also=lambda study: [
        *as_long(study).trained, *study.samples("elit-mb", *at_each_budget(study).values()),
        *study.samples("dit", study.unguided()),
    ],
)  # fmt: skip
def all_budgets(study: Study, elit: Models, multi: Models) -> Told:
    """One model at all budgets."""
    for size in study.scale.sizes:
        yield from falls_with_budget(elit.at(size), multi.at(size), f"{multi.title} ({size.name})")
    alone, both = as_long(study), multi.loss()  # what serving all budgets costs
    yield Row(
        f"at equal steps ({alone.steps}), so for more FLOPs, ELIT at full budget alone is as good "
        f"as ELIT-MB: at most {SAME:.0%} worse",
        "-", f"ELIT: {alone.loss()}", f"ELIT-MB: {both}",
        judge(both.times(1 + SAME) - alone.loss()),
    )  # fmt: skip
    yield loss_over_budgets("(b) loss over budgets", elit, multi)
    if study.scale.samples:
        points = at_each_budget(study)
        scores = {budget: multi.distance(point) for budget, point in points.items()}
        right = {budget: multi.accuracy(point) for budget, point in points.items()}
        first, *_, last = points
        yield Row(
            f"ELIT-MB, distance of samples: {ORDERED}", SMOOTHLY,
            f"Frechet {listed(scores, 2)}; accuracy {listed(right, 3)}",
            f"from {first} to {last}: {scores[last] - scores[first]:.2f}; "
            f"{multi.real(points[first])}",
            judge_order([*scores.values()]),
        )  # fmt: skip
        line = series("ELIT-MB", [point.budget for point in points.values()], scores.values())
        plain = series("DiT", [1.0], [study.models("dit").distance(study.unguided())])
        yield figure(
            "lines", "(b) distance over budgets", BUDGET_AXIS, FRECHET_AXIS, [line, plain],
            budgets=True, log_y=True,
        )  # fmt: skip


def falls_with_budget(single: Models, multi: Models, name: str) -> Iterator[Row]:
    """Loss by budget, of training at all budgets and at one."""
    losses = {budget: multi.loss(budget) for budget in multi.budgets}
    first, *_, last = losses
    rise, alone = losses[last] - losses[first], single.loss(last) - single.loss(first)
    yield Row(
        f"{name}, loss: {ORDERED}", SMOOTHLY, listed(losses, 4),
        f"from {first} to {last}: {rise} ({rise.mean / losses[first].mean:+.1%})",
        judge_order([*losses.values()]),
    )  # fmt: skip
    yield Row(
        f"trained at full budget alone, {single.title} collapses at low budgets",
        "only multi-budget training serves all budgets", f"from {first} to {last}: {alone}",
        f"{name}: {rise}", judge(alone - rise),
    )  # fmt: skip


def listed(by_budget: Mapping[str, Values], digits: int) -> str:
    """Means over seeds, behind their budgets."""
    return ", ".join(f"{budget}: {values.mean:.{digits}f}" for budget, values in by_budget.items())


def loss_over_budgets(title: str, single: Models, multi: Models) -> Figure:
    """Loss over budgets; the model of a single one leaves the frame."""
    lines = [
        series(form.title, [float(Fraction(b)) for b in form.budgets], map(form.loss, form.budgets))
        for form in (single, multi)
    ]
    shown = [*lines[1]["y"], lines[0]["y"][0]]
    top = max(shown) + 1.5 * (max(shown) - min(shown))
    return figure("lines", title, BUDGET_AXIS, LOSS_AXIS, lines, budgets=True, top=top)


@claim(
    "c", "latents are ordered by importance",
    "ELIT-MB with its first latents and with random ones, and a model trained with random "
    "dropping; bars are standard errors over seeds.",
    "elit-mb", "elit-mb-random",
)  # fmt: skip
def order(study: Study, tail: Models, other: Models) -> Told:
    """The first latents, or any; dropping the tail, or any."""
    del study
    low = [budget for budget in tail.budgets if budget != "1"]
    quarter = "1/4" if "1/4" in low else low[-1]
    first, anyone = tail.loss(quarter), tail.random_loss(quarter)
    what = f"the first latents are worth more than random ones of the same model (at {quarter})"
    paper = "early latents carry global structure"
    yield Row(what, paper, f"first: {first}", f"random: {anyone}", judge(anyone - first))
    for budget, paper in (("1", "FID 26.6 against 27.0"), (quarter, "FID 36.3 against 38.6")):
        what = f"dropping the tail in training is better than dropping at random (at {budget})"
        ours, theirs = tail.loss(budget), other.loss(budget)
        yield Row(what, paper, f"tail: {ours}", f"random: {theirs}", judge(theirs - ours))
    x = [float(Fraction(budget)) for budget in low]
    lines = [
        series("first latents", x, map(tail.loss, low)),
        series("random latents", x, map(tail.random_loss, low)),
        series("trained with random dropping", x, map(other.loss, low)),
    ]
    title = "(c) first or random latents"
    yield figure("lines", title, BUDGET_AXIS, LOSS_AXIS, lines, budgets=True)


GUIDES = {"none": "no guidance", "cfg": "CFG", "ag": "autoguidance", "ccfg": "cheap CFG"}


def guided(study: Study, guide: str) -> list[OperatingPoint]:
    """A guide at full budget, at each scale."""
    if guide == "none":
        return [study.unguided()]
    scales, steps = study.scale.guidance_scales, study.scale.sampling_steps
    return [OperatingPoint(1.0, steps, guide, scale) for scale in scales]


@claim(
    "d", "cheap CFG saves a third and is as good",
    "Samples of ELIT-MB at full budget with each guide, numbers are guidance scales; bars are "
    "standard errors over seeds.",
    "elit-mb",
    also=lambda study: study.samples("elit-mb", *(p for g in GUIDES for p in guided(study, g))),
    by_samples=("cheap CFG is as good as CFG", "-33 % FLOPs"),
)  # fmt: skip
def cheap_guidance(study: Study, multi: Models) -> Told:
    """A guide that is the model at a low budget."""
    points = {guide: guided(study, guide) for guide in GUIDES}
    best = {g: min(points[g], key=lambda point: multi.distance(point).mean) for g in GUIDES}
    cfg, cheap = multi.distance(best["cfg"]), multi.distance(best["ccfg"])
    yield Row(
        f"cheap CFG is as good as CFG: at most {MARGIN:.0%} worse, each at its best scale",
        "as good or better", f"Frechet {cheap:.2f} at scale {best['ccfg'].scale:g}",
        f"CFG: {cfg:.2f} at scale {best['cfg'].scale:g}", judge(cfg.times(1 + MARGIN) - cheap),
    )  # fmt: skip
    cost, cheap_cost = multi.flops(best["cfg"]), multi.flops(best["ccfg"])
    here, control = f"{1 - cheap_cost / cost:.0%}", f"CFG: {cost / 1e9:.2f} GFLOPs a picture"
    yield Row("cheap CFG saves sampling FLOPs", "about 33 %", here, control, note="counted")
    plain, right = (multi.accuracy(best[guide]) for guide in ("none", "cfg"))
    what = "guidance draws the wanted class more often (CFG at its best scale)"
    here, control = f"accuracy {right:.3f}", f"no guidance: {plain:.3f}"
    yield Row(what, "-", here, control, judge(right - plain))
    most, steps = max(study.scale.guidance_scales), study.scale.sampling_steps
    strong = [OperatingPoint(1.0, steps, guide, most) for guide in ("cfg", "ag")]
    cfg, auto = map(multi.distance, strong)
    what = f"autoguidance has the lower distance at a large scale ({most:g})"
    paper = "best FID at large scales"
    yield Row(what, paper, f"Frechet {auto:.2f}", f"CFG: {cfg:.2f}", judge(cfg - auto))
    cfg, auto = (multi.accuracy(point) for point in strong)
    what, paper = f"autoguidance is less true to the class ({most:g})", "weaker class alignment"
    yield Row(what, paper, f"accuracy {auto:.3f}", f"CFG: {cfg:.3f}", judge(cfg - auto))
    right_axis = "accuracy (higher is better)"
    shown = {"frechet": ("distance", FRECHET_AXIS), "accuracy": ("accuracy", right_axis)}
    for name, (title, axis) in shown.items():
        lines = []
        for guide, label in GUIDES.items():
            texts = ["" if point.scale is None else f"{point.scale:g}" for point in points[guide]]
            lines.append(over_sampling_flops(label, multi, points[guide], texts, name))
        yield figure("scatter", f"(d) guidance: {title}", SAMPLING_AXIS, axis, lines)


def over_sampling_flops(
    label: str, models: Models, points: Sequence[OperatingPoint], texts: list[str], name: str
) -> Figure:
    """A line of a score over sampling FLOPs, each point with its text."""
    x = [models.flops(point) / 1e9 for point in points]
    return {**series(label, x, [models.score(name, p) for p in points]), "texts": texts}


def as_costly(study: Study, budget: float) -> list[OperatingPoint]:
    """The steps at a budget that cost what the scale's do at full budget."""
    full, cost = (study.forward_flops("elit-mb", b) for b in (1.0, budget))
    targets = study.scale.equal_steps
    return [OperatingPoint(budget, max(1, round(steps * full / cost))) for steps in targets]


@claim(
    "e", "at equal sampling FLOPs, fewer latents beat fewer steps",
    "ELIT-MB without guidance, each line a budget, numbers are steps: at the same abscissa the "
    "same FLOPs; bars are standard errors over seeds.",
    "elit-mb",
    also=lambda study: study.samples(
        "elit-mb", *(point for b in study.scale.draw_budgets for point in as_costly(study, b))
    ),
    by_samples=(FEWER, "so at all FLOPs"),
)  # fmt: skip
def budget_or_steps(study: Study, multi: Models) -> Told:
    """Fewer latents, or fewer steps."""
    rows = {format_budget(b): as_costly(study, b) for b in study.scale.draw_budgets}
    targets, full, lines = ", ".join(map(str, study.scale.equal_steps)), rows["1"], []
    for budget, points in rows.items():
        texts = [str(point.steps) for point in points]
        lines.append(over_sampling_flops(f"budget {budget}", multi, points, texts, "frechet"))
        if points is full:
            continue
        pairs = zip(points, full, strict=True)
        off = max(abs(multi.flops(one) / multi.flops(other) - 1) for one, other in pairs)
        yield Row(
            f"{FEWER} (budget {budget}, mean over {targets} full steps' FLOPs)",
            "fewer latents beat fewer steps",
            f"{multi.in_words(*points)}; FLOPs equal within {off:.1%}",
            f"budget 1: {multi.in_words(*full)}; {multi.real(full[0])}",
            judge(multi.distance(*full) - multi.distance(*points)),
        )  # fmt: skip
    yield figure(
        "lines", "(e) budget or steps", SAMPLING_AXIS, FRECHET_AXIS, lines, log_x=True, log_y=True
    )


@claim(
    "f", "ELIT makes use of tokens that a DiT wastes",
    "Each picture as it is, and spread among zero tokens (4x the tokens), {spread_steps} steps "
    "each; bars are standard errors over seeds.",
    "dit", "spread-dit", "elit", "spread-elit", few=True, steps=lambda scale: scale.spread_steps,
)  # fmt: skip
def padding(study: Study, *models: Models) -> Told:
    """More tokens with nothing more to see."""
    pairs = models[:2], models[2:]
    cost, elit_cost = (f"{wide.step_flops / form.step_flops:.1f}x" for form, wide in pairs)
    dit, wide_dit, elit, wide = (form.loss() for form in models)
    gain, control = elit - wide, dit - wide_dit
    each, nothing = f"at {study.scale.spread_steps} steps each", "DiT: nothing for 4x the FLOPs"
    yield Row(
        f"spread among zero tokens, ELIT gains ({each})", "more tokens become quality",
        f"loss {elit} -> {wide} for {elit_cost} the FLOPs", f"DiT: {dit} -> {wide_dit} for {cost}",
        judge(gain),
    )  # fmt: skip
    what = f"ELIT gains more by it than the DiT ({each})"
    yield Row(what, nothing, f"gain {gain}", f"DiT's gain: {control}", judge(gain - control))
    yield Row(
        f"the DiT gains nothing by it: at most {SAME:.0%} ({each})", nothing,
        f"gain {control} ({control.mean / dit.mean:+.1%})", f"DiT as it is: {dit}",
        judge(dit.times(SAME) - control),
    )  # fmt: skip
    bars = [series("as it is", [0, 1], [dit, elit]), series("spread", [0, 1], [wide_dit, wide])]
    names = ["DiT", "ELIT"]
    yield figure("bars", "(f) spread among zeros", "model", LOSS_AXIS, bars, names=names)


OTHERS = "attention with the loss of other pictures"


@claim(
    "g", "Read attends where the loss is",
    f"Rank correlation of Read's weights with the loss of the same picture's tokens, within "
    f"groups, and the control: {OTHERS}; bars are standard errors over seeds.",
    "elit-mb", also=lambda study: study.models("elit-mb").looked,
)  # fmt: skip
def attention(study: Study, multi: Models) -> Told:
    """What Read looks at."""
    looks, shown = multi.results(multi.looked), []
    for i, sigma in enumerate(study.scale.sigmas):
        # Within groups: Read's weights share out each of them alike.
        pairs = [look["levels"][i].get("spearman_in_groups") or {} for look in looks]
        sides = [(pair.get("value"), pair.get("shuffled")) for pair in pairs]
        sides = [side for side in sides if None not in side]
        what = f"within a group, Read attends where the loss is high (noise level {sigma:g})"
        paper = "high where the loss is high, shown in pictures"
        if not sides:
            yield Row(what, paper, note=NOT_DEFINED)
            continue
        own, control = map(Values, zip(*sides, strict=True))
        count = "" if len(own) == len(looks) else f" (of {len(own)} of {len(looks)} seeds)"
        here = f"rank correlation {own:.3f}{count}"
        yield Row(what, paper, here, f"{OTHERS}: {control:.3f}", judge(own - control))
        shown.append((i, own, control))
    if shown:
        places, ours, theirs = zip(*shown, strict=True)
        lines = [series("attention with the loss", places, ours), series(OTHERS, places, theirs)]
        yield figure(
            "bars", "(g) Read's attention and the loss", "noise level", "rank correlation", lines,
            names=[f"{sigma:g}" for sigma in study.scale.sigmas], zero=True,
        )  # fmt: skip


@claim(
    "h", "groups of middle size are best",
    "Single-budget models of equal training FLOPs by the tokens of a group; bars are standard "
    "errors over seeds.",
    "elit-1x1", "elit-2x2", "elit", "elit-whole", few=True,
)  # fmt: skip
def groups(study: Study, *models: Models) -> Told:
    """How many tokens share their latents."""
    side, tokens = study.scale.group, study.scale.tokens
    names = ["1x1", "2x2", f"{side}x{side}", f"{tokens}x{tokens} (whole)"]
    losses = [form.loss() for form in models]
    middle, best = names[2], losses[2]
    for name, loss in zip(names, losses, strict=True):
        if name != middle:
            what = f"groups of {middle} are better than {name}"
            paper = "4x4 of 16x16 tokens is best; 1x1 and the whole picture are worse"
            yield Row(what, paper, f"{middle}: {best}", f"{name}: {loss}", judge(loss - best))
    line = series("ELIT, equal training FLOPs", range(len(names)), losses)
    low = min(y - error for y, error in zip(line["y"], line["error"], strict=True))
    high = max(y + error for y, error in zip(line["y"], line["error"], strict=True))
    yield figure(
        "points", f"(h) tokens of a group, of {tokens}x{tokens}", "group", LOSS_AXIS, [line],
        names=names, bottom=low - 0.2 * (high - low), top=high + 0.2 * (high - low),
    )  # fmt: skip


@claim(
    "i", "another backbone gains alike: U-ViT",
    "The same as (a) and (b) with a U-ViT, whose long skips tie early blocks to late ones; bars "
    "are standard errors over seeds.",
    "uvit", "elit-uvit", "elit-uvit-mb", few=True,
)  # fmt: skip
def other_backbone(study: Study, plain: Models, single: Models, multi: Models) -> Told:
    """The same as (a) and (b) with a U-ViT."""
    del study
    yield better_at_equal_flops(single, plain, "FID 8.3 -> 7.5 (256 px)")
    yield better_at_equal_flops(multi, plain, "FID 8.3 -> 7.1 (256 px)")
    yield from falls_with_budget(single, multi, multi.title)
    shown = loss_over_budgets("(i) U-ViT: loss over budgets", single, multi)
    shown["series"].append(series("U-ViT", [1.0], [plain.loss()]))
    yield shown
