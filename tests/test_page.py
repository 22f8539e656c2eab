"""The page of a sweep: what stands in it, where its points lie, that it needs nothing else."""

import base64
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageChops
from sweeps import GUIDES, sweep_report

from elit._pareto import best_within, pareto_front
from elit.viz.charts import RAMPS, Chart, Line, ramp, svg
from elit.viz.page import budgets_chart, compare_page, cost_chart, guidance_chart, sweep_page
from elit.viz.sweeps import SCORES, Rows, best_at_costs, guide_of

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Elements of a page, (name, attributes, text inside), and whether they are balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[dict] = []
        self.elements: list[dict] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open[-1]['name']}"

    def handle_starttag(self, name, attributes):
        inside = [element["name"] for element in self.open]
        element = {"name": name, "at": dict(attributes), "text": "", "inside": inside}
        self.elements.append(element)
        if name not in VOID:
            self.open.append(element)

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.open.pop()

    def handle_endtag(self, name):
        assert self.open, f"</{name}> closes nothing"
        assert self.open[-1]["name"] == name, f"</{name}> closes <{self.open[-1]['name']}>"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, name: str, **wanted: str) -> list[dict]:
        return [
            element
            for element in self.elements
            if element["name"] == name
            and all(element["at"].get(k.replace("_", "-")) == v for k, v in wanted.items())
        ]

    def table(self, place: str) -> list[list[str]]:
        """Texts of the cells of the table of that id, or of the first one within that section."""
        body, rows = False, []
        for element in self.elements:
            if element["at"].get("id") == place:
                body = True
            elif body and element["name"] == "tr":
                rows.append([])
            elif body and element["name"] in ("th", "td"):
                rows[-1].append(element["text"])
            elif rows and element["name"] in ("section", "table"):
                break
        return rows


def points_of(drawing: str) -> dict[int, tuple[float, float]]:
    """Where the point of each row lies."""
    points = [use["at"] for use in Page(drawing).all("use") if "data-row" in use["at"]]
    return {int(at["data-row"]): (float(at["x"]), float(at["y"])) for at in points}


def linear(values: list[float], places: list[float]) -> bool:
    """Whether places, of tenths, go evenly with values."""
    slope, offset = np.polyfit(values, places, 1)
    return np.allclose(np.array(values) * slope + offset, places, atol=0.15)


def lines_of(chart: Chart, **wanted) -> list[list[int]]:
    """Rows of the points of those lines that have these attributes."""
    lines = [x for x in chart.series if all(getattr(x, k) == v for k, v in wanted.items())]
    return [list(line.rows) for line in lines if line.rows]


# ---- a page is a whole ----


def odd(report: dict) -> dict:
    """The report with words that would break a page."""
    report["model"]["path"] = "</title><script>alert('1')</script>&amp;"
    report["settings"]["device_name"] = '"><img src=x onerror=alert(2)>'
    report["settings"]["reference"]["name"] = "</script><!--"
    report["rows"][0]["guidance"] = "<i>new</i>"
    report["rows"][0]["sampler"] = "a<b"
    return report


FEW = {"budgets": (0.25, 1), "steps": (5, 20), "guides": GUIDES[::2], "scores": ("fid", "is")}
PAGES = {
    "usual": lambda: sweep_page(
        sweep_report(steps=(5, 20)), [("noise <1>", Image.new("RGB", (9, 5)))]
    ),
    "one row": lambda: sweep_page(
        sweep_report(budgets=(1,), steps=(40,), guides=GUIDES[:1])
    ),
    "no times": lambda: sweep_page(sweep_report(timed=False, **FEW)),
    "one score": lambda: sweep_page(sweep_report(**FEW | {"scores": ("kid",)})),
    "no scores": lambda: sweep_page(sweep_report(scores=("fid",)) | {"rows": unscored()}),
    "plain": lambda: sweep_page(sweep_report(**FEW | {"budgets": (1,)})),
    "odd": lambda: sweep_page(odd(sweep_report(**FEW))),
    "two": lambda: compare_page(
        {"elit <a>": sweep_report(**FEW), "dit": sweep_report(**FEW | {"budgets": (1,)}, seed=1)},
        notes=["<no>"],
    ),
    "three, odd": lambda: compare_page(
        {"a": odd(sweep_report(**FEW)), "b": sweep_report(timed=False, **FEW),
         "c": sweep_report(seed=2, **FEW)}
    ),
}  # fmt: skip


