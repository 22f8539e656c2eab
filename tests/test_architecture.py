"""The house rules that a machine can check: who imports whom, what stays out of where.

Each check reads the source with `ast` and yields messages with their lines;
`test_each_rule_can_fail` feeds every check a source that breaks it.
"""

import ast
import functools
import graphlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import elit

SRC = Path(__file__).resolve().parents[1] / "src" / "elit"
FILES = sorted(SRC.rglob("*.py"))

# Lowest first. A room imports from its own room and from the tiers below, never sideways or up.
TIERS = [
    {"layers", "data"},
    {"interface", "networks"},
    {"caching"},  # a model can have a step cache on
    {"models", "flow"},
    {"retrofit"},
    {"cost"},
    {"pipelines"},
    {"choosing", "preparation", "viz"},
    {"evaluation", "exporting", "inspection", "interop", "serving"},
    {"scheduling"},
    {"training"},  # above them all: it draws sample sheets and scores them as it goes
    {"studio"},  # draws for a person, and shows where Read looks
    {"reproduce"},  # trains and measures many models, and draws what came of it
    {"cli"},
]
RANK = {room: rank for rank, tier in enumerate(TIERS) for room in tier}
FRONT_DOORS = {"__init__", "__main__"}  # elit/__init__.py names everything, lazily
SAMPLING_PATH = {"layers", "interface", "caching", "models", "flow", "pipelines", "choosing"}
WIDE_TYPES = {"float64", "double", "complex128", "cdouble"}
MAX_FUNCTION_LINES = 70


# ---- reading a source ----


def room_of(module: str) -> str:
    """`elit.models.dit` lives in `models`; `elit._lazy`, directly under `elit`, in `_lazy`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported_modules(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of everything that a source imports, at any depth.

    `from a import b` yields `a.b`, which names a module where b is one. A string that spells a
    dotted name under `elit` counts too: that is how a lazy import names its target.
    """
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*up, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split(".")
            names_a_module = parts[0] == "elit" and parts[1:2] and parts[1] in RANK
            if names_a_module and id(node) not in docstrings:
                yield node.lineno, node.value


