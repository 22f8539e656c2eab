"""`elit reproduce`: the rule, equal FLOPs, spread pictures, and a micro study end to end."""

import json
import math
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import elit
from elit.cli import reproduce as command
from elit.cli.main import command_parser, main
from elit.interface.budget import format_budget
from elit.models.presets import create_model
from elit.reproduce.claims import CLAIMS, first_below, reaches_final_loss
from elit.reproduce.evidence import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Study,
    Values,
    judge,
    judge_order,
    judge_reach,
)  # fmt: skip
from elit.reproduce.report import PAGE, PICTURE, RESULTS, TABLE, summary
from elit.reproduce.runs import VARIANTS, Piece, Trainings, equal_steps
from elit.reproduce.scales import CONFIGS, SCALES, Scale, Size
from elit.reproduce.spread import SpreadDiT, build_spread_model, gather, spread
from elit.reproduce.study import _ROOMS, STAMP, reproduce
from elit.reproduce.workers import Workers, way_out
from elit.training.config import DataConfig
from elit.training.config_files import load_config
from elit.training.loop import TrainingDivergedError

MICRO = Scale(
    "micro", (Size("16x3", 16, 2, 3, 1, 1, steps=4, lr=3e-3),), seeds=2, few_seeds=1,
    spread_steps=2, images=16, samples=64, sampling_steps=1, guidance_scales=(2.0,),
    equal_steps=(1,), draw_budgets=(1.0, 1 / 4), inspected=4, sigmas=(0.5,), random_sets=1,
    batch_size=4, validations=2,
)  # fmt: skip
DIGITS = DataConfig("digits")


