"""README, docs and examples: commands parse, snippets run, names and links exist."""

import ast
import importlib
import json
import re
import runpy
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import randomise
from idx_files import idx_folder
from prepared_data import write_prepared
from sweeps import sweep_report
from transformers import CLIPTextConfig

from elit import ElitPipeline, ElitTextPipeline, create_model, make_scheduler
from elit.cli.main import COMMANDS, command_parser, main
from elit.scheduling.measure import Errors
from elit.scheduling.schedule import SCHEDULE_FILE, Schedule, ladder
from elit.training.config_files import built_in_configs, config_fields, load_config

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SCRIPTS = [*sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "examples").glob("*.py"))]


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text, and the line before it."""

    place: str
    language: str
    text: str
    marker: str


@cache
def blocks(language: str) -> list[Block]:
    found = []
    for path in DOCS:
        text = path.read_text()
        for match in re.finditer(r"(?m)^```(\w+)\n(.*?)^```$", text, re.DOTALL):
            before = text[: match.start()].splitlines()
            place = f"{path.name}:{len(before) + 1}"
            found.append(Block(place, match[1], match[2], before[-1] if before else ""))
    return [block for block in found if block.language == language]


def command_lines() -> list:
    """Every command of every bash block, as words: `a && b` are two."""
    lines = []
    for block in blocks("bash"):
        for number, line in enumerate(block.text.splitlines(), start=1):
            words = shlex.split(line, comments=True)
            for part in " ".join(map(shlex.quote, words)).split("'&&'"):
                command = shlex.split(part)
                if command:
                    name = f"{block.place}+{number} {' '.join(command)}"
                    lines.append(pytest.param(command, id=name))
    return lines


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with runs of random weights, of digits and of captions, and a config my.yaml."""
    folder = tmp_path_factory.mktemp("docs")
    model = randomise(create_model("elit-dit-tiny/2"), std=0.05)  # open gates: steps differ
    pipeline = ElitPipeline(model, make_scheduler("euler"))
    pipeline.save_pretrained(folder / "runs" / "quickstart")
    plain = randomise(create_model("dit-tiny/2", depth=5), std=0.05)
    ElitPipeline(plain, make_scheduler("euler")).save_pretrained(folder / "runs" / "plain")
    plain = create_model("sit-tiny/2", 32, depth=10, in_channels=4, num_classes=3)
    ElitPipeline(plain, make_scheduler("euler")).save_pretrained(folder / "sit-xl")
    model = create_model("elit-mmdit-tiny/2", 16, in_channels=3)
    texts = ElitTextPipeline(model, make_scheduler("euler"))
    texts.save_pretrained(folder / "runs" / "captioned-shapes")
    # No network: transformers finds a folder of the hub's name first.
    CLIPTextConfig().save_pretrained(folder / "openai" / "clip-vit-large-patch14")
    report = sweep_report()
    report["model"]["weights"] = None  # of whatever the run holds
    (folder / "runs" / "quickstart" / "swept").mkdir()
    (folder / "runs" / "quickstart" / "swept" / "sweep.json").write_text(json.dumps(report))
    levels, latents = [1.0, 0.5], ladder(1, 16)
    gram = torch.eye(2 * (2 * len(latents) + 1))
    errors = Errors(gram, torch.zeros(2, 2 * len(latents) + 1))
    schedule = Schedule(16, 1).with_errors(levels, latents, errors)
    schedule.save(folder / "runs" / "quickstart" / SCHEDULE_FILE)
    (folder / "my.yaml").write_text("optimizer: {ema: 0.99}\n")
    write_prepared(folder / "prepared" / "imagenet", kind="images")  # no autoencoder to fetch
    idx_folder(folder / "fashion")
    return folder


@pytest.fixture
def there(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


def run_script(path: Path, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", [str(path), *arguments])
    monkeypatch.syspath_prepend(str(path.parent))  # as Python does
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise


# ---- commands ----


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("quickstart", "pip install -c constraints.txt -e . && elit quickstart"),
        ("test", "pip install -c constraints.txt -e '.[test]' && pytest"),
    ],
)
def test_the_readme_has_the_commands_that_the_gate_runs(name: str, command: str) -> None:
    marked = [b.text for b in blocks("bash") if b.marker == f"<!-- command: {name} -->"]
    assert marked == [f"{command}\n"]


@pytest.mark.parametrize("words", command_lines())
def test_commands_are_what_the_program_takes(words: list[str], there, capsys, monkeypatch) -> None:
    if words[0] == "torchrun":  # its own flags of several machines: test_cluster.py
        assert "--nproc-per-node" in words
        words = words[words.index("-m") + 1 :]
    if words[0] == "python":
        check_script(words[1], words[2:], capsys, monkeypatch)
    elif words[0] == "pip":
        check_pip(words)
    elif words[0] == "elit":
        check_elit(words[1], words[2:], capsys)
    else:
        assert words == ["pytest"], f"this test knows no {words[0]}: teach it"


