"""The page of a sweep: what stands in it, where its points lie, that it needs nothing else."""

import base64
import io
import itertools
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image, ImageChops
from sweeps import GUIDES, INFOS, sweep_report

from elit._pareto import best_within, pareto_front
from elit.viz import charts
from elit.viz.axes import distinct, even_values, ramp, round_values, short
from elit.viz.charts import BOX, Axis, ScoreInfo, Series, chart
from elit.viz.figures import (
    Rows,
    best_at_costs,
    budgets_chart,
    cost_chart,
    guidance_chart,
    guide_of,
    guides_by_use,
    steps_chart,
)
from elit.viz.page import RAMPS, compare_page, sweep_page

FID = INFOS["fid"]
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


def points_of(svg: str, kind: str = "dots") -> list[tuple[int, float, float]]:
    """(row, x, y) of all points of the paths of a class."""
    found = []
    for path in Page(svg).all("path"):
        if kind in path["at"]["class"].split():
            places = [float(text) for text in re.findall(r"[\d.]+", path["at"]["d"])]
            rows = path["at"].get("data-rows", "").split() or ["-1"] * (len(places) // 2)
            # One point alone has "h0" behind it.
            pairs = list(zip(places[::2], places[1::2], strict=False))
            found += [(int(row), x, y) for row, (x, y) in zip(rows, pairs, strict=True)]
    return found


def line_through(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """Slope and offset of the straight line through the outermost points."""
    low, high = xs.index(min(xs)), xs.index(max(xs))
    slope = (ys[high] - ys[low]) / (xs[high] - xs[low])
    return slope, ys[low] - slope * xs[low]


# ---- a page is a whole ----


def odd(report: dict) -> dict:
    """The report with words that would break a page."""
    report["model"]["path"] = "</title><script>alert('1')</script>&amp;"
    report["settings"]["device_name"] = '"><img src=x onerror=alert(2)>'
    report["settings"]["reference"]["name"] = "</script><!--"
    report["rows"][0]["guidance"] = "<i>new</i>"
    report["rows"][0]["sampler"] = "a<b"
    return report


PAGES = {
    "usual": lambda: sweep_page(sweep_report(), INFOS, [("noise <1>", Image.new("RGB", (9, 5)))]),
    "one row": lambda: sweep_page(
        sweep_report(budgets=(1,), steps=(40,), guides=GUIDES[:1]), INFOS
    ),
    "no times": lambda: sweep_page(sweep_report(timed=False), INFOS),
    "one score": lambda: sweep_page(sweep_report(scores=("kid",)), INFOS),
    "no scores": lambda: sweep_page(sweep_report(scores=("fid",)) | {"rows": unscored()}, INFOS),
    "plain": lambda: sweep_page(sweep_report(budgets=(1,), guides=GUIDES[:3]), INFOS),
    "odd": lambda: sweep_page(odd(sweep_report()), INFOS),
    "two": lambda: compare_page(
        {"elit <a>": sweep_report(), "dit": sweep_report(budgets=(1,), seed=1)}, INFOS, (), ["<no>"]
    ),
    "three, odd": lambda: compare_page(
        {"a": odd(sweep_report()), "b": sweep_report(timed=False), "c": sweep_report(seed=2)}, INFOS
    ),
}


def one_row() -> dict:
    return sweep_report(budgets=(1,), steps=(40,), guides=GUIDES[:1])


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
                assert value.startswith("data:")
    assert not re.search(r"\w:/|[\"'(=]//", pages[name])
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
    report = odd(sweep_report())
    held = json.loads(Page(pages["odd"]).all("script", id="report")[0]["text"])
    assert held == json.loads(json.dumps(report))
    report["rows"][3]["scores"]["fid"] = math.nan
    report["rows"][4]["ms_per_image"] = math.inf
    page = Page(sweep_page(report, INFOS))
    held = json.loads(page.all("script", id="report")[0]["text"])
    assert held["rows"][3]["scores"]["fid"] is None
    assert held["rows"][4]["ms_per_image"] is None
    rows = page.table("rows")
    assert rows[4][rows[0].index("FID ↓")] == rows[5][rows[0].index("ms")] == "-"


def test_every_row_is_in_the_table() -> None:
    report = sweep_report()
    report["rows"][1] |= {"interval": [0.1, 0.8], "front_flops": True, "front_ms": True}
    report["rows"][2]["scores"]["is"] = None
    head, *lines = Page(sweep_page(report, INFOS)).table("rows")
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
    report = sweep_report()
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
    facts = dict(Page(sweep_page(report, INFOS)).table("settings"))
    assert facts["phase of the moon"] == "waxing yes, share 0.3"


def test_models_side_by_side_show_where_their_settings_differ(pages) -> None:
    other = sweep_report(seed=1)
    other["settings"]["dtype"] = "bfloat16"
    page = Page(compare_page({"a": sweep_report(), "b": other}, INFOS))
    differing = [e["text"] for e in page.all("tr", **{"class": "differs"})]
    assert any("float32bfloat16" in text for text in differing)
    assert len(differing) == 2  # and the weights
    assert page.all("p", **{"class": "warning"}) == []
    assert Page(pages["two"]).all("p", **{"class": "warning"})[0]["text"] == "<no>"


def test_the_first_choice_of_each_picker_is_shown(pages) -> None:
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


def test_the_score_that_ranks_comes_first() -> None:
    report = sweep_report() | {"ranked_by": "accuracy"}
    assert Page(sweep_page(report, INFOS)).all("option")[0]["at"]["value"] == "accuracy"


def test_sheets_are_in_the_page(pages) -> None:
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    (image,) = Page(sweep_page(sweep_report(), INFOS, [("a & b", picture)])).all("img")
    held = base64.b64decode(image["at"]["src"].removeprefix("data:image/png;base64,"))
    assert not ImageChops.difference(Image.open(io.BytesIO(held)), picture).getbbox()
    assert image["at"]["alt"] == "a & b"


def test_two_thousand_rows_stay_small() -> None:
    budgets = tuple((k + 1) / 16 for k in range(16))
    scores = ("fid", "fdd", "is", "precision", "recall", "kid", "density", "coverage")
    report = sweep_report(budgets=budgets, steps=tuple(range(4, 88, 4)), scores=scores)
    report["rows"] = report["rows"][:2000]
    text = sweep_page(report, INFOS)
    assert text.count("<tr data-row") == 2000
    assert len(text.encode()) < 5e6


def test_what_cannot_be_shown_is_said() -> None:
    with pytest.raises(ValueError, match="the sweep has no rows; run `elit sweep` first"):
        sweep_page(sweep_report() | {"rows": []}, INFOS)
    with pytest.raises(ValueError, match="score 'accuracy' has no title and no direction"):
        sweep_page(sweep_report(), {"fid": FID, "is": INFOS["is"]})
    with pytest.raises(ValueError, match="1 sweeps cannot be compared; give two or more"):
        compare_page({"a": sweep_report()}, INFOS)


def test_what_was_not_measured_is_said(pages) -> None:
    assert "No times were measured" in pages["no times"]
    assert "No times were measured" not in pages["usual"]
    assert "ms per image" not in pages["no times"]
    assert "No row has a score yet" in pages["no scores"]
    assert "Guidance</h2>" not in pages["one row"]


# ---- charts ----


def drawn(name: str, **kwargs) -> tuple[Rows, str]:
    rows = Rows({"m": sweep_report(scores=(name,), **kwargs)})
    return rows, cost_chart(rows, name, INFOS[name], "gflops_per_image")


@pytest.mark.parametrize("name", ["fid", "kid", "is", "accuracy"])
def test_points_lie_where_their_values_say(name) -> None:
    """Linear in the logarithm of the cost and in the score; ticks by the same measure."""
    rows, svg = drawn(name)
    points = points_of(svg)
    assert sorted(row for row, _, _ in points) == list(range(len(rows.rows)))
    left, top, right, bottom = BOX
    assert all(left <= x <= right and top <= y <= bottom for _, x, y in points)
    costs = [math.log(rows.rows[row]["gflops_per_image"]) for row, _, _ in points]
    scores = [rows.rows[row]["scores"][name] for row, _, _ in points]
    across = line_through(costs, [x for _, x, _ in points])
    up = line_through(scores, [y for _, _, y in points])
    assert across[0] > 0 > up[0]
    for cost, score, (_, x, y) in zip(costs, scores, points, strict=True):
        assert x == pytest.approx(across[0] * cost + across[1], abs=0.15)
        assert y == pytest.approx(up[0] * score + up[1], abs=0.15)
    ticks = [e for e in Page(svg).all("text") if "tick" in e["at"]["class"]]
    below = [e for e in ticks if "middle" in e["at"]["class"]]
    beside = [e for e in ticks if "end" in e["at"]["class"]]
    assert len(below) >= 3
    assert len(beside) >= 3
    for e in below:
        x = across[0] * math.log(float(e["text"])) + across[1]
        assert float(e["at"]["x"]) == pytest.approx(x, abs=0.3)
    for e in beside:
        y = up[0] * float(e["text"]) + up[1] + 4
        assert float(e["at"]["y"]) == pytest.approx(y, abs=0.3)


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
    points = [(x, y, i) for i, (x, y) in enumerate(CASES[case])]
    svg = chart([Series(points, 0, line="thin", label="a long label")], "cost", "s", log_x=log_x)
    left, top, right, bottom = BOX
    found = points_of(svg)
    assert len(found) == len(points)
    assert all(left <= x <= right and top <= y <= bottom for _, x, y in found)
    texts = [e for e in Page(svg).all("text") if "tick" in e["at"]["class"]]
    for side in ("middle", "end"):
        own = [e["text"] for e in texts if side in e["at"]["class"]]
        assert 1 <= len(own) <= 12
        assert len(set(own)) == len(own)
    for e in Page(svg).all("text"):
        half = len(e["text"]) * 6.5
        x, classes = float(e["at"]["x"]), e["at"]["class"]
        reach = {"middle": (x - half / 2, x + half / 2), "end": (x - half, x)}
        low, high = reach["middle" if "middle" in classes else "end"] if classes else (x, x + half)
        assert low >= -2
        assert high <= charts.WIDTH + 2
    places = [e for e in texts if "middle" in e["at"]["class"]]
    for one, two in itertools.pairwise(places):
        gap = float(two["at"]["x"]) - float(one["at"]["x"])
        assert gap > 6 * (len(one["text"]) + len(two["text"])) / 2


def test_scores_that_differ_much_get_a_log_axis() -> None:
    svg = chart([Series([(1, 2.0, 0), (2, 20.0, 1), (3, 200.0, 2)])], "cost", "FID", log_x=False)
    (low, middle, high) = [y for _, _, y in points_of(svg)]
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert "FID (log scale)" in svg


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


def test_the_front_leaves_out_what_is_no_number() -> None:
    assert pareto_front([1, 2, 3, 4], [math.nan, math.inf, True, 5], True) == [3]


@pytest.mark.parametrize("name", ["fid", "accuracy"])
def test_the_line_of_a_chart_is_the_front(name) -> None:
    rows, svg = drawn(name)
    pairs = [(row["gflops_per_image"], row["scores"][name]) for row in rows.rows]
    wanted = front_by_force(pairs, INFOS[name].lower_is_better)
    places = {row: (x, y) for row, x, y in points_of(svg)}
    line = [(x, y) for _, x, y in points_of(svg, "front")]
    assert len(line) == len(wanted) > 3
    assert sorted(line) == sorted(places[i] for i in wanted)


def lines_of(svg: str, kind: str) -> list[list[int]]:
    """Rows of each line of a class that carries its points."""
    return [
        [int(row) for row in path["at"]["data-rows"].split()]
        for path in Page(svg).all("path")
        if kind in path["at"]["class"].split() and "data-rows" in path["at"]
    ]


def test_budget_versus_steps() -> None:
    rows = Rows({"m": sweep_report(budgets=(0.25, 0.5, 1), steps=(5, 10, 20))})
    guide = guide_of(rows.rows[0])
    own = [i for i, row in enumerate(rows.rows) if guide_of(row) == guide]

    svg = steps_chart(rows, "fid", FID, guide)
    lines = lines_of(svg, "line")
    assert sorted(itertools.chain(*lines)) == own
    for line in lines:
        assert [rows.rows[i]["steps"] for i in line] == [5, 10, 20]
        assert len({rows.rows[i]["budget"] for i in line}) == 1
    assert {rows.rows[i]["budget"] for line in lines_of(svg, "strong") for i in line} == {1}
    assert [e["text"] for e in Page(svg).all("text") if "middle" in e["at"]["class"]][:3] == [
        "5", "10", "20",
    ]  # fmt: skip

    svg = budgets_chart(rows, "fid", FID, guide)
    (strong,) = lines_of(svg, "strong")
    assert [(rows.rows[i]["budget"], rows.rows[i]["steps"]) for i in strong] == [
        (1, 5), (1, 10), (1, 20),
    ]  # fmt: skip
    thin = [path["at"]["d"] for path in Page(svg).all("path") if "thin" in path["at"]["class"]]
    place = {row: f"{x:g} {y:g}" for row, x, y in points_of(svg)}
    for steps in (5, 10, 20):
        same = [i for i in own if rows.rows[i]["steps"] == steps]
        same.sort(key=lambda i: rows.rows[i]["gflops_per_image"])
        assert "M" + " ".join(place[i] for i in same) in thin
    assert {"5 steps", "10 steps", "20 steps"} <= {
        e["text"] for e in Page(svg).all("text", **{"class": "label middle"})
    }


def test_guided_lines_start_from_no_guidance() -> None:
    rows = Rows({"m": sweep_report(budgets=(0.25, 1), steps=(10, 20))})
    svg = guidance_chart(rows, "fid", FID, 20)
    dots = {row: (x, y) for row, x, y in points_of(svg)}
    assert set(dots) == {i for i, row in enumerate(rows.rows) if row["steps"] == 20}
    scales = [rows.rows[i]["scale"] or 1.0 for i in dots]
    slope, offset = line_through(scales, [x for x, _ in dots.values()])
    for scale, (x, _) in zip(scales, dots.values(), strict=True):
        assert x == pytest.approx(slope * scale + offset, abs=0.15)
    lines = [p["at"]["d"] for p in Page(svg).all("path") if "dashed" in p["at"]["class"]]
    assert len(lines) == 2 * 3  # budgets, kinds
    starts = {f"{x:g} {y:g}" for i, (x, y) in dots.items() if rows.rows[i]["guidance"] == "none"}
    assert {" ".join(line[1:].split()[:2]) for line in lines} == starts


def test_lines_hold_one_guide_each() -> None:
    rows = Rows({"m": sweep_report()})
    guides = guides_by_use(rows)
    assert len(guides) == len(GUIDES)
    report = sweep_report(guides=GUIDES[:1])
    report["rows"].append(report["rows"][0] | {"guidance": "cfg", "scale": 2.0})
    assert guides_by_use(Rows({"m": report})) == [guide_of(report["rows"][0])]


def test_rows_without_a_score_or_a_cost_are_left_out() -> None:
    report = sweep_report(scores=("fid",))
    report["rows"][0]["scores"] = {}
    report["rows"][1]["scores"]["fid"] = math.inf
    report["rows"][2]["gflops_per_image"] = 0.0
    rows = Rows({"m": report})
    left_out = set(range(len(rows.rows))) - {row for row, _, _ in points_of(
        cost_chart(rows, "fid", FID, "gflops_per_image"))}  # fmt: skip
    assert left_out == {0, 1, 2}
    assert cost_chart(Rows({"m": sweep_report(timed=False)}), "fid", FID, "ms_per_image") is None


# ---- two models ----


def test_each_model_has_its_colour_and_its_front() -> None:
    reports = {"elit": sweep_report(), "dit": sweep_report(budgets=(1,), guides=GUIDES[:3], seed=5)}
    rows = Rows(reports)
    svg = cost_chart(rows, "fid", FID, "gflops_per_image")
    for path in Page(svg).all("path"):
        if "dots" in path["at"]["class"]:
            models = {rows.models[int(row)] for row in path["at"]["data-rows"].split()}
            colour = re.search(r"c\d", path["at"]["class"])[0]
            assert models == {list(reports)[int(colour[1])]}
    fronts = [p["at"]["class"] for p in Page(svg).all("path") if "front" in p["at"]["class"]]
    assert [re.search(r"c\d", names)[0] for names in fronts] == ["c0", "c1"]


@pytest.mark.parametrize("name", ["fid", "is"])
def test_the_best_at_each_cost(name) -> None:
    reports = {"elit": sweep_report(), "dit": sweep_report(budgets=(1,), guides=GUIDES[:3], seed=5)}
    rows, info = Rows(reports), INFOS[name]
    table = best_at_costs(rows, name, info)
    costs = [cost for cost, _ in table]
    assert costs == sorted(set(costs))
    assert 3 < len(costs) <= 12
    for cost, best in table:
        for model, i in best.items():
            within = [
                row["scores"][name]
                for row in reports[model]["rows"]
                if row["gflops_per_image"] <= cost
            ]
            wanted = (min if info.lower_is_better else max)(within, default=None)
            assert (None if i is None else rows.score(i, name)) == wanted
            assert i is None or rows.models[i] == model
    page = Page(compare_page(reports, INFOS))
    shown = page.table("best")
    if name == "fid":
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
    lights = [luminance(colour) for colour in ramp(RAMPS[theme], count)]
    assert len(lights) == count
    assert lights == sorted(lights, reverse=theme == "light")
    for light in lights:
        pair = sorted([light, luminance(paper)])
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 3


def test_one_budget_has_the_strongest_colour() -> None:
    assert ramp(RAMPS["light"], 1) == [RAMPS["light"][-1]]
    assert [c.lower() for c in ramp(RAMPS["dark"], 4)] == list(RAMPS["dark"])


def test_round_values_lie_between() -> None:
    draw = random.Random(3)
    for _ in range(300):
        low = 10 ** draw.uniform(-6, 6)
        high = low * 10 ** draw.uniform(0.01, 7)
        values = round_values(low, high)
        assert 2 <= len(values) <= 12
        assert all(low * (1 - 1e-6) <= v <= high * (1 + 1e-6) for v in values)
        assert values == sorted(set(values))
        assert all(len(f"{v:.6g}".strip("0.").replace(".", "").split("e")[0]) <= 4 for v in values)


def test_warnings_of_rows_stand_on_top() -> None:
    report = sweep_report()
    for row in report["rows"][:3]:
        row["warnings"] = ["<few> samples"]
    page = sweep_page(report, INFOS)
    said = f'<p class="warning">3 of {len(report["rows"])} rows: &lt;few&gt; samples</p>'
    assert page.count(said) == 1
    assert page.index(said) < page.index("<h2")
    assert 'class="warning"' not in sweep_page(sweep_report(), INFOS)


def test_even_values_go_below_nothing() -> None:
    assert even_values(0.2, 0.1, -0.25) == pytest.approx([-0.2, -0.1, 0, 0.1, 0.2])
    assert even_values(100, 16) == [0, 20, 40, 60, 80, 100]
    assert len(even_values(1e9 + 1, 0.2, 1e9)) == 6


def test_numbers_are_as_short_as_keeps_them_apart() -> None:
    assert distinct([0.1, 0.25, 1500]) == ["0.1", "0.25", "1.5k"]
    assert distinct([1000.1, 1000.2]) == ["1.0001k", "1.0002k"]
    assert short(-2_500_000) == "-2.5M"


def test_every_line_has_its_label_and_none_covers_another() -> None:
    """Also where all lines begin nearly in one point."""
    for spread in (0.0, 0.001, 1.0, 50.0):
        series = [
            Series([(4, 1 + spread * k, 2 * k), (8, 2.0, 2 * k + 1)], k, label=f"budget {k}")
            for k in range(7)
        ]
        labels = Page(chart(series, "steps", "s")).all("text", **{"class": "label middle"})
        placed = sorted((float(e["at"]["y"]), e["text"]) for e in labels)
        # Higher scores stand higher, of alike ones the first.
        names = [f"budget {k}" for k in range(7)]
        assert [text for _, text in placed] == (names[::-1] if spread else names)
        heights = [y for y, _ in placed]
        assert all(below - above >= 11.9 for above, below in itertools.pairwise(heights))
        assert BOX[1] <= heights[0]
        assert heights[-1] <= BOX[3]


def test_lines_from_one_point_share_their_label() -> None:
    series = [Series([(1, 1.0, 0), (2, y, 1)], 0, label="budget 1") for y in (2.0, 3.0)]
    labels = Page(chart(series, "scale", "s")).all("text", **{"class": "label middle"})
    assert [e["text"] for e in labels] == ["budget 1"]


@pytest.mark.parametrize("seed", range(20))
def test_labels_move_as_little_as_keeps_them_apart(seed) -> None:
    draw = random.Random(seed)
    wanted = [draw.uniform(40, 250) for _ in range(draw.randint(1, 12))]
    moved = charts._apart(wanted, 36, 258)
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    assert order == sorted(range(len(wanted)), key=moved.__getitem__)
    gaps = [moved[b] - moved[a] for a, b in itertools.pairwise(order)]
    assert all(gap >= 12 - 1e-9 for gap in gaps)
    assert min(moved) >= 36
    assert max(moved) <= 258 + 1e-9
    # What stands free of its neighbours was not moved at all.
    for i, y in enumerate(moved):
        near = [other for k, other in enumerate(moved) if k != i and abs(other - y) < 12 + 1e-6]
        assert near or y == pytest.approx(wanted[i])
    many = [100.0] * 30
    assert charts._apart(many, 36, 258) == many


def test_an_axis_leaves_room_for_labels() -> None:
    for log in (True, False):
        tight, roomy = Axis([1, 10], log=log), Axis([1, 10], log=log, room=0.5)
        assert tight.share(1) < 0.1
        assert 0.3 < roomy.share(1) < 0.5
        assert roomy.share(10) > 0.9


def test_a_direction_is_named() -> None:
    assert ScoreInfo("FID", True).axis() == "FID, lower is better"
    assert INFOS["is"].axis() == "Inception Score, higher is better"


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
  const dots = svg.querySelector(".dots");
  const [x, y] = dots.getAttribute("d").match(/[\\d.]+/g);
  const at = new DOMPoint(+x, +y).matrixTransform(svg.getScreenCTM());
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y }));
  const tip = document.getElementById("tip").textContent;
  const pick = document.querySelector("[data-picks=score]");
  pick.value = "is";
  pick.dispatchEvent(new Event("change"));
  const shown = [...document.querySelectorAll("figure[data-score]:not([hidden])")];
  document.title = JSON.stringify({ up, down, tip, row: dots.dataset.rows.split(" ")[0],
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
    row = sweep_report()["rows"][int(found["row"])]
    assert f"GFLOPs{row['gflops_per_image']:.4g}" in found["tip"]
    assert set(found["shown"]) == {"is"}
    assert found["wide"] <= 1200
