"""`elit compare`: which sweeps may stand side by side, and what is said of them."""

import copy
import itertools
import json
import re
from pathlib import Path

import pytest
from sweeps import GUIDES, sweep_report

from elit import ElitPipeline, create_model, make_scheduler
from elit.choosing.timing import CallTimes, ms_together
from elit.cli.main import main
from elit.evaluation.comparison import (
    check_comparable,
    differences,
    notes_on,
    ranking_of,
    read_sweeps,
    shared_points,
)
from elit.viz.sweeps import SCORES

SAMPLER = "FlowMatchEulerDiscreteScheduler"
NETWORK = sweep_report()["settings"]["networks"][0]


def elastic(**kwargs) -> dict:
    return sweep_report("runs/elit", **kwargs)


def plain(**kwargs) -> dict:
    return sweep_report("runs/dit", budgets=(1,), guides=GUIDES[:3], seed=1, **kwargs)


def swept(folder: Path, report: dict) -> Path:
    file = folder / "swept" / "sweep.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(report))
    return folder


@pytest.fixture
def compare(capsys, monkeypatch, tmp_path):
    """Runs `elit compare` in a folder with the runs elit and dit; gives code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    swept(tmp_path / "elit", elastic())
    swept(tmp_path / "dit", plain())

    def call(*words: str) -> tuple[int, str, str]:
        code = main(["compare", *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


# ---- the command ----


def test_a_plain_and_an_elastic_model(compare, tmp_path) -> None:
    code, out, err = compare("elit", "dit")
    assert (code, err) == (0, "")
    assert "elit: DiT, elastic, trained with 1.2 PFLOPs in 1600 steps" in out
    assert "dit: DiT, plain, trained with 1.2 PFLOPs" in out
    assert "FID, lower is better: 1000 samples, seed 0" in out
    assert "both at" not in out
    rows = {"elit": elastic()["rows"], "dit": plain()["rows"]}
    lines = [re.split(r"\s{2,}", line) for line in out.splitlines() if re.match(r"[\d.]+  ", line)]
    assert len(lines) > 3
    for cost, *cells in lines:
        for name, shown in zip(rows, cells[::2], strict=True):
            # Costs are printed with four digits: a row may cost that much more.
            within = [
                row["scores"]["fid"]
                for row in rows[name]
                if row["gflops_per_image"] <= float(cost) * (1 + 5e-4)
            ]
            assert shown == (f"{min(within):.4g}" if within else "-")
    assert out.splitlines()[-1] == "compare.html"
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<tr data-row") == len(rows["elit"]) + len(rows["dit"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "compare.html", "compare.json", "dit", "elit",
    ]  # fmt: skip


def test_two_elastic_models_meet_at_their_points(compare, tmp_path) -> None:
    other = elastic(seed=3)
    other["rows"] = other["rows"][10:]
    swept(tmp_path / "other", other)
    code, out, _ = compare("elit", "other", "--out", "new/both.html")
    assert code == 0
    table = out[out.index("both at") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) == len(other["rows"])
    for line, mine, theirs in zip(table, elastic()["rows"][10:], other["rows"], strict=True):
        cells = re.split(r"\s{2,}", line)
        wanted = [mine["gflops_per_image"], theirs["gflops_per_image"]]
        wanted += [mine["scores"]["fid"], theirs["scores"]["fid"]]
        assert cells[1:] == [f"{value:.4g}" for value in wanted]
    assert (tmp_path / "new" / "both.html").is_file()
    assert (tmp_path / "new" / "both.json").is_file()


def test_json_is_what_the_file_holds(compare, tmp_path) -> None:
    code, out, _ = compare("elit", "dit/swept/sweep.json", "--json")
    found = json.loads(out)
    assert code == 0
    assert found == json.loads((tmp_path / "compare.json").read_text())
    assert list(found["models"]) == ["elit", "dit"]
    assert found["settings"] == elastic()["settings"]
    assert (found["differences"], found["notes"]) == ({}, [])
    assert (found["ranked_by"], found["lower_is_better"]) == ("fid", True)
    assert len(found["shared"]) == 4 * 3  # steps and guides, at the full budget
    for line in found["best"]:
        for row in filter(None, line["best"].values()):
            assert row["gflops_per_image"] <= line["gflops_per_image"]


def test_training_that_differs_is_told(compare, tmp_path) -> None:
    other = plain(eflops=0.001)
    other["settings"] |= {"device_name": "another", "dtype": "bfloat16"}
    swept(tmp_path / "less", other)
    code, _, err = compare("elit", "less")
    assert code == 0
    words = "not at equal training FLOPs: elit 1.2 PFLOPs, less 1 PFLOPs (20 % more)"
    assert f"elit: warning: {words}" in err
    assert words in (tmp_path / "compare.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("elit", r"required: B; see `elit compare --help`"),
        ("elit elit", "elit and elit are the same sweep; give two different ones"),
        ("elit elit/swept", "the same sweep"),
        ("elit nowhere", "there is no nowhere; give a run's folder, or a sweep.json"),
        ("elit empty", r"there is no empty/swept/sweep.json; `elit sweep empty` measures"),
        ("elit torn.json", "torn.json is not JSON .* run `elit sweep` again"),
        ("elit list.json", r"list.json holds \[1\] instead of a JSON object; run `elit sweep`"),
        ("elit dit --out page.txt", "--out page.txt is not a page; give a name that .*html"),
        ("elit dit --out torn.json/x.html", "cannot write into torn.json: .*--out"),
        ("elit few.json", r"differ in samples \(1000 and 100\); run `elit sweep` on both"),
    ],
)
def test_mistakes_are_told(compare, tmp_path, words, message) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.json").write_text('{"format": 1, ')
    (tmp_path / "list.json").write_text("[1]")
    few = plain()
    few["settings"]["samples"] = 100
    (tmp_path / "few.json").write_text(json.dumps(few))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = compare(*words.split())
    assert (code, out) == (2, "")
    assert err.startswith("elit: error: ")
    assert re.search(message, err)
    assert sorted(tmp_path.rglob("*")) == before


# ---- what may be compared ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 100}, r"samples \(1000 and 100\)"),
        ({"seed": 7}, r"seed \(0 and 7\)"),
        ({"size": [32, 32]}, r"size \(16x16 and 32x32\)"),
        ({"eight_bit": False}, r"eight_bit \(True and False\)"),
        ({"drawn": "texts 1a2b"}, r"drawn \(classes, balanced and texts 1a2b\)"),
        ({"reference": {"name": "other", "digest": "beef"}}, r"reference \(c0ffee and beef\)"),
        ({"reference": None}, r"reference \(c0ffee and None\)"),
        ({"networks": []}, r"networks \(classifier sha256:77aa and none\)"),
        ({"networks": [NETWORK | {"preprocessing": "8 px"}]}, "networks"),
        ({"samples": 9, "seed": 7}, r"samples \(1000 and 9\), seed \(0 and 7\); run"),
    ],
)
def test_scores_of_other_things_are_not_compared(change, words) -> None:
    other = plain()
    other["settings"] |= change
    with pytest.raises(ValueError, match=f"a and b cannot be compared, for they differ in {words}"):
        check_comparable({"a": elastic(), "b": other})


@pytest.mark.parametrize("key", ["sampler", "dtype", "batch_size", "device", "vae", "versions"])
def test_what_may_differ_is_listed(key) -> None:
    other = plain()
    other["settings"][key] = "another"
    reports = {"a": elastic(), "b": other}
    check_comparable(reports)
    assert differences(reports) == {key: {"a": elastic()["settings"][key], "b": "another"}}


@pytest.mark.parametrize(
    ("first", "second", "note"),
    [
        (1.0, 1.0, None),
        (1.0, 0.951, None),
        (1.0, 0.949, r"not at equal training FLOPs: a 1 EFLOPs, b 949 PFLOPs \(5 % more\)"),
        (0.5, 1.0, r"a 500 PFLOPs, b 1 EFLOPs \(100 % more\)"),
        (0.0, 1.0, "not at equal training FLOPs"),
        (0.0, 0.0, None),
        (None, 1.0, "the training FLOPs of a are not known"),
        (1.0, None, "the training FLOPs of b are not known"),
    ],
)
def test_training_is_compared(first, second, note) -> None:
    notes = notes_on({"a": elastic(eflops=first), "b": plain(eflops=second)})
    assert len(notes) == (note is not None)
    assert note is None or re.search(note, notes[0])


def test_times_of_two_sweeps_are_left_out(compare, tmp_path) -> None:
    """They were taken under whatever load there was."""
    code, out, _ = compare("elit", "dit", "--json")
    best = [row for line in json.loads(out)["best"] for row in line["best"].values() if row]
    assert code == 0
    assert {row["ms_per_image"] for row in best} == {row["front_ms"] for row in best} == {None}
    assert "ms per image" not in (tmp_path / "compare.html").read_text()


def test_times_are_taken_in_turns() -> None:
    """On one device, in one process: every round has a call of each model."""
    names = ("elit-dit-tiny/2", "dit-tiny/2")
    pipes = {n: ElitPipeline(create_model(n), make_scheduler("euler")) for n in names}
    seen = []
    several = [
        (CallTimes(pipe, 2, anew=True), [pipe.calls(num_inference_steps=steps) for steps in (2, 4)])
        for pipe in pipes.values()
    ]
    for name, pipe in pipes.items():
        pipe.transformer.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    ms = ms_together(several)
    assert all(0 < few < many for few, many in ms)
    turns = [name for name, _ in itertools.groupby(seen)]
    assert turns == [*names] * (len(turns) // 2)
    assert len(turns) >= 8
    assert not any(times.file.exists() for times, _ in several)


@pytest.mark.slow
def test_times_on_the_command_line(compare, tmp_path) -> None:
    reports = elastic(), plain()
    for name, preset, report in zip(("a", "b"), ("elit-dit-tiny/2", "dit-tiny/2"), reports,
                                    strict=True):  # fmt: skip
        report["settings"] |= {"size": [16, 16], "batch_size": 2, "sampler": SAMPLER}
        cache = {"kind": "FirstBlockCache", "threshold": 0.1}
        report["rows"].append(report["rows"][0] | {"steps": 3, "cache": cache})
        ElitPipeline(create_model(preset), make_scheduler("euler")).save_pretrained(tmp_path / name)
        swept(tmp_path / name, report)
    code, out, err = compare("a", "b", "--times", "--device", "cpu", "--json")
    assert code == 0, err
    best = [row for line in json.loads(out)["best"] for row in line["best"].values() if row]
    assert all(row["ms_per_image"] > 0 for row in best if "cache" not in row)
    assert "ms per image" in (tmp_path / "compare.html").read_text()


def test_points_are_shared_where_everything_is_the_same() -> None:
    one, two = elastic(), elastic(seed=4)
    two["rows"][0]["interval"] = [0.1, 0.9]
    two["rows"][1]["scale"] = 9.0
    two["rows"][2]["guide_budget"] = 0.5
    two["rows"][3]["sampler"] = "another"
    two["rows"][4]["steps"] = 6
    two["rows"][5]["budgets_of_steps"] = [1.0, 0.5]
    two["rows"][6]["cache"] = {"kind": "FirstBlockCache", "threshold": 0.1}
    two["rows"].reverse()
    shared = shared_points({"a": one, "b": two})
    assert len(shared) == len(one["rows"]) - 7
    theirs = {json.dumps(row["scores"]): row for row in two["rows"]}
    for point in shared:
        scores = {score: own["b"] for score, own in point["scores"].items()}
        row = theirs[json.dumps(scores)]
        for key in ("budget", "steps", "guidance", "scale", "guide_budget", "interval"):
            assert row[key] == point[key]
        assert point["gflops_per_image"]["b"] == row["gflops_per_image"]


def test_the_score_that_ranks() -> None:
    a, b = elastic(scores=("is", "fid", "accuracy")), plain(scores=("fid", "accuracy"))
    assert ranking_of({"a": b, "b": a}) == "fid"
    assert ranking_of({"a": a, "b": b}) == "fid"  # `is` is not in both
    for row in b["rows"]:
        row["scores"]["fid"] = None
    assert ranking_of({"a": a, "b": b}) == "accuracy"
    with pytest.raises(ValueError, match=r"a and b have no score in common: accuracy.*; kid; run"):
        ranking_of({"a": a, "b": plain(scores=("kid",))})


def test_names_are_those_of_the_runs(tmp_path) -> None:
    one, two = swept(tmp_path / "x" / "run", elastic()), swept(tmp_path / "y" / "run", plain())
    lone = tmp_path / "lone.json"
    lone.write_text(json.dumps(plain()))
    assert list(read_sweeps(str(one), str(lone))) == ["run", "lone"]
    assert list(read_sweeps(str(one), str(two))) == [f"{one}/swept", f"{two}/swept"]
    moved = tmp_path / "moved" / "sweep.json"
    moved.parent.mkdir()
    moved.write_text(json.dumps(plain()))
    assert list(read_sweeps(str(moved), str(one))) == ["moved", "run"]


def row(**values):
    return lambda r: r["rows"][5].update(values)


HUGE = 10**400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format=2), "another version of elit; run `elit sweep`"),
        (lambda r: r.pop("settings"), "no settings"),
        (lambda r: r.update(rows=5), "rows 5"),
        (lambda r: r.update(rows=[]), "has no rows; run `elit sweep` to its end"),
        (lambda r: r["rows"].append(3), "rows "),
        (lambda r: r["rows"][5].pop("scores"), "row 5: no scores"),
        (row(gflops_per_image=None), "row 5: gflops_per_image None"),
        (row(gflops_per_image=-1), "row 5: gflops_per_image -1"),
        (row(gflops_per_image=HUGE), "row 5: gflops_per_image 1000"),
        (row(scores={"fid": float("nan")}), "row 5: scores"),
        (row(scores={"fid": "x"}), "row 5: scores"),
        (row(scores=[1]), "row 5: scores"),
        (row(scores={"fid": HUGE}), "row 5: scores"),
        (row(scores={"beauty": 1.0}), "has a score 'beauty' that this"),
        (row(budget=9), "row 5: budget 9"),
        (row(budget=0), "row 5: budget 0"),
        (row(steps=0), "row 5: steps 0"),
        (row(guidance="zz"), "row 5: guidance 'zz'"),
        (row(guidance=[]), "row 5: guidance"),
        (row(guidance=["cfg"]), "row 5: guidance "),
        (row(sampler=["a"]), "row 5: sampler "),
        (row(budget=HUGE), "row 5: budget "),
        (row(steps=1.5), "row 5: steps 1.5"),
        (row(scale="zz"), "row 5: scale 'zz'"),
        (row(scale=None), "row 5: scale None"),
        (row(interval=[0.5]), "row 5: interval"),
        (row(interval={}), "row 5: interval"),
        (row(interval=[0.9, 0.1]), "row 5: interval"),
        (lambda r: r.update(lower_is_better="no"), "lower_is_better 'no'"),
        (lambda r: r["settings"].update(reference=3), "settings: reference 3"),
        (lambda r: r["model"].update(training=3), "model: training 3"),
        (lambda r: r["model"].update(training={"eflops": "many"}), "model: training {'eflops'"),
        (lambda r: r["model"].update(weights=3), "model: weights 3"),
        (lambda r: r.update(model=3), "no result of `elit sweep`: model 3"),
    ],
)
def test_files_that_are_no_sweep(tmp_path, change, message) -> None:
    report = copy.deepcopy(elastic())
    change(report)
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(report))
    with pytest.raises(ValueError, match=message) as raised:
        read_sweeps(str(file), str(swept(tmp_path / "run", plain())))
    assert str(file) in str(raised.value)


def test_a_sweep_is_never_overwritten(tmp_path, capsys) -> None:
    one, two = swept(tmp_path / "one", elastic()), swept(tmp_path / "two", plain())
    before = (one / "swept" / "sweep.json").read_bytes()
    out = one / "swept" / "sweep.html"
    assert main(["compare", str(one), str(two), "--out", str(out)]) == 2
    assert "is there and no comparison" in capsys.readouterr().err
    assert (one / "swept" / "sweep.json").read_bytes() == before
    out = tmp_path / "compare.html"
    assert [main(["compare", str(one), str(two), "--out", str(out)]) for _ in "ab"] == [0, 0]


def test_every_score_has_a_title_and_a_direction() -> None:
    higher = {"is", "precision", "recall", "density", "coverage", "clip", "accuracy"}
    assert {name for name, info in SCORES.items() if not info.lower_is_better} == higher
    assert set(SCORES) - higher == {"fid", "sfid", "fdd", "fd", "kid", "fvd"}
    assert len({info.title for info in SCORES.values()}) == len(SCORES)
