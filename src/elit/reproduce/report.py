"""The report of a study: a page, a picture, JSON, and a table in Markdown."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elit._files import write_json, write_text
from elit.reproduce.claims import CLAIMS
from elit.reproduce.evidence import (
    FAILS,
    HOLDS,
    NOT_DEFINED,
    RULE,
    UNDECIDED,
    Finding,
    Row,
    Study,
)
from elit.viz.charts import THEMES, Chart, Line, picture, svg
from elit.viz.page import templates
from elit.viz.sheet import save_image

PAGE, PICTURE, RESULTS, TABLE = "claims.html", "claims.png", "results.json", "claims.md"
_HEADER = ("claim", "paper", "here", "control", "verdict")
_WORDS = {"holds": "good", "does not hold": "bad", "undecided": "open"}
# Each form of a model has one colour in all figures: its number among the colours.
_FORMS = {
    "DiT": 0, "U-ViT": 0, "ELIT": 1, "ELIT-U-ViT": 1, "ELIT-MB": 2, "ELIT-U-ViT-MB": 2,
}  # fmt: skip
_MARKERS = "osD^v"


def write_report(
    folder: Path, study: Study, letters: Sequence[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Judge claims and write all files; what results.json holds.

    When, where and how long the study ran is `about`, told apart from what was measured.
    """
    findings = {letter: CLAIMS[letter].find(study) for letter in letters}
    report: dict[str, Any] = {
        "scale": study.scale.name,
        "settings": study.scale.settings()
        | {"seeds": study.scale.seeds, "few_seeds": study.scale.few_seeds},
        "data": repr(study.dataset),
        "rule": RULE,
        "claims": {
            letter: {
                "title": CLAIMS[letter].title,
                "sentence": finding.sentence,
                "verdict": summary(finding),
                "rows": [row.to_dict() for row in finding.rows],
                "figures": finding.figures,
            }
            for letter, finding in findings.items()
        },
        "pieces": {
            key: {name: value for name, value in result.items() if name != "seconds"}
            for key, result in sorted(study.results.items())
        },
        "run": dict(about),
    }  # fmt: skip
    panels = []
    for letter, finding in findings.items():
        verdict = textwrap.fill(f"all of ({letter}): {summary(finding)}", 62)
        for shown in finding.figures:
            panels.append(chart_of({**shown, "x": f"{shown['x']}\n\n{verdict}\n"}))
    if panels:
        save_image(picture(panels, size=(5.2, 5.0), columns=3), folder / PICTURE)
    rows = [
        (f"({letter}) {row.what}", row.paper, row.here, row.control, verdict_text(row))
        for letter, finding in findings.items()
        for row in finding.rows
    ]
    settings = settings_text(report)
    write_text(folder / TABLE, markdown(rows, settings))
    page = templates().get_template("claims.html").render(
        title="Claims of the ELIT paper", themes=THEMES, scale=report["scale"], rule=RULE,
        header=_HEADER, rows=rows, words=_WORDS, settings=settings,
        claims=[(letter, claim, [svg(chart_of(f)) for f in claim["figures"]])
                for letter, claim in report["claims"].items()],
    )  # fmt: skip
    write_text(folder / PAGE, page)
    write_json(folder / RESULTS, report)
    return report


def summary(finding: Finding) -> str:
    """Verdicts of a claim's rows in one line: all alike once, others one by one."""
    words = [row.word for row in finding.rows if row.verdict is not None or row.word == NOT_DEFINED]
    if not words:
        return finding.rows[0].word if finding.rows else ""
    counts = {
        word: words.count(word) for word in (HOLDS, UNDECIDED, FAILS, NOT_DEFINED) if word in words
    }
    if len(counts) == 1:
        return words[0] if len(words) == 1 else f"{words[0]} (all {len(words)} rows)"
    return ", ".join(f"{word} ({count} of {len(words)})" for word, count in counts.items())


def verdict_text(row: Row) -> str:
    """A verdict with the difference that it is by."""
    if row.verdict is None or row.verdict.difference is None:
        return row.word
    error = "" if row.verdict.error is None else f" ± {row.verdict.error:.2g}"
    seeds = f"{row.verdict.seeds} seed{'s' if row.verdict.seeds > 1 else ''}"
    return f"{row.word} ({row.verdict.difference:+.2g}{error}, {seeds})"


def settings_text(report: Mapping[str, Any]) -> str:
    """What was done, in words."""
    settings, about = report["settings"], report["run"]
    minutes = "core-minutes" if settings["device"] == "cpu" else "minutes of all pieces together"
    sizes = "; ".join(
        f"width {s['hidden_size']}, depth {s['depth']} (ELIT {s['head']}-"
        f"{s['depth'] - s['head'] - s['tail']}-{s['tail']}), {s['steps']} steps of the plain model "
        f"at learning rate {s['lr']:g}"
        for s in settings["sizes"]
    )
    return (
        f"Scale {report['scale']}: {report['data']}; {settings['tokens'] ** 2} tokens in groups of "
        f"{settings['group']}x{settings['group']}; {sizes}; batch {settings['batch_size']}, AdamW "
        f"(0.9, 0.99), cosine after {settings['warmup_steps']} steps of warm-up, averaged weights "
        f"(EMA {settings['ema']:g}), {settings['precision']}. Elastic models take as many steps as "
        f"cost the same FLOPs by elit's own counter, mean over the budgets drawn. Loss: "
        f"{settings['images']} held-out pictures at most, the same noise for all. "
        f"{settings['seeds']} seeds of (a) to (e) and (g), {settings['few_seeds']} of the others; "
        f"± is a standard error over seeds. Begun {about['started']} on {about['machine']}, "
        f"{about['minutes']:.0f} {minutes}: `{about['command']}`."
    )


def markdown(rows: Sequence[Sequence[str]], settings: str) -> str:
    """The table as Markdown, what was done, and the rule."""
    cells = [_HEADER, ["---"] * len(_HEADER), *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    lines[1] = "|" + "---|" * len(_HEADER)
    return "\n".join([*lines, "", settings, "", RULE, ""])


def chart_of(figure: Mapping[str, Any]) -> Chart:
    """What draws a finding's figure."""
    series = []
    for i, line in enumerate(figure["series"]):
        place = _FORMS.get(line["label"], i) % len(_MARKERS)
        series.append(Line(**line, colour=place, marker=_MARKERS[place]))
    return Chart(**{**figure, "series": series})