def study(folder: Path, claims: str = "a", scale: Scale = MICRO, **more):
    return reproduce(scale, folder, DIGITS, list(claims), workers=1, progress=False, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    assert study(folder, "fg").finished
    return folder


# ---- the rule ----


def test_two_standard_errors_decide() -> None:
    # Mean 2, standard deviation sqrt(2), so a standard error of 1: exactly two are not beyond.
    for differences, word in (
        ([1.0, 3.0], UNDECIDED), ([1.01, 3.0], HOLDS), ([-1.01, -3.0], FAILS), ([5.0], UNDECIDED),
        ([0.0, 0.0], UNDECIDED), ([], UNDECIDED),
    ):  # fmt: skip
        assert judge(differences).word == word, differences
    verdict = judge([1.0, 2.0, 3.0])
    assert (verdict.difference, verdict.seeds) == (2.0, 3)
    assert verdict.error == pytest.approx(1 / math.sqrt(3))
    assert judge([]).difference is None
    assert f"{Values([1, 3]):.2f}" == "2.00 ± 1.00"
    assert f"{Values([2])}" == "2.0000"  # a single seed has no error


def test_one_step_against_the_order_is_enough() -> None:
    low, middle, high = map(Values, ([1.0, 1.1], [2.0, 2.1], [3.0, 3.1]))
    assert judge_order([low, middle, high]).word == HOLDS
    assert judge_order([high, middle, low]).word == FAILS
    assert judge_order([low, Values([0.5, 0.6]), high]).word == FAILS
    # Neither up nor down within its error.
    assert judge_order([low, Values([0.0, 4.0]), high]).word == HOLDS


def test_when_a_curve_is_first_below() -> None:
    curve = [(10, 4.0), (20, 2.0), (30, 1.0)]
    assert first_below(curve, 3.0) == 15
    assert first_below(curve, 2.0) == 20
    assert first_below(curve, 5.0) == 10
    assert first_below(curve, 0.5) is None


# ---- made-up results ----

MADE_UP = replace(
    MICRO, seeds=3, few_seeds=3, spread_steps=7, sampling_steps=20, equal_steps=(4, 8),
    guidance_scales=(2.0, 3.0), sigmas=(0.3, 0.5),
)  # fmt: skip
LOSSES = {
    "dit": 1.0, "elit": 0.95, "elit-mb": 0.90, "elit-mb-random": 0.92, "elit-1x1": 1.0,
    "elit-2x2": 0.97, "elit-whole": 1.0, "spread-dit": 1.05, "spread-elit": 0.85, "uvit": 1.0,
    "elit-uvit": 0.95, "elit-uvit-mb": 0.90,
}  # fmt: skip
LOWER = {"elit": 0.2, "elit-uvit": 0.2}  # what halving the budget costs; others lose less


def made_up(folder: Path, paper_is_right: bool) -> Study:
    """A study whose results say in everything that the paper is right, or the opposite."""
    made = Study(MADE_UP, folder, DIGITS)
    pieces = {p.key: p for claim in CLAIMS.values() for p in claim.needs(made)}
    made.results = {key: made_up_result(made, piece) for key, piece in pieces.items()}
    if not paper_is_right:
        for result in made.results.values():
            mirror(result)
    return made


def made_up_result(made: Study, piece: Piece) -> dict:
    luck, variant = random.Random(piece.key).uniform(0, 0.002), piece.training.variant
    if piece.kind == "look":
        values = {"value": 0.3 + luck, "shuffled": 0.1}
        return {"levels": [{"sigma": s, "spearman_in_groups": values} for s in MADE_UP.sigmas]}
    if piece.kind == "draw":
        point = piece.point
        frechet, accuracy = {
            "none": (8 - math.log2(point.budget) / 2, 0.7), "cfg": (6, 0.9), "ag": (5, 0.8),
            "ccfg": (5, 0.85),
        }[point.guidance]  # fmt: skip
        if point.steps != MADE_UP.sampling_steps:  # of (e)
            frechet = 8 + math.log2(point.budget)
        return {
            "frechet": (10 if variant == "dit" else frechet) + luck, "accuracy": accuracy + luck,
            "real_accuracy": 0.95, "flops": made.sampling_flops(variant, point),
        }  # fmt: skip
    loss = LOSSES[variant] + luck
    if variant == "elit" and "-steps" in piece.training.name and piece.training.steps != 7:
        loss = 0.85 + luck  # of (b), at equal steps
    budgets = made.budgets(piece.training)
    ladder = {format_budget(b): loss - math.log2(b) * LOWER.get(variant, 0.02) for b in budgets}
    return {
        "losses": {budget: {"loss": value} for budget, value in ladder.items()},
        "random": {budget: value + 0.01 for budget, value in ladder.items() if budget != "1"},
        "curve": [[step, loss + 0.6 - 0.2 * step] for step in (1, 2, 3)],
    }


def mirror(result: dict) -> None:
    """Turn a result round: the better one is the worse one."""
    for level in result.get("levels", ()):
        values = level["spearman_in_groups"]
        level["spearman_in_groups"] = {"value": values["shuffled"], "shuffled": values["value"]}
    if "frechet" in result:
        result |= {"frechet": 20 - result["frechet"], "accuracy": 1 - result["accuracy"]}
    for one in result.get("losses", {}).values():
        one["loss"] = 2 - one["loss"]
    for budget, value in result.get("random", {}).items():
        result["random"][budget] = 2 - value
    if "curve" in result:  # as it falls, to the other end
        down = 2 * (1 - result["curve"][-1][1])
        result["curve"] = [[step, loss + down] for step, loss in result["curve"]]


@pytest.mark.parametrize("paper_is_right", [True, False])
@pytest.mark.parametrize("letter", list("abcdefghi"))
def test_no_claim_is_judged_the_wrong_way_round(letter, paper_is_right, tmp_path) -> None:
    finding = CLAIMS[letter].find(made_up(tmp_path, paper_is_right))
    words = {row.what: row.word for row in finding.rows if row.note != "counted"}
    assert words
    assert words == dict.fromkeys(words, HOLDS if paper_is_right else FAILS)


def test_a_goal_that_is_not_reached_is_not_said_to_be(tmp_path) -> None:
    made = made_up(tmp_path, paper_is_right=True)
    multi = made.models("elit-mb")
    for left, word in ((3, HOLDS), (2, UNDECIDED), (1, UNDECIDED), (0, FAILS)):
        row = reaches_final_loss(multi, made.models("dit"))
        assert row.word == word
        assert f"reached by {left} of 3 seeds" in row.here
        assert ("at least" in row.here) == (left < 3)
        if left:
            made.results[multi.trained[left - 1].key]["curve"][:] = [[1, 2.0], [3, 1.5]]
    assert row.here.startswith("share at least 1;")
    assert judge_reach(Values([1.0]), 0).word == UNDECIDED  # a single seed decides nothing


def test_what_is_not_defined_is_told(tmp_path) -> None:
    made = made_up(tmp_path, paper_is_right=True)
    looks = [result for key, result in made.results.items() if key.startswith("look")]
    looks[0]["levels"][0].pop("spearman_in_groups")
    for look in looks:
        look["levels"][1]["spearman_in_groups"] = {"value": None, "shuffled": None}
    finding = CLAIMS["g"].find(made)
    first, second = finding.rows
    assert first.here.endswith("(of 2 of 3 seeds)")
    assert (second.here, second.word) == ("-", "not defined")
    assert summary(finding) == "holds (1 of 2), not defined (1 of 2)"
    assert [series["x"] for series in finding.figures[0]["series"]] == [[0], [0]]


# ---- equal FLOPs ----


def test_trainings_cost_alike(tmp_path) -> None:
    for plain_cost, cost, steps in ((3.0, 2.0, 150), (2.0, 3.0, 67), (1.0, 1000.0, 1)):
        assert equal_steps(100, plain_cost, cost) == steps
    trainings = Trainings(SCALES["small"], tmp_path, DIGITS)
    plain = trainings.training("dit", 0)
    for variant in VARIANTS:
        if not VARIANTS[variant].spread and VARIANTS[variant].backbone == "dit":
            training = trainings.training(variant, 0)
            assert abs(training.flops / plain.flops - 1) < 0.5 / training.steps + 1e-9, variant
    # Of a step: three forwards of each sample, of the widest blocks by hand. D = 64, N = 64.
    block, rest = 24 * 64 * 64**2 + 4 * 64**2 * 64 + 12 * 64**2, plain.step_flops / (3 * 32)
    assert rest / (6 * block) == pytest.approx(1, abs=0.03)
    assert trainings.training("elit-mb", 0).steps > trainings.training("elit", 0).steps


def test_spread_costs_more_and_group_sizes_are_told(tmp_path) -> None:
    trainings = Trainings(MICRO, tmp_path, DIGITS)
    size = MICRO.sizes[0]
    for plain, wide in (("dit", "spread-dit"), ("elit", "spread-elit")):
        assert trainings.step_flops(wide, size) > 3.9 * trainings.step_flops(plain, size)
    groups = ("elit-1x1", "elit-2x2", "elit", "elit-whole")
    models = [trainings.cost(variant, size)[0] for variant in groups]
    assert [model.max_latents for model in models] == [1, 4, 16, 64]
    assert [model.min_latents for model in models] == [1, 4, 16, 64]


# ---- spread pictures ----


def test_spread_puts_patches_where_it_says() -> None:
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    wide = spread(x, (2, 2))
    expected = torch.zeros(1, 1, 8, 8)
    expected[0, 0, 0:2, 0:2] = torch.tensor([[1, 2], [5, 6]])
    expected[0, 0, 0:2, 4:6] = torch.tensor([[3, 4], [7, 8]])
    expected[0, 0, 4:6, 0:2] = torch.tensor([[9, 10], [13, 14]])
    expected[0, 0, 4:6, 4:6] = torch.tensor([[11, 12], [15, 16]])
    torch.testing.assert_close(wide, expected)
    torch.testing.assert_close(gather(wide, (2, 2)), x)


@pytest.mark.parametrize("name", ["dit-tiny/2", "elit-dit-tiny/2"])
def test_a_spread_model_is_the_model_on_a_spread_picture(name) -> None:
    plain = create_model(name)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    wide = SpreadDiT.from_config(dict(plain.config))
    wide.load_state_dict(plain.state_dict())
    x, sigma, labels = torch.randn(2, 1, 16, 16), torch.tensor([0.3, 0.7]), torch.tensor([1, 2])
    kept = {"num_latents": 3} if plain.is_elastic else {}
    found = wide(x, sigma, labels, **kept).sample
    whole = plain(spread(x, (2, 2)), sigma, labels, **kept).sample
    torch.testing.assert_close(found, gather(whole, (2, 2)))


def test_a_spread_model_starts_from_the_same_weights(tmp_path) -> None:
    trainings = Trainings(MICRO, tmp_path, DIGITS)
    config = trainings.config(trainings.training("spread-dit", 0))
    wide = build_spread_model(config, trainings.dataset)
    plain = VARIANTS["dit"].make_model(config, trainings.dataset, {})
    assert isinstance(wide, SpreadDiT)
    for name, value in plain.state_dict().items():
        assert torch.equal(wide.state_dict()[name], value)


# ---- a study ----


def test_a_study_writes_its_report(finished) -> None:
    assert {PAGE, PICTURE, RESULTS, TABLE, STAMP} <= {path.name for path in finished.iterdir()}
    report = json.loads((finished / RESULTS).read_text())
    assert list(report["claims"]) == ["f", "g"]
    table = (finished / TABLE).read_text()
    for letter, claim in report["claims"].items():
        for row in claim["rows"]:
            assert f"({letter}) {row['what']}" in table
            assert row["word"] in (HOLDS, FAILS, UNDECIDED)
    # A single seed decides nothing.
    assert {row["word"] for row in report["claims"]["f"]["rows"]} == {UNDECIDED}
    page = (finished / PAGE).read_text()
    assert page.count("<svg") == 2
    assert page.count('<span class="word open">undecided</span>') == len(
        report["claims"]["f"]["rows"]
    )
    assert not re.search(r'(src|href)="(?!#|data:)', page)  # it needs no other file


def test_the_same_again_trains_nothing(finished) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "pieces").iterdir()}
    report = (finished / RESULTS).read_bytes()
    assert study(finished, "fg").finished
    assert {path: path.stat().st_mtime_ns for path in (finished / "pieces").iterdir()} == before
    assert (finished / RESULTS).read_bytes() == report