def check_elit(name: str, words: list[str], capsys) -> None:
    args = command_parser(name).parse_args(words)
    config = getattr(args, "config", None) or ""
    if name == "train" and ("/" in config or config == "own-images"):
        # Their data is not here: test_paper_configs.py, test_own_images.py.
        assert args.config in built_in_configs()
    elif name in ("train", "finetune") and "--few_steps.base" not in words:
        # Of a trained run: test_few_steps.py.
        code = main([name, *words, *([] if args.dry_run else ["--dry-run"])])
        assert code == 0, capsys.readouterr().err
    if name == "sample":
        from elit.cli.common import make_guidance

        make_guidance(args)


def check_script(script: str, words: list[str], capsys, monkeypatch) -> None:
    assert ROOT / script in SCRIPTS
    run_script(ROOT / script, monkeypatch, *words, "--help")
    known = capsys.readouterr().out
    for word in words:
        assert not word.startswith("--") or re.search(rf"{word}\b", known), f"{word}: no such flag"


def check_pip(words: list[str]) -> None:
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for word in words:
        for extra in re.findall(r"\.\[(\w+)\]", word):
            assert f"\n{extra} = [" in extras
    assert "-c" not in words or words[words.index("-c") + 1] == "constraints.txt"


def test_flags_named_in_the_text_exist() -> None:
    known = {flag for name in COMMANDS for flag in command_parser(name).flags}
    for path in DOCS:
        prose = re.sub(r"(?ms)^```.*?^```$", "", path.read_text())
        for code in re.findall(r"`([^`]+)`", prose):
            for flag in re.findall(r"(?<!\S)--[a-z][\w.-]*", code):
                is_open = flag.startswith(("--data.options.", "--model.overrides."))
                assert is_open or flag in known, f"{path.name}: {flag}"


def test_the_readme_shows_what_flops_prints(capsys) -> None:
    command = next(b.text for b in blocks("bash") if b.text.startswith("elit flops elit-dit-xl/2"))
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out in [block.text for block in blocks("text")]


@pytest.mark.slow  # the README's table below is counted by default
def test_docs_flops_is_what_its_command_prints(capsys, monkeypatch) -> None:
    run_script(ROOT / "benchmarks" / "flops.py", monkeypatch)
    text = (ROOT / "docs" / "flops.md").read_text()
    shown = text.partition("<!-- output: benchmarks/flops.py -->\n")[2]
    assert shown.partition("<!-- end of output -->")[0] == capsys.readouterr().out


def test_the_table_of_the_papers_runs_is_what_its_command_prints(capsys, monkeypatch) -> None:
    """One row here; the others cost the same counting."""
    text = (ROOT / "docs" / "training.md").read_text()
    shown = text.partition("<!-- output: benchmarks/training.py --paper -->\n")[2]
    shown = shown.partition("<!-- end of output -->")[0].splitlines()
    assert [row.split("`")[1] for row in shown[2:]] == [n for n in built_in_configs() if "/" in n]
    words = ["--paper", "--configs", "imagenet-256/elit-dit"]
    run_script(ROOT / "benchmarks" / "training.py", monkeypatch, *words)
    header, line, row = capsys.readouterr().out.splitlines()
    assert [header, line] == shown[:2]
    assert row in shown


BACKBONES = re.findall(
    r"^\| `(elit-[^`]+)`, ([^|]*)\| ([^|]+) M \|(.*)\|[^|]*\|$",
    (ROOT / "README.md").read_text(),
    re.M,
)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row[0], marks=[pytest.mark.slow] if number % 3 else [])
        for number, row in enumerate(BACKBONES)
    ],
)
def test_the_readme_s_table_of_backbones_is_what_flops_prints(row, capsys) -> None:
    preset, inputs, millions, costs = row
    budgets = ["--budgets", "1", "0.5", "0.25", "0.0625"]
    flags = []
    for flag, pattern in (
        ("--resolution", r"(\d+) px"), ("--frames", r"(\d+) frames"),
        ("--text-tokens", r"(\d+) text tokens"),
    ):  # fmt: skip
        flags += [part for number in re.findall(pattern, inputs) for part in (flag, number)]
    assert "--resolution" in flags
    assert main(["flops", preset, *flags, *budgets]) == 0
    shown = capsys.readouterr().out
    assert f"{millions} M parameters" in shown
    for cost in costs.split("|"):
        assert re.search(rf"\b{re.escape(cost.strip())}$", shown, re.M), (preset, cost)


# ---- snippets ----


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.place)
def test_python_runs(block: Block, there) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("elit"):
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module), alias.name)
    if not block.marker.startswith("<!-- not run"):
        exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})