def unscored() -> list[dict]:
    return [row | {"scores": {"fid": None}} for row in sweep_report()["rows"]]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: make() for name, make in PAGES.items()}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_balanced_and_asks_nobody(pages, name) -> None:
    page = Page(pages[name])
    assert [s["at"].get("type") for s in page.all("script")] == ["application/json", None]
    for element in page.elements:
        for attribute, value in element["at"].items():
            assert not attribute.startswith("on")
            if attribute in ("src", "href"):
                assert value.startswith(("data:", "#"))
    text = re.sub(r' xmlns(:xlink)?="http://www.w3.org[^"]*"', "", pages[name])  # a mere name
    assert not re.search(r"\w:/|[\"'(=]//", text)
    assert not re.search(r"@import|url\((?!#)", pages[name])
    ids = [e["at"]["id"] for e in page.elements if "id" in e["at"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["odd", "three, odd"])
def test_words_of_a_report_stay_words(pages, name) -> None:
    page = Page(pages[name])
    text = page.all("body")[0]["text"]
    for word in ('"><img src=x onerror=alert(2)>', "</script><!--", "<i>new</i>", "a<b"):
        assert word in text
    assert not page.all("img") + page.all("i")
    if name == "odd":
        assert page.all("title")[0]["text"] == "</title><script>alert('1')</script>&amp;"


def test_the_numbers_can_be_read_back(pages) -> None:
    report = odd(sweep_report(**FEW))
    held = json.loads(Page(pages["odd"]).all("script", id="report")[0]["text"])
    assert held == json.loads(json.dumps(report))
    report["rows"][3]["scores"]["fid"] = math.nan
    report["rows"][4]["ms_per_image"] = math.inf
    page = Page(sweep_page(report))
    held = json.loads(page.all("script", id="report")[0]["text"])
    assert held["rows"][3]["scores"]["fid"] is None
    assert held["rows"][4]["ms_per_image"] is None
    rows = page.table("rows")
    assert rows[4][rows[0].index("FID ↓")] == rows[5][rows[0].index("ms")] == "-"


def test_every_row_is_in_the_table() -> None:
    report = sweep_report(**FEW)
    report["rows"][1] |= {"interval": [0.1, 0.8], "front_flops": True, "front_ms": True}
    report["rows"][2]["scores"]["is"] = None
    head, *lines = Page(sweep_page(report)).table("rows")
    assert len(lines) == len(report["rows"])
    for line, row in zip(lines, report["rows"], strict=True):
        cells = dict(zip(head, line, strict=True))
        one, _, other = cells["budget"].partition("/")
        assert float(one) / float(other or 1) == row["budget"]
        for name, key in (("latents", "num_latents"), ("steps", "steps"), ("calls", "calls")):
            assert int(cells[name]) == row[key]
        for name, value in (
            ("GFLOPs", row["gflops_per_image"]), ("ms", row["ms_per_image"]),
            ("scale", row["scale"]), ("FID ↓", row["scores"]["fid"]),
            ("Inception Score ↑", row["scores"]["is"]),
        ):  # fmt: skip
            if value is None:
                assert cells[name] == "-"
            else:
                assert float(cells[name]) == pytest.approx(value, rel=1e-3)
    assert lines[1][head.index("noise levels")] == "0.1 to 0.8"
    assert [line[-1] for line in lines[:3]] == ["-", "FLOPs, ms", "-"]


def test_a_score_never_stands_without_its_settings(pages) -> None:
    report = sweep_report(**FEW)
    text = Page(pages["usual"]).all("main")[0]["text"]
    stamped = text[: text.index("Score against cost")]
    for word in ("1000 samples", "seed 0", "balanced", "digits train (1500 images, c0ffee)",
                 "classifier", "16x16 px", "8 bit", "Euler", "float32", "cpu"):  # fmt: skip
        assert word in stamped
    facts = dict(Page(pages["usual"]).table("settings"))
    assert facts["images rounded to 8 bit"] == "yes"
    assert facts["VAE"] == "none"
    assert facts["networks"] == "name classifier, weights sha256:77aa, preprocessing 16 px, grey"
    assert facts["training"] == "steps 1600, eflops 0.0012"
    assert len(facts) == len(report["model"]) + len(report["settings"])
    # What later versions add is shown too.
    report["settings"]["phase_of_the_moon"] = {"waxing": True, "share": 0.3}
    facts = dict(Page(sweep_page(report)).table("settings"))
    assert facts["phase of the moon"] == "waxing yes, share 0.3"


def test_models_side_by_side_show_where_their_settings_differ(pages) -> None:
    other = sweep_report(seed=1, **FEW)
    other["settings"]["dtype"] = "bfloat16"
    page = Page(compare_page({"a": sweep_report(**FEW), "b": other}))
    differing = [e["text"] for e in page.all("tr", **{"class": "differs"})]
    assert any("float32bfloat16" in text for text in differing)
    assert len(differing) == 2  # and the weights
    assert page.all("p", **{"class": "warning"}) == []
    assert Page(pages["two"]).all("p", **{"class": "warning"})[0]["text"] == "<no>"


def test_the_first_choice_of_each_picker_is_shown(pages) -> None:
    report = sweep_report(**FEW) | {"ranked_by": "is"}  # comes first
    assert Page(sweep_page(report)).all("option")[0]["at"]["value"] == "is"
    for name in ("usual", "two", "plain"):
        page = Page(pages[name])
        first, allowed = {}, {}
        for pick in page.all("select"):
            what = pick["at"]["data-picks"]
            at = page.elements.index(pick) + 1
            options = itertools.takewhile(lambda e: e["name"] == "option", page.elements[at:])
            allowed[what] = [option["at"]["value"] for option in options]
            first[what] = allowed[what][0]
        assert set(allowed) >= {"score", "steps"}
        picked = [
            e for e in page.elements if {"data-score", "data-guide", "data-steps"} & set(e["at"])
        ]
        for element in picked:
            chosen = {k[5:]: v for k, v in element["at"].items() if k.startswith("data-")}
            assert all(v in allowed[k] for k, v in chosen.items())
            assert ("hidden" in element["at"]) == any(first[k] != v for k, v in chosen.items())
        assert {e["at"].get("data-guide") for e in picked} >= set(allowed["guide"])


def test_sheets_are_in_the_page(pages) -> None:
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    (image,) = Page(sweep_page(sweep_report(**FEW), [("a & b", picture)])).all("img")
    held = base64.b64decode(image["at"]["src"].removeprefix("data:image/png;base64,"))
    assert not ImageChops.difference(Image.open(io.BytesIO(held)), picture).getbbox()
    assert image["at"]["alt"] == "a & b"


def test_many_rows_stay_small() -> None:
    budgets = tuple((k + 1) / 32 for k in range(32))
    report = sweep_report(budgets=budgets, steps=(5, 10, 20, 40, 80, 160), scores=("fid",))
    report["rows"] = report["rows"][:1000]
    text = sweep_page(report)
    assert text.count("<tr data-row") == 1000
    assert len(text.encode()) < 2e6


def test_what_cannot_be_shown_is_said() -> None:
    with pytest.raises(ValueError, match="the sweep has no rows; run `elit sweep` first"):
        sweep_page(sweep_report() | {"rows": []})


def test_what_was_not_measured_and_what_warns_is_said(pages) -> None:
    report = sweep_report(**FEW)
    for row in report["rows"][:3]:
        row["warnings"] = ["<few> samples"]
    page = sweep_page(report)
    said = f'<p class="warning">3 of {len(report["rows"])} rows: &lt;few&gt; samples</p>'
    assert page.count(said) == 1
    assert page.index(said) < page.index("<h2")
    assert 'class="warning"' not in pages["usual"]
    assert "No times were measured" in pages["no times"]
    assert "No times were measured" not in pages["usual"]
    assert "ms per image" not in pages["no times"]
    assert "No row has a score yet" in pages["no scores"]
    assert "Guidance</h2>" not in pages["one row"]


# ---- charts ----


def drawn(name: str, **more) -> tuple[Rows, Chart]:
    rows = Rows({"m": sweep_report(scores=(name,), **more)})
    return rows, cost_chart(rows, name, "gflops_per_image")


@pytest.mark.parametrize("name", ["fid", "kid", "is", "accuracy"])
def test_points_lie_where_their_values_say(name) -> None:
    """Linear in the logarithm of the cost and in the score."""
    rows, chart = drawn(name)
    points = points_of(svg(chart))
    assert sorted(points) == list(range(len(rows.rows)))
    costs = [math.log(rows.rows[i]["gflops_per_image"]) for i in points]
    scores = [rows.rows[i]["scores"][name] for i in points]
    assert linear(costs, [x for x, _ in points.values()])
    assert linear(scores, [y for _, y in points.values()])
    high, low = (list(points.values())[scores.index(f(scores))][1] for f in (max, min))
    assert high < low


CASES = {
    "one": [(3.0, 5.0)],
    "alike": [(3.0, 5.0)] * 4,
    "one cost": [(3.0, 5.0), (3.0, 9.0)],
    "one score": [(3.0, 0.0), (9.0, 0.0)],
    "wide": [(1e-6, 1e-9), (1e9, 1e12)],
    "below nothing": [(1.0, -1e-4), (10.0, 2e-3)],
    "close": [(1000.0, 118.64000), (1000.001, 118.64001)],
    "huge": [(1e6, 3e15), (2e6, -3e15)],
}


@pytest.mark.parametrize("log_x", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_any_points_fit_into_a_chart(case, log_x) -> None:
    x, y = zip(*CASES[case], strict=True)
    series = [Line(x, y, "a long label", rows=range(len(x)))]
    text = svg(Chart("", "cost", "s", series, log_x=log_x, log_y=case == "wide", labels="start"))
    points = points_of(text)
    page = Page(text)
    width, height = map(float, page.all("svg")[0]["at"]["viewbox"].split()[2:])
    assert len(points) == len(x)
    assert all(
        0.12 * width < px <= width and 0 <= py <= 0.86 * height for px, py in points.values()
    )
    texts = [element["text"] for element in page.all("text")]
    assert {"cost", "s", "a long label"} < set(texts)
    assert 5 <= len(texts) <= 30  # some numbers at each axis


def test_scores_that_differ_much_get_a_log_axis() -> None:
    report = sweep_report(**FEW)
    for i, row in enumerate(report["rows"]):
        row["scores"] = {"fid": 2.0 * 10 ** (i % 3)}
    rows = Rows({"m": report})
    chart = cost_chart(rows, "fid", "gflops_per_image")
    assert (chart.log_y, chart.y) == (True, "FID, lower is better (log scale)")
    low, middle, high = [points_of(svg(chart))[i][1] for i in range(3)]
    assert low - middle == pytest.approx(middle - high, abs=0.2)


def test_budgets_go_evenly_from_the_full_one_down() -> None:
    budgets = (1 / 16, 1 / 4, 1 / 2, 1)
    line = Line(budgets, (4.0, 3.0, 2.0, 1.0), rows=(4, 2, 1, 0))
    text = svg(Chart("", "budget", "loss", [line], budgets=True))
    points = points_of(text)
    assert linear(list(points), [x for x, _ in points.values()])
    assert points[0][0] < 60
    assert points[4][0] > 300  # of 331
    assert [e["text"] for e in Page(text).all("text")][:4] == ["1/16", "1/4", "1/2", "1"]


def test_labels_stand_apart() -> None:
    """Also where all lines begin nearly in one point, and at the top of the chart."""
    for spread, end in itertools.product((0.0, 0.001, 1.0, 50.0), (2.0, -500.0)):
        series = [Line((4, 8), (1 + spread * k, end), f"budget {k:02}") for k in range(12)]
        page = Page(svg(Chart("", "steps", "s", series, labels="start")))
        labels = [
            (float(e["at"]["y"]), e["text"]) for e in page.all("text") if "budget" in e["text"]
        ]
        names = [text for _, text in sorted(labels, reverse=bool(spread))]  # y counts from the top
        assert (names if spread else sorted(names)) == [f"budget {k:02}" for k in range(12)]
        heights = sorted(y for y, _ in labels)
        assert all(below - above >= 8.8 for above, below in itertools.pairwise(heights))
        assert heights[0] > 0
        assert heights[-1] < float(page.all("svg")[0]["at"]["viewbox"].split()[3])


def test_a_drawing_takes_the_colours_of_its_page_and_words_stay_words() -> None:
    chart = Chart("<b>&", "cost $1$", "s", [Line((1, 2), (3, 4), rows=(5, 6), colour=1)])
    text = svg(chart, ("#000001", "#000002"))
    assert "var(--c1)" in text
    assert not re.search(r"#[0-9a-f]{6}[^0-9a-f]", text)  # no colour but those of the page
    assert [e["text"] for e in Page(text).all("text")].count("cost $1$") == 1
    assert Page(text).all("svg")[0]["at"]["aria-label"] == "<b>&; s; cost $1$"
    assert svg(chart) == svg(chart)


def test_axes_name_units_and_directions(pages) -> None:
    for text in ("GFLOPs per image (log scale)", "ms per image (log scale)", "guidance scale",
                 "FID, lower is better", "Inception Score, higher is better"):  # fmt: skip
        assert f">{text}<" in pages["usual"]


def front_by_force(points: list[tuple], lower: bool) -> set[int]:
    sign = 1 if lower else -1
    there = [(c, sign * v, i) for i, (c, v) in enumerate(points) if None not in (c, v)]
    return {
        i
        for c, v, i in there
        if not any(x <= c and y <= v and (x < c or y < v) for x, y, _ in there)
    }


@pytest.mark.parametrize("lower", [True, False])
def test_the_front_is_what_nothing_beats(lower) -> None:
    assert pareto_front([1, 2, 3, 4], [math.nan, math.inf, True, 5], lower) == [3]
    draw = random.Random(7)
    for _ in range(300):
        numbers = [None, *range(draw.randint(1, 6))]  # many ties
        points = [(draw.choice(numbers), draw.choice(numbers)) for _ in range(draw.randint(0, 20))]
        costs, values = [c for c, _ in points], [v for _, v in points]
        front = pareto_front(costs, values, lower)
        assert set(front) == front_by_force(points, lower)
        assert len(set(front)) == len(front)
        assert [costs[i] for i in front] == sorted(costs[i] for i in front)
        caps = [-1, 0.5, 2, 3, 99]
        for cap, best in zip(caps, best_within(costs, values, lower, caps), strict=True):
            within = [v for c, v in points if c is not None and v is not None and c <= cap]
            if best is None:
                assert not within
            else:
                assert costs[best] <= cap
                assert values[best] == (min if lower else max)(within)


@pytest.mark.parametrize("name", ["fid", "accuracy"])
def test_the_line_of_a_chart_is_the_front(name) -> None:
    rows, chart = drawn(name)
    pairs = [(row["gflops_per_image"], row["scores"][name]) for row in rows.rows]
    (front,) = [line for line in chart.series if line.style]
    wanted = front_by_force(pairs, SCORES[name].lower_is_better)
    assert list(zip(front.x, front.y, strict=True)) == sorted(pairs[i] for i in wanted)
    assert len(wanted) > 3


def test_budget_versus_steps() -> None:
    rows = Rows({"m": sweep_report(budgets=(0.25, 0.5, 1), steps=(5, 10, 20))})
    guide = guide_of(rows.rows[0])
    own = [i for i, row in enumerate(rows.rows) if guide_of(row) == guide]
    chart = budgets_chart(rows, "fid", guide)
    lines = lines_of(chart, style="-")
    assert sorted(itertools.chain(*lines)) == own
    for line in lines:
        assert [rows.rows[i]["steps"] for i in line] == [5, 10, 20]
        assert len({rows.rows[i]["budget"] for i in line}) == 1
    (strong,) = lines_of(chart, width=3)
    assert {rows.rows[i]["budget"] for i in strong} == {1}
    dotted = {line.label: line for line in chart.series if line.style == ":"}
    assert set(dotted) == {"5 steps", "10 steps", "20 steps"}
    for steps in (5, 10, 20):
        same = [rows.rows[i] for i in own if rows.rows[i]["steps"] == steps]
        same.sort(key=lambda row: row["gflops_per_image"])
        assert list(dotted[f"{steps} steps"].y) == [row["scores"]["fid"] for row in same]


def test_guided_lines_start_from_no_guidance() -> None:
    rows = Rows({"m": sweep_report(budgets=(0.25, 1), steps=(10, 20))})
    chart = guidance_chart(rows, "fid", 20)
    points = points_of(svg(chart))
    assert set(points) == {i for i, row in enumerate(rows.rows) if row["steps"] == 20}
    assert linear([rows.rows[i]["scale"] or 1.0 for i in points], [x for x, _ in points.values()])
    lines = [line for line in chart.series if line.label]
    assert len(lines) == 2 * 3  # budgets, kinds
    plain = [rows.rows[i] for i in points if rows.rows[i]["guidance"] == "none"]
    assert {(line.x[0], line.y[0]) for line in lines} == {(1.0, r["scores"]["fid"]) for r in plain}


def test_lines_hold_one_guide_each() -> None:
    rows = Rows({"m": sweep_report()})
    assert len(rows.guides()) == len(GUIDES)
    report = sweep_report(guides=GUIDES[:1])
    report["rows"].append(report["rows"][0] | {"guidance": "cfg", "scale": 2.0})
    assert Rows({"m": report}).guides() == [guide_of(report["rows"][0])]


def test_rows_without_a_score_or_a_cost_are_left_out() -> None:
    report = sweep_report(scores=("fid",))
    report["rows"][0]["scores"] = {}
    report["rows"][1]["scores"]["fid"] = math.inf
    report["rows"][2]["gflops_per_image"] = 0.0
    chart = cost_chart(Rows({"m": report}), "fid", "gflops_per_image")
    shown = itertools.chain(*lines_of(chart))
    assert set(range(len(report["rows"]))) - set(shown) == {0, 1, 2}
    assert cost_chart(Rows({"m": sweep_report(timed=False)}), "fid", "ms_per_image") is None


# ---- two models ----


def test_each_model_has_its_colour_and_its_front() -> None:
    reports = {"elit": sweep_report(), "dit": sweep_report(budgets=(1,), guides=GUIDES[:3], seed=5)}
    rows = Rows(reports)
    chart = cost_chart(rows, "fid", "gflops_per_image")
    for line in chart.series:
        assert {rows.models[i] for i in line.rows} <= {list(reports)[line.colour]}
    assert [line.colour for line in chart.series if line.style] == [0, 1]
    dashes = {"o": "none", "s": "cfg", "^": "ag", "D": "ccfg"}
    for line in chart.series:
        assert {rows.rows[i]["guidance"] for i in line.rows} <= {dashes.get(line.marker)}


@pytest.mark.parametrize("name", ["fid", "is"])
def test_the_best_at_each_cost(name) -> None:
    two = {"scores": ("fid", "is")}
    plain = sweep_report(budgets=(1,), guides=GUIDES[:3], seed=5, **two)
    reports = {"elit": sweep_report(**two), "dit": plain}
    rows, info = Rows(reports), SCORES[name]
    table = best_at_costs(rows, name)
    costs = [cost for cost, _ in table]
    assert costs == sorted(set(costs))
    assert 3 < len(costs) <= 12
    for cost, best in table:
        for model, i in best.items():
            rows_of = reports[model]["rows"]
            within = [r["scores"][name] for r in rows_of if r["gflops_per_image"] <= cost]
            wanted = (min if info.lower_is_better else max)(within, default=None)
            assert (None if i is None else rows.score(i, name)) == wanted
            assert i is None or rows.models[i] == model
    if name == "fid":
        shown = Page(compare_page(reports)).table("best")
        assert len(shown) == len(table) + 1
        assert shown[1][3:] == ["-", "-"]  # the plain model starts at a higher cost


# ---- axes and colours ----


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(("theme", "paper"), [("light", "#ffffff"), ("dark", "#15171c")])
@pytest.mark.parametrize("count", [2, 5, 16])
def test_budgets_are_told_apart_without_hues(theme, paper, count) -> None:
    """Lightness goes one way, and all stand out from the paper, the full budget most."""
    assert ramp(1) == [RAMPS["light"][-1]]
    assert ramp(4, "dark")[::3] == list(RAMPS["dark"][::3])
    lights = [luminance(colour) for colour in ramp(count, theme)]
    assert len(lights) == count
    assert lights == sorted(lights, reverse=theme == "light")
    for light in lights:
        pair = sorted([light, luminance(paper)])
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 3


ALONE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from elit.viz import heatmaps, page, sheet
from elit.viz.charts import Chart, Line, picture, svg
assert not {"matplotlib", "jinja2"} & set(sys.modules)
charts = [Chart(f"t{i}", "x", "y", [Line((1, 2), (i, 3), rows=(0, 1))]) for i in range(8)]
with ThreadPoolExecutor(4) as pool:
    drawn = list(pool.map(svg, charts))
assert drawn == [svg(chart) for chart in charts]
assert picture(charts[:1]).size == (800, 400)
import matplotlib
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams["svg.hashsalt"] is None
assert matplotlib.rcParams["axes.grid"] is False
"""


def test_charts_need_no_home_no_display_and_leave_matplotlib_as_it_was() -> None:
    """Matplotlib is imported when something is drawn; threads may draw at once."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "DISPLAY")}
    subprocess.run([sys.executable, "-c", ALONE], check=True, env=environment, timeout=120)


# ---- in a browser, where there is one ----

PROBE = """
<script>addEventListener("load", () => {
  const texts = (n) => [...document.querySelectorAll("#rows tbody tr")].map(
    (row) => row.cells[n].textContent);
  const heads = [...document.querySelectorAll("#rows th button")];
  const column = heads.findIndex((head) => head.textContent === "scale");
  heads[column].click();
  const up = texts(column);
  heads[column].click();
  const down = texts(column);
  const svg = document.querySelector(".charts svg");
  const dot = svg.querySelector("[data-row]");
  const at = new DOMPoint(dot.x.baseVal.value, dot.y.baseVal.value)
    .matrixTransform(svg.getScreenCTM());
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y }));
  const tip = document.getElementById("tip").textContent;
  const pick = document.querySelector("[data-picks=score]");
  pick.value = "is";
  pick.dispatchEvent(new Event("change"));
  const shown = [...document.querySelectorAll("figure[data-score]:not([hidden])")];
  document.title = JSON.stringify({ up, down, tip, row: dot.dataset.row,
    shown: shown.map((figure) => figure.dataset.score), wide: document.body.scrollWidth });
});</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_script_sorts_picks_and_tells(pages, tmp_path) -> None:
    path = tmp_path / "page.html"
    path.write_text(pages["usual"].replace("</body>", PROBE), encoding="utf-8")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--v=0", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900",
         "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    found = json.loads(Page(done.stdout).all("title")[0]["text"])
    numbers = [float(text) for text in found["up"] if text != "-"]
    assert numbers == sorted(numbers)
    assert found["up"][len(numbers) :] == ["-"] * (len(found["up"]) - len(numbers)) != []
    assert [t for t in found["down"] if t != "-"] == [f"{n:g}" for n in sorted(numbers)[::-1]]
    assert found["down"][-1] == "-"
    row = sweep_report(steps=(5, 20))["rows"][int(found["row"])]
    assert f"GFLOPs{row['gflops_per_image']:.4g}" in found["tip"]
    assert set(found["shown"]) == {"is"}
    assert found["wide"] <= 1200