def test_other_settings_and_other_code_are_refused(finished, tmp_path, monkeypatch) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds something else; choose another folder"):
        study(tmp_path)
    with pytest.raises(ValueError, match=r"other settings: scale.batch_size is 4 there and 8 now"):
        study(finished, "f", replace(MICRO, batch_size=8))
    with pytest.raises(ValueError, match=r"other settings: the data are others; choose"):
        reproduce(MICRO, finished, DataConfig("shapes"), ["f"], progress=False)
    monkeypatch.setattr("elit.reproduce.study.code_digest", lambda: "other")
    with pytest.raises(ValueError, match=r"elit's code has changed since"):
        study(finished, "f")


def test_rooms_whose_code_counts_are_there() -> None:
    assert all((Path(elit.__file__).parent / room).exists() for room in _ROOMS)


@pytest.mark.parametrize("name", ["workers", "seeds"])
def test_none_of_them_is_refused(name, tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"{name} is 0; give 1 or more"):
        reproduce(MICRO, tmp_path / "new", DIGITS, **{name: 0})
    assert not (tmp_path / "new").exists()


class GoneProcess:
    def __init__(self, exitcode: int):
        self.exitcode = exitcode

    def join(self, timeout: float) -> None:
        del timeout


def crew_of_one(exitcode: int) -> tuple[Workers, Any]:
    mine, theirs = multiprocessing.Pipe()
    crew = Workers.__new__(Workers)
    crew.idle, crew.busy, crew.failed = [mine], {}, None
    crew.processes = {mine: GoneProcess(exitcode)}
    return crew, theirs