def test_the_readme_s_python_is_short_and_saves_an_image(there) -> None:
    first = next(block for block in blocks("python") if block.place.startswith("README"))
    assert len(first.text.splitlines()) <= 13
    (there / "three.png").unlink(missing_ok=True)
    exec(compile(first.text, "README", "exec"), {})
    assert (there / "three.png").stat().st_size


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.place)
def test_yaml_is_a_config(block: Block, there) -> None:
    (there / "block.yaml").write_text(block.text)
    config = load_config("block.yaml", {})
    if config.data.name != "prepared":  # which isn't here
        assert main(["train", "block.yaml", "--dry-run"]) == 0


# ---- examples ----


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    assert f"python {path.parent.name}/{path.name}" in ast.get_docstring(ast.parse(text))
    assert path.parent.name != "examples" or len(text.splitlines()) <= 80


@pytest.mark.parametrize(
    ("name", "words", "file"),
    [
        ("train_digits", "--steps 2 --out example", "example/model_index.json"),
        ("own_loop", "--steps 3 --batch-size 8 --out own", "own/model_index.json"),
        ("elasticize_sd3", "--steps 2 --out interface.safetensors", "interface.safetensors"),
        (
            "sample_budgets",
            "runs/quickstart --steps 2 --labels 3 7 --budgets 1 0.3 --guidance ag --out sheet.png",
            "sheet.png",
        ),
    ],
)
def test_examples_that_write(name, words, file, there, capsys, monkeypatch) -> None:
    run_script(ROOT / "examples" / f"{name}.py", monkeypatch, *words.split())
    assert (there / file).stat().st_size
    if file == "own/model_index.json":
        ElitPipeline.from_pretrained("own")
    assert name != "elasticize_sd3" or "step 2: " in capsys.readouterr().out
    assert name != "train_digits" or len(list((there / "example").glob("*-a-*.png"))) == 4


def test_example_elasticize_own(there, capsys, monkeypatch) -> None:
    run_script(ROOT / "examples" / "elasticize_own.py", monkeypatch)
    off = [float(number) for number in re.findall(r"(\S+) off the", capsys.readouterr().out)]
    assert off[0] < 1e-5 < off[1] < off[2] < off[3]


def test_example_clip_motion(there, capsys, monkeypatch) -> None:
    pipeline = ElitPipeline(create_model("elit-video-dit-tiny/2"), make_scheduler("euler"))
    pipeline.save_pretrained("clips")
    capsys.readouterr()
    script = ROOT / "examples" / "clip_motion.py"
    run_script(script, monkeypatch, "clips", "--count", "1", "--steps", "1")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "real clips", "budget 1", "budget 0.25", "budget 0.03125"
    ]  # fmt: skip
    # In real clips every object goes where its class says, in those of random weights it does not.
    found = re.findall(r": ([\d.]+) in their direction, ([\d.]+) px", "\n".join(lines))
    assert found[0][0] == "1.000"
    assert 4 < float(found[0][1]) < 6
    assert all(float(share) < 1 for share, _ in found[1:])


def test_example_caption_check(there, capsys, monkeypatch) -> None:
    script = ROOT / "examples" / "caption_check.py"
    capsys.readouterr()
    run_script(script, monkeypatch, "runs/captioned-shapes", "--count", "20", "--steps", "1")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("shape")[0].strip() for line in lines] == [
        "real images", "budget 1", "budget 0.25", "budget 0.0625"
    ]  # fmt: skip
    # Real images are judged right, and drawings of random weights are not.
    assert "shape 1.000, colour 1.000, both 1.000" in lines[0]
    assert float(lines[1].rpartition(" ")[2]) < 0.5


# ---- names, links, tables ----


@pytest.mark.parametrize(("page", "least"), [("paper", 30), ("architecture", 20)])
def test_tables_of_code_name_what_exists(page, least) -> None:
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / "docs" / f"{page}.md").read_text())
    assert len(named) > least
    for file, name in named:
        found = importlib.import_module("elit." + file.removesuffix(".py").replace("/", "."))
        for part in name.split("."):
            assert hasattr(found, part), f"{file}:{name}"
            found = getattr(found, part)


@pytest.mark.parametrize("path", [*DOCS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            page = path.parent / name if name else path
            assert page.exists(), target
            assert not anchor or anchor in anchors(page), target


def anchors(page: Path) -> list[str]:
    """Names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_every_page_is_linked_from_the_readme_and_its_table_has_all_backbones() -> None:
    assert len(BACKBONES) == 9
    text = (ROOT / "README.md").read_text()
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", text))
    assert linked == {f"docs/{path.name}" for path in DOCS[1:]}


def test_the_table_of_settings_is_the_config() -> None:
    rows = [f"| `{f.key}` | `{json.dumps(f.default)}` | {f.about} |" for f in config_fields()]
    text = (ROOT / "docs" / "training.md").read_text()
    assert text.endswith("\n".join(rows) + "\n"), "the table should be:\n" + "\n".join(rows)
