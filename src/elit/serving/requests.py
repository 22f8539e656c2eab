"""The body of a request, checked field by field against what the model is."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from elit._choices import check_choice, hint_at, label_of
from elit._numbers import is_real, is_whole
from elit.flow.words import DEFAULT_SCALE, GUIDANCES
from elit.interface.budget import format_budget, read_budget, resolve_budget
from elit.serving.control import Picture, Way
from elit.serving.facts import Facts, Point, RefusedError

MAX_BODY = 64 * 1024  # bytes
MAX_STEPS, MAX_SCALE = 250, 100.0
MAX_SEED = 2**63 - 1
FIELDS = (
    "model", "prompt", "negative_prompt", "class_label", "n", "size", "response_format", "budget",
    "steps", "guidance", "guidance_scale", "guide_budget", "seed", "max_ms", "max_gflops",
)  # fmt: skip


def parse(body: bytes, facts: Facts) -> list[Picture]:
    """The pictures that a body asks for, or a RefusedError that says what is wrong with it."""
    given = _read(body)
    for name in given:
        if name not in FIELDS:
            advice = hint_at(name, FIELDS, f"the fields are {', '.join(FIELDS)}")
            raise RefusedError(f"unknown field {name!r:.60}: {advice}", None, code="unknown_field")
    given = {name: value for name, value in given.items() if value is not None}
    if (model := given.get("model", facts.name)) != facts.name:
        raise RefusedError(
            f"model {model!r:.60} is not served here; use {facts.name!r}, or leave it out",
            "model",
            404,
            "model_not_found",
        )
    what, negative = _what(given, facts)
    n = _whole(given, "n", 1, facts.batch_size, 1)
    size = "x".join(map(str, facts.size))
    if given.get("size", size) not in (size, "auto"):
        _refuse("size", given["size"], f"this model draws {size!r} alone, width and height")
    if given.get("response_format", "b64_json") != "b64_json":
        _refuse("response_format", given["response_format"], "use 'b64_json'; no files are kept")
    if given.keys() & {"max_ms", "max_gflops"}:
        point = _chosen(given, facts)
        way, latents = point.way, point.latents
    else:
        way, latents = _drawn_as(given, facts)
    if negative is not None and way.guidance not in ("cfg", "ccfg"):
        _refuse("negative_prompt", negative, "no guide reads it; add 'guidance': 'ccfg'")
    seed = given.get("seed")
    if seed is None:
        seed = secrets.randbelow(2**31)
    elif not is_whole(seed, 0, MAX_SEED - n + 1):
        _refuse("seed", seed, f"give a whole number from 0 to {MAX_SEED - n + 1}")
    return [Picture(what, int(seed) + i, way, latents, negative) for i in range(n)]


def _refuse(name: str, value: Any, advice: str) -> NoReturn:
    raise RefusedError(f"{name} {value!r:.60} is not allowed: {advice}", name)


def _read(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8, a number of 5000 digits
        reason = " ".join(str(error).split())[:120]
        raise RefusedError(f"the body is no JSON: {reason}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise RefusedError("the body is no JSON object; send {\"class_label\": 7} or the like",
                           code="invalid_json")  # fmt: skip
    return given


def _what(given: Mapping[str, Any], facts: Facts) -> tuple[int | str, str | None]:
    """A class or a text, and the text that the guide reads."""
    prompt, label = given.get("prompt"), given.get("class_label")
    for name in ("prompt", "negative_prompt"):
        text = given.get(name, "")
        if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
            _refuse(name, text, "give a text of valid Unicode")
    if facts.num_classes is None:
        if label is not None:
            _refuse("class_label", label, "this model draws texts; give a prompt")
        if prompt is None:
            raise RefusedError("a request needs a prompt", "prompt", code="missing_field")
        return prompt, given.get("negative_prompt")
    classes = f"a class from 0 to {facts.num_classes - 1}"
    if "negative_prompt" in given:
        _refuse("negative_prompt", given["negative_prompt"], "this model draws classes, not texts")
    if prompt is not None and label is not None:
        _refuse("prompt", prompt, "give either prompt or class_label")
    field = "class_label" if prompt is None else "prompt"  # OpenAI's clients always send one
    try:
        label = label_of(label if prompt is None else prompt, facts.labels, facts.num_classes)
    except ValueError as error:
        advice = f"this model draws no texts; give {classes}, such as '1'"
        _refuse(field, given[field], str(error) if facts.labels else advice)
    if label is None:
        raise RefusedError(
            f"a request needs a class_label, {classes}", "class_label", code="missing_field"
        )
    if not is_whole(label, 0, facts.num_classes - 1):
        _refuse(field, label, f"give {classes}")
    return int(label), None


def _whole(given: Mapping[str, Any], name: str, least: int, most: int, default: int) -> int:
    value = given.get(name, default)
    if not is_whole(value, least, most):
        _refuse(name, value, f"give a whole number from {least} to {most}")
    return int(value)


def _real(given: Mapping[str, Any], name: str, most: float) -> float | None:
    value = given.get(name)
    if value is not None and not (is_real(value) and 0 < value <= most):
        _refuse(name, value, f"give a number above 0, at most {most:g}")
    return None if value is None else float(value)


def _latents(given: Mapping[str, Any], name: str, facts: Facts, least: int) -> int | None:
    """Latents per group of a budget, if it is given."""
    if given.get(name) is None:
        return None
    try:
        budget = read_budget(given[name], facts.max_latents)
    except ValueError as error:
        raise RefusedError(str(error), name) from None
    if not facts.max_latents:
        if budget == 1:
            return 0
        _refuse(name, given[name], "this model is not elastic; leave it out")
    latents = resolve_budget(budget, facts.max_latents)
    if latents < least:
        lowest = format_budget(facts.budget(least))
        _refuse(name, given[name], f"the lowest here is {lowest}")
    return latents


def _drawn_as(given: Mapping[str, Any], facts: Facts) -> tuple[Way, int]:
    """Way and latents per group of the fields, and where they don't say of the server."""
    own = facts.way
    latents = _latents(given, "budget", facts, facts.lowest)
    latents = facts.latents if latents is None else latents
    steps = _whole(given, "steps", 1, MAX_STEPS, own.steps)
    guidance = given.get("guidance", own.guidance)
    try:
        check_choice(guidance, GUIDANCES, "guidance")
    except ValueError as error:
        raise RefusedError(str(error), "guidance") from None
    scale = _real(given, "guidance_scale", MAX_SCALE)
    guide = _latents(given, "guide_budget", facts, max(1, facts.min_latents))
    if guide is not None and guidance not in ("ag", "ccfg"):
        _refuse("guide_budget", given["guide_budget"], "it is of 'guidance' 'ag' and 'ccfg' alone")
    if guidance == "none":
        if scale is not None:
            _refuse("guidance_scale", scale, "without guidance it has no effect; add 'guidance'")
        return Way(steps), latents
    if scale == 1:
        _refuse("guidance_scale", scale, "at 1 there is no guidance; use 'guidance': 'none'")
    same = guidance == own.guidance
    if guidance in ("ag", "ccfg") and not facts.max_latents:
        _refuse("guidance", guidance, "its guide has a lower budget; this model is not elastic")
    if guidance in ("ag", "ccfg") and guide is None:
        guide = own.guide_latents if same else facts.min_latents
    scale = scale or (own.scale if same else None) or DEFAULT_SCALE
    way = Way(steps, guidance, scale, guide, own.interval if same else None)
    if latents < way.least(facts.lowest):
        _refuse(
            "budget" if "budget" in given else "guidance",
            given.get("budget", guidance),
            f"the guide has budget {format_budget(facts.budget(guide or 0))}; draw with a higher "
            f"one, or another guidance",
        )
    return way, latents