def test_a_worker_that_is_gone_is_told(tmp_path) -> None:
    piece, *_ = Study(MICRO, tmp_path, DIGITS).models("dit").trained
    crew, theirs = crew_of_one(-9)
    theirs.close()
    with pytest.raises(ChildProcessError, match=r"exit code -9, perhaps for want of memory"):
        crew.give(piece)
    with pytest.raises(ChildProcessError, match=r"exit code -9"):
        crew.listen(1)
    crew, theirs = crew_of_one(0)
    theirs.send((ValueError, "the data are gone", ""))
    with pytest.raises(ValueError, match=r"a worker could not start: the data are gone"):
        crew.listen(1)


def test_a_diverged_training_names_a_way_out(tmp_path) -> None:
    made = Study(replace(MICRO, seeds=3), tmp_path, DIGITS)
    needs = {letter: {p.key: p for p in CLAIMS[letter].needs(made)} for letter in "aci"}
    *_, piece = made.models("dit").trained
    crew, theirs = crew_of_one(0)
    crew.give(piece)
    theirs.send((TrainingDivergedError, "the loss is nan", ""))
    with pytest.raises(TrainingDivergedError, match=rf"{piece.key}: the loss is nan"):
        crew.listen(1)
    assert crew.failed is piece
    assert way_out(needs, piece) == (
        "the same happens each time, and claims a need this piece; without it there is "
        "--claims c i or --seeds 2"
    )


