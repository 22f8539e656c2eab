"""The report of a study: a page, a picture, JSON, and a table in Markdown."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from elit._files import write_json, write_text
from elit.reproduce.evidence import NOT_DEFINED, Claim, Finding, Row, Study
from elit.reproduce.verdict import RULE
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
    folder: Path, study: Study, claims: Sequence[Claim], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Judge the claims and write all files.

    Args:
        folder: of the study.
        study: with its results.
        claims: to judge.
        about: of the run: when, where, how long; it is told apart from what was measured.

    Returns:
        What results.json holds.
    """
    findings = {claim: claim.find(study) for claim in claims}
    report = {
        "scale": study.scale.name,
        "settings": study.scale.settings() | {"seeds": len(study.seeds()),
                                              "few_seeds": len(study.seeds(few=True))},
        "data": repr(study.trainings.dataset),
        "rule": RULE,
        "claims": {
            claim.letter: {
                "title": claim.title,
                "sentence": finding.sentence,
                "verdict": summary(finding),
                "rows": [row.to_dict() for row in finding.rows],
                "figures": finding.figures,
            }
            for claim, finding in findings.items()
        },
        "pieces": {
            key: {name: value for name, value in result.items() if name != "seconds"}
            for key, result in sorted(study.results.items())
        },
        "run": dict(about),
    }  # fmt: skip
    panels = []
    for finding in findings.values():
        verdict = textwrap.fill(f"verdict: {summary(finding)}", 62)
        for chart in map(chart_of, finding.figures):
            panels.append(replace(chart, x=f"{chart.x}\n\n{verdict}\n"))
    if panels:
        save_image(picture(panels, size=(5.2, 5.0), columns=3), folder / PICTURE)
    write_text(folder / TABLE, markdown(findings, report))
    write_text(folder / PAGE, page(findings, report))
    write_json(folder / RESULTS, report)
    return report


def summary(finding: Finding) -> str:
    """Verdicts of a claim's rows in one line: all alike once, others one by one."""
    words = [row.word for row in finding.rows if row.verdict is not None or row.word == NOT_DEFINED]
    if not words:
        return finding.rows[0].word if finding.rows else ""
    counts = {word: words.count(word) for word in dict.fromkeys(words)}
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


def table_rows(findings: Mapping[Claim, Finding]) -> list[tuple[str, ...]]:
    """Cells of the table."""
    return [
        (f"({claim.letter}) {row.what}", row.paper, row.here, row.control, verdict_text(row))
        for claim, finding in findings.items()
        for row in finding.rows
    ]


def markdown(findings: Mapping[Claim, Finding], report: Mapping[str, Any]) -> str:
    """The table as Markdown, what was done, and the rule."""
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        for row in table_rows(findings)
    ]
    text = "\n".join(lines)
    return f"{text}\n\n{settings_text(report)}\n\n{RULE}\n"


def page(findings: Mapping[Claim, Finding], report: Mapping[str, Any]) -> str:
    """The page, which needs no other file."""
    claims = [
        (claim.letter, report["claims"][claim.letter], [svg(chart_of(f)) for f in finding.figures])
        for claim, finding in findings.items()
    ]
    return templates().get_template("claims.html").render(
        title="Claims of the ELIT paper", themes=THEMES, scale=report["scale"], rule=RULE,
        header=_HEADER, rows=table_rows(findings), claims=claims, words=_WORDS,
        settings=settings_text(report),
    )  # fmt: skip


def chart_of(figure: Mapping[str, Any]) -> Chart:
    """What draws a finding's figure."""
    series = []
    for i, line in enumerate(figure["series"]):
        place = _FORMS.get(line["label"], i) % len(_MARKERS)
        series.append(Line(**line, colour=place, marker=_MARKERS[place]))
    return Chart(**{**figure, "series": series})