def _chosen(given: Mapping[str, Any], facts: Facts) -> Point:
    """The best point of the sweep within the caps, as `elit.choose` has it."""
    caps = {name: _real(given, name, 1e18) for name in ("max_gflops", "max_ms") if name in given}
    first = next(iter(caps))
    for name in ("budget", "guidance", "guidance_scale", "guide_budget"):
        if name in given:
            _refuse(name, given[name], f"{first} chooses it; leave one of them out")
    if not facts.points:
        _refuse(first, given[first], "there is no sweep to choose from; `elit sweep RUN` makes one")
    steps = _whole(given, "steps", 1, MAX_STEPS, facts.way.steps) if "steps" in given else None
    points: Sequence[Point] = [p for p in facts.points if steps in (None, p.way.steps)]
    if not points:
        known = sorted({p.way.steps for p in facts.points})
        _refuse("steps", steps, f"the sweep has points of {', '.join(map(str, known))} steps")

    def cost(point: Point) -> list[float]:
        each = {"max_gflops": point.gflops, "max_ms": point.ms}
        return [each[name] for name in caps]

    limits = [cap for cap in caps.values() if cap is not None]
    within = [p for p in points if all(c <= m for c, m in zip(cost(p), limits, strict=True))]
    if not within:
        cheapest = " and ".join(
            f"{value:.4g} {name.removeprefix('max_')}"
            for name, value in zip(caps, min(map(cost, points)), strict=True)
        )
        _refuse(first, given[first], f"the cheapest point of the sweep takes {cheapest}")
    return min(within, key=lambda point: (point.badness, cost(point)))