SCRIPT = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_reproduce import study
if {guard}:
    study(Path(sys.argv[1]), {claims!r})
"""


def script(folder: Path, **words: str) -> list[str]:
    """Command of a script that calls `reproduce`."""
    file = folder / "script.py"
    file.write_text(SCRIPT.format(path=[str(Path(__file__).parent), *sys.path[1:]], **words))
    return [sys.executable, str(file), str(folder / "out")]


@pytest.mark.slow  # two processes that import torch
def test_a_script_without_a_guard_is_told(tmp_path) -> None:
    line = script(tmp_path, guard="True", claims="h")
    found = subprocess.run(line, capture_output=True, text=True)
    assert 'under `if __name__ == "__main__":`' in found.stderr.splitlines()[-1]
    assert "another study" not in found.stderr  # which its worker would have said


@pytest.mark.slow  # all claims, two seeds
def test_all_claims(tmp_path) -> None:
    result = study(tmp_path, "".join(CLAIMS), replace(MICRO, few_seeds=2))
    assert result.finished
    assert list(result.report["claims"]) == list("abcdefghi")
    assert all(claim["rows"] for claim in result.report["claims"].values())


@pytest.mark.slow  # three processes that import torch
def test_a_killed_study_goes_on_to_the_same_report(tmp_path) -> None:
    study(tmp_path / "whole", "ac")
    broken = tmp_path / "out"
    line = script(tmp_path, guard="__name__ == '__main__'", claims="ac")
    for number, kind in ((1, signal.SIGKILL), (3, signal.SIGTERM)):
        process = subprocess.Popen(line)
        while len(list(broken.glob("pieces/*.json"))) < number:
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, kind)
        process.wait(timeout=60)
    time.sleep(1)  # the killed one's workers have seen it
    assert study(broken, "ac").finished
    one, other = (json.loads((f / RESULTS).read_text()) for f in (tmp_path / "whole", broken))
    assert one.pop("run")
    assert other.pop("run")
    assert one == other


# ---- the command ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--scale small", r"--scale small needs Fashion-MNIST.*give --data FOLDER.*--scale tiny"),
        ("--scale base", r"--scale base needs Fashion-MNIST"),
        ("--scale huge", r"'huge'"),
        ("", r"--scale"),
        ("--scale tiny --claims a z", r"claim 'z'"),
        ("--scale tiny --workers 0", r"--workers"),
        ("--scale paper --seeds 3", r"--seeds has no effect on --scale paper"),
        ("--scale tiny --data /nonexistent", r"--data /nonexistent is no folder of Fashion-MNIST"),
        ("--scale tiny --seeds 1", r"starts its own processes"),
    ],
)
def test_a_mistake_is_told(line, message, capsys, monkeypatch) -> None:
    if "processes" in message:
        monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    assert main(["reproduce", *line.split()]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_report_has_no_private_path() -> None:
    parser = command_parser("reproduce")
    line = "--scale tiny --data /home/me/mnist --out /home/me/mine --claims a b --seeds 2"
    found = command.typed(parser.parse_args(line.split()))
    assert found == ("elit reproduce --scale tiny --data FOLDER --out mine --claims a b --seeds 2")
    default = parser.parse_args(["--scale", "tiny", "--out", "runs/reproduce-tiny/"])
    assert command.typed(default) == "elit reproduce --scale tiny"


def test_flags_and_tables_agree_and_the_papers_commands_can_be_typed(capsys) -> None:
    assert tuple(CLAIMS) == command.LETTERS
    assert all(name == scale.name for name, scale in SCALES.items())
    assert main(["reproduce", "--scale", "paper", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert len(runs) == len(CONFIGS)
    for run in runs:
        words = shlex.split(run["command"])
        assert words[:5] == ["torchrun", "--nproc-per-node", "8", "-m", "elit"]
        assert words[5] == "train"
        load_config(words[6], {})