def dotted(node: ast.AST) -> str:
    """`torch.distributed.barrier` of the expression that says so; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


# ---- the rules: each takes (tree, dotted name of the module, is it a package) ----

Messages = Iterator[tuple[int, str]]  # line and what is wrong there


def check_direction(tree: ast.AST, module: str, is_package: bool) -> Messages:
    room = room_of(module)
    if room in FRONT_DOORS:
        return
    if (is_package or module.count(".") > 1) and room not in RANK:
        yield 1, f"the room `{room}` is unknown: give it a place in TIERS of {Path(__file__).name}"
        return
    rank = RANK.get(room, -1)  # a module directly under elit serves all rooms: it imports none
    for line, name in imported_modules(tree, module, is_package=is_package):
        target = room_of(name)
        if not is_within(name, "elit") or target == room or name == "elit.__version__":
            continue
        if target in RANK and RANK[target] >= rank:
            yield line, f"`{room}` imports `{name}`, but `{target}` doesn't lie below it"
        elif target not in RANK and not (SRC / f"{target}.py").exists():
            yield line, f"imports `{name}` through the front door, not where it is defined"


def check_foreign_imports(tree: ast.AST, module: str, is_package: bool) -> Messages:
    room = room_of(module)
    names = list(imported_modules(tree, module, is_package=is_package))
    used = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    names += [(n.lineno, dotted(n)) for n in used if dotted(n) == "torch.distributed"]
    for line, name in names:
        if room in {"layers", "interface"} and is_within(name, "diffusers"):
            yield line, f"`{room}` is plain PyTorch: what needs diffusers lies above"
        if room != "training" and is_within(name, "torch.distributed"):
            yield line, "uses torch.distributed: only training/ may"


def check_print(tree: ast.AST, module: str, is_package: bool) -> Messages:
    for node in ast.walk(tree):
        is_print = isinstance(node, ast.Call) and dotted(node.func) == "print"
        if is_print and room_of(module) != "cli":
            yield node.lineno, "print() in the library: return the text, log it, or print in cli/"


def check_wide_types(tree: ast.AST, module: str, is_package: bool) -> Messages:
    for node in ast.walk(tree) if room_of(module) in SAMPLING_PATH else ():
        if (
            (isinstance(node, ast.Attribute) and node.attr in WIDE_TYPES)
            or (isinstance(node, ast.Constant) and node.value in ("float64", "complex128"))
            or (isinstance(node, ast.alias) and node.name in WIDE_TYPES)
        ):
            yield node.lineno, "64-bit floats, which MPS lacks, in sampling: see elit._devices.wide"


def check_host_sync(tree: ast.AST, module: str, is_package: bool) -> Messages:
    for function in ast.walk(tree) if room_of(module) in {"layers", "interface", "models"} else ():
        if isinstance(function, ast.FunctionDef) and function.name == "forward":
            for call in ast.walk(function):
                waits = getattr(getattr(call, "func", None), "attr", "") in {"item", "tolist"}
                if isinstance(call, ast.Call) and waits:
                    yield call.lineno, ".item() in a forward waits for the device: keep a tensor"


def check_length(tree: ast.AST, module: str, is_package: bool) -> Messages:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            if lines > MAX_FUNCTION_LINES:
                text = f"{node.name}() has {lines} lines (at most {MAX_FUNCTION_LINES}): split it"
                yield node.lineno, text


RULES = [
    check_direction, check_foreign_imports, check_print, check_wide_types, check_host_sync,
    check_length,
]  # fmt: skip


# ---- the rules on our source ----


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps(rule) -> None:
    messages = []
    for path in FILES:
        parts = path.relative_to(SRC.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__" and len(parts) > 2
        module = ".".join(parts[:-1] if is_package else parts)
        tree = parse(path)
        where = path.relative_to(SRC.parents[1])
        messages += [f"{where}:{line}: {text}" for line, text in rule(tree, module, is_package)]
    assert not messages, "\n" + "\n".join(messages)


def test_no_files_import_one_another_in_a_circle() -> None:
    names = {".".join(path.relative_to(SRC.parent).with_suffix("").parts): path for path in FILES}
    graph = {}
    for name, path in names.items():
        if path.stem == "__init__":  # front doors name what lies behind them
            continue
        imports = imported_modules(parse(path), name, is_package=False)
        known = (t if t in names else t.rpartition(".")[0] for _, t in imports)
        graph[name] = {target for target in known if target in names and target != name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_front_door_stays_quick() -> None:
    """torch takes seconds to import: `import elit` does without, as does what it names lazily."""
    code = "import sys, elit, elit.interface; dir(elit); elit.resolve_budget; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "diffusers", "sklearn", "numpy"} & set(done.stdout.split())


def test_front_door_tells_type_checkers_the_truth() -> None:
    """What `elit/__init__.py` imports for type checkers is what it gives at run time."""
    tree = ast.parse((SRC / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and is_within(node.module, "elit")
        for alias in node.names
    }
    given = {name: getattr(elit, name).__module__ for name in elit.__all__ if name[0] != "_"}
    assert given == typed, "bring the TYPE_CHECKING imports and the lazy names into line"


@pytest.mark.parametrize(
    "room", ["elit", "elit.data", "elit.flow", "elit.interface", "elit.preparation"]
)
def test_rooms_give_the_names_that_they_list_and_no_others(room: str) -> None:
    module = importlib.import_module(room)
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{room}' has no attribute 'colour'"):
        _ = module.colour


# ---- the rules on sources that break them ----

BAD = [
    (check_direction, "elit.layers.mlp", "from elit.models.dit import DiT"),
    (check_direction, "elit.layers.mlp", "import elit.interface.grid"),
    (check_direction, "elit.layers.mlp", "from elit import interface"),
    (check_direction, "elit.layers.mlp", "from ..models import dit"),
    (check_direction, "elit.layers.mlp", "from ..models.dit import DiT"),
    (check_direction, "elit.interface.read", "def f():\n    from elit.models import dit"),
    (check_direction, "elit.interface.read", "importlib.import_module('elit.models.dit')"),
    (check_direction, "elit.interface.read", "if TYPE_CHECKING:\n    import elit.cli.main"),
    (check_direction, "elit.flow.guidance", "from elit.models.dit import DiT"),
    (check_direction, "elit.flow.guidance", "_LAZY = {'DiT': 'elit.models.dit'}"),
    (check_direction, "elit.data.digits", "from elit.layers.mlp import MLP"),
    (check_direction, "elit.training.loop", "from elit.cli.main import main"),
    (check_direction, "elit.pipelines.elit_pipeline", "from elit import DiT"),
    (check_direction, "elit.attic.old", "import math"),
    (check_direction, "elit._lazy", "from elit.models import dit"),
    (check_foreign_imports, "elit.interface.read", "import diffusers"),
    (check_foreign_imports, "elit.layers.mlp", "from diffusers.models import attention"),
    (check_foreign_imports, "elit.models.dit", "import torch.distributed as dist"),
    (check_foreign_imports, "elit.models.dit", "from torch import distributed"),
    (check_foreign_imports, "elit.cli.main", "from torch.distributed import barrier"),
    (check_foreign_imports, "elit.cost.flops", "torch.distributed.barrier()"),
    (check_print, "elit.training.loop", "def f():\n    print('loss')"),
    (check_wide_types, "elit.flow.objective", "x = t.to(torch.float64)"),
    (check_wide_types, "elit.layers.positions", "x = t.double()"),
    (check_wide_types, "elit.layers.positions", "from torch import complex128"),
    (check_wide_types, "elit.pipelines.elit_pipeline", "x = np.ones(3, dtype='float64')"),
    (check_host_sync, "elit.models.dit", "def forward(self, n):\n    return n.item()"),
    (check_length, "elit.viz.sheets", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
]

GOOD = [
    (check_direction, "elit.models.dit", "from elit.interface import Read\nimport elit.layers.mlp"),
    (check_direction, "elit.training.loop", "from elit import __version__\nimport elit.viz.sheets"),
    (check_direction, "elit.layers.mlp", "from elit.layers.positions import rotate"),
    (check_direction, "elit.layers.mlp", '"""elit.models"""\nx = "elit.models is above"'),
    (check_foreign_imports, "elit.training.loop", "import torch.distributed as dist"),
    (check_foreign_imports, "elit.models.dit", "from diffusers import ModelMixin"),
    (check_print, "elit.cli.main", "print('table')"),
    (check_wide_types, "elit.evaluation.frechet", "x = t.double()"),
    (check_wide_types, "elit.flow.objective", '"""No float64 here."""  # nor torch.double'),
    (check_host_sync, "elit.models.dit", "def count(n):\n    return n.item()"),
    (check_length, "elit.viz.sheets", 'def f():\n    """' + "\n" * 90 + '"""\n    return 1'),
]


@pytest.mark.parametrize(("rule", "module", "source"), BAD)
def test_each_rule_can_fail(rule, module: str, source: str) -> None:
    assert len(list(rule(ast.parse(source), module, False))) == 1


@pytest.mark.parametrize(("rule", "module", "source"), GOOD)
def test_each_rule_lets_pass(rule, module: str, source: str) -> None:
    assert not list(rule(ast.parse(source), module, False))
