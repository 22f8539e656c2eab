"""Puts random small faults into a file and names those that its tests don't find.

python benchmarks/mutants.py src/elit/flow/guidance.py tests/test_flow.py --count 20
"""

import argparse
import ast
import os
import random
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

PAIRS = [
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn), (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or),
]  # fmt: skip
OTHER = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])} | {ast.FloorDiv: ast.Mult}
REMOVABLE = (ast.Raise, ast.AugAssign, ast.Continue, ast.Break, ast.Attribute, ast.Subscript)


def faults(tree: ast.AST) -> Iterator[tuple[ast.AST, str, Callable, tuple]]:
    """Where each fault would be, what it is, and a function with arguments that makes it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and (other := OTHER.get(type(node.ops[0]))):
            yield node, "other comparison", node.ops.__setitem__, (0, other())
        if other := OTHER.get(type(getattr(node, "op", None))):
            yield node, "other operator", setattr, (node, "op", other())
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            old = node.value
            for new in [not old] if isinstance(old, bool) else [old - 1, old + 1]:
                yield node, f"becomes {new}", setattr, (node, "value", new)
        if isinstance(node, ast.If | ast.IfExp):
            negated = ast.UnaryOp(ast.Not(), node.test)
            yield node, "condition negated", setattr, (node, "test", negated)
        if isinstance(node, ast.Call):
            for i, word in enumerate(node.keywords):
                yield node, f"without {word.arg}", node.keywords.pop, (i,)
            if len(node.args) > 1:
                swapped = [*node.args[1::-1], *node.args[2:]]
                yield node, "arguments swapped", setattr, (node, "args", swapped)
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            for i, part in enumerate(block if isinstance(block, list) else ()):
                is_call = isinstance(part, ast.Expr) and isinstance(part.value, ast.Call)
                what = part.targets[0] if isinstance(part, ast.Assign) else part
                if is_call or isinstance(what, REMOVABLE):
                    yield part, "removed", block.__setitem__, (i, ast.Pass())


def status(code: object, file: Path, tests: list[str]) -> int:
    """Exit status of the tests with that code in place of the file's: in a fork, for speed."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    usual = SourceFileLoader.get_code
    SourceFileLoader.get_code = lambda s, n: code if Path(s.path).resolve() == file else usual(s, n)
    import pytest

    os._exit(pytest.main(["-xq", "-n0", "-p", "no:cacheprovider", *tests]))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("file", type=lambda name: Path(name).resolve())
parser.add_argument("tests", nargs="+")
parser.add_argument("--count", type=int, default=20)
args = parser.parse_args()
import diffusers, torch  # noqa: E402, E401, F401, I001 (once, before the forks)

source, where, alive = args.file.read_text(), (args.file, args.tests), 0
assert status(compile(source, args.file, "exec"), *where) == 0, "the tests fail without a fault"
total = len(list(faults(ast.parse(source))))
chosen = random.Random(0).sample(range(total), min(args.count, total))
for number in chosen:
    place, what, make, how = list(faults(tree := ast.parse(source)))[number]
    line, text = place.lineno, ast.unparse(place)[:70]
    make(*how)
    if status(compile(ast.fix_missing_locations(tree), args.file, "exec"), *where) == 0:
        alive += 1
        print(f"survives: line {line}, {what}: {text!r}", flush=True)
print(f"{len(chosen) - alive} of {len(chosen)} faults were found")
