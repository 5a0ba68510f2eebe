"""The house: files that can be read in one sitting, calls that can be read on one line, and nothing written twice."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations, count
from pathlib import Path
from typing import Any, TypeGuard

import pytest

import pyint8

PACKAGE = Path(pyint8.__file__).parent
ROOT = next(path.parent for path in Path(__file__).resolve().parents if path.name == "tests")

MOST_LINES = 320
MOST_PARAMETERS = 8
MANY_PARAMETERS = {"pyint8/operations/load.py:load", "pyint8/operations/convert.py:convert"}
"""What users call, with keywords."""
KERNELS = {"triton.jit", "gluon.jit"}
"""A GPU's, which take no structures."""

Function = ast.FunctionDef | ast.AsyncFunctionDef

LEAST_ALIKE = 6
TWICE = re.compile(r"(#|//) Twice: \w+")
"""The comment, within or just above one of two passages, that says why it stands twice."""


def sources(*endings: str) -> dict[str, str]:
    """The text of every source, by a short name; the package is the one that is imported."""
    folders = {"pyint8": PACKAGE} | {name: ROOT / name for name in ("tests", "benchmarks", "csrc")}
    return {
        f"{name}/{path.relative_to(folder)}": path.read_text()
        for name, folder in folders.items()
        for path in sorted(folder.rglob("*.*"))
        if path.suffix in endings
    }


# --- length -----------------------------------------------------------------------------------------------------------


def too_long(texts: Mapping[str, str]) -> list[str]:
    lengths = {name: text.count("\n") for name, text in texts.items()}
    return [f"{name}: {length} lines" for name, length in lengths.items() if length > MOST_LINES]


def test_files_can_be_read_in_one_sitting() -> None:
    assert not too_long(sources(".py", ".pyi"))


def test_a_long_file_is_found() -> None:
    assert too_long({"a": "x\n" * 321, "b": "x\n" * 320}) == ["a: 321 lines"]


# --- parameters -------------------------------------------------------------------------------------------------------


def parameters(function: Function) -> int:
    """How many there are, stars included, but for self and cls."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    own = names[:1] if names[:1] in (["self"], ["cls"]) else []
    return len(names) - len(own) + (given.vararg is not None) + (given.kwarg is not None)


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, Function]]:
    """Every function with its dotted name in the module."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, Function | ast.ClassDef)
        name = f"{inside}.{node.name}".lstrip(".") if named else inside
        if isinstance(node, Function):
            yield name, node
        yield from functions(node, name)


def too_many_parameters(text: str, module: str) -> list[str]:
    found = {
        f"{module}:{name}": parameters(function)
        for name, function in functions(ast.parse(text))
        if KERNELS.isdisjoint(map(ast.unparse, function.decorator_list))
    }
    return [f"{name} {count}" for name, count in found.items() if count > MOST_PARAMETERS]


def test_calls_can_be_read() -> None:
    found = [each for name, text in sources(".py").items() for each in too_many_parameters(text, name)]
    assert not [each for each in found if each.split(" ")[0] not in MANY_PARAMETERS]
    assert len(found) == len(MANY_PARAMETERS)  # what is excepted is there


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(a, b, c, d, e, f, g, h, i): ...", ["m:f 9"]),
        ("def f(a, b, c, d, e, f, g, *h, i): ...", ["m:f 9"]),
        ("def f(a, b, c, d, e, f, g, h): ...", []),
        ("class C:\n def f(self, a, b, c, d, e, f, g, h): ...", []),
        ("class C:\n async def f(self, a, /, b, c, d, e, f, g, h, **i): ...", ["m:C.f 9"]),
        ("def f():\n if f:\n  def g(a, b, c, d, e, f, g, h, i): ...", ["m:f.g 9"]),
        ("@cache\ndef f(a, b, c, d, e, f, g, h, i): ...", ["m:f 9"]),
        ("@triton.jit\ndef f(a, b, c, d, e, f, g, h, i): ...", []),
        ("@gluon.jit\ndef f(a, b, c, d, e, f, g, h, i): ...", []),
    ],
)
def test_many_parameters_are_found(source: str, found: list[str]) -> None:
    assert too_many_parameters(source, "m") == found


# --- repetition -------------------------------------------------------------------------------------------------------

Line = tuple[int, str]
Place = tuple[str, int]
Pair = tuple[Place, Place]
Passage = tuple[str, int, int]


def repeating_lines(text: str) -> set[int]:
    """The numbers of the lines of a Python module that cannot but repeat: imports, and what typing.overload is for."""
    nodes = [node for node in ast.walk(ast.parse(text)) if cannot_but_repeat(node)]
    return {number for node in nodes for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def cannot_but_repeat(node: ast.AST) -> TypeGuard[ast.stmt]:
    overload = isinstance(node, Function) and any(ast.unparse(each) == "overload" for each in node.decorator_list)
    return overload or isinstance(node, ast.Import | ast.ImportFrom)


def telling_lines(name: str, text: str) -> list[Line]:
    """Lines without their indentation, but for imports, comments and what has no word in it: blanks, lone brackets."""
    skipped = repeating_lines(text) if name.endswith(".py") else set()
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if number not in skipped]
    return [(number, line) for number, line in lines if re.search(r"\w", line) and not line.startswith(("#", "//"))]


def reach(pair: Pair, pairs: set[Pair]) -> int:
    """How many windows of lines in a row are alike from here on."""
    return next(step for step in count(1) if tuple((name, start + step) for name, start in pair) not in pairs)


def passage(lines: list[Line], name: str, start: int, windows: int) -> Passage:
    """(file, number of the first line, number of the last)."""
    return name, lines[start][0], lines[start + windows - 1 + LEAST_ALIKE - 1][0]


def is_explained(text: str, first: int, last: int) -> bool:
    return any(TWICE.search(line) for line in text.splitlines()[max(first - 3, 0) : last])


def repetitions(texts: Mapping[str, str]) -> list[tuple[Passage, ...]]:
    """What stands twice, every stretch once, and each time it stands."""
    lines = {name: telling_lines(name, text) for name, text in texts.items()}
    places: dict[tuple[str, ...], list[Place]] = defaultdict(list)
    for name, told in lines.items():
        for start in range(len(told) - LEAST_ALIKE + 1):
            places[tuple(line for _, line in told[start : start + LEAST_ALIKE])].append((name, start))
    pairs = {pair for found in places.values() for pair in combinations(found, 2)}
    starts = [pair for pair in pairs if tuple((name, start - 1) for name, start in pair) not in pairs]
    found = [tuple(passage(lines[name], name, start, reach(pair, pairs)) for name, start in pair) for pair in starts]
    return sorted(each for each in found if not any(is_explained(texts[name], *at) for name, *at in each))


def test_nothing_stands_twice() -> None:
    assert not repetitions(sources(".py", ".cpp", ".hpp", ".h", ".cu"))


def steps(first: int, last: int) -> str:
    return "".join(f"step({number})\n" for number in range(first, last + 1))


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (steps(1, 6), "x = 1\n" + steps(1, 6), [(("a.py", 1, 6), ("b.py", 2, 7))]),
        (steps(1, 9), steps(2, 9), [(("a.py", 2, 9), ("b.py", 1, 8))]),
        (steps(1, 5), steps(1, 5), []),
        (steps(1, 3) + "\n# a comment\n" + steps(4, 6), steps(1, 6), [(("a.py", 1, 8), ("b.py", 1, 6))]),
        (steps(1, 5) + "[\n]\n", steps(1, 5) + "[\n]\n", []),
        (steps(1, 6) + steps(1, 6), "", [(("a.py", 1, 6), ("a.py", 7, 12))]),
        ("import a\n" * 6, "import a\n" * 6, []),
        ("# Twice: a reason\n" + steps(1, 6), steps(1, 6), []),
        ("# Twice:\n" + steps(1, 6), steps(1, 6), [(("a.py", 2, 7), ("b.py", 1, 6))]),
        ("# Twice: a reason\n" + "y = 1\n" * 3 + steps(1, 6), steps(1, 6), [(("a.py", 5, 10), ("b.py", 1, 6))]),
    ],
)
def test_what_stands_twice_is_found(one: str, other: str, found: list[Any]) -> None:
    assert repetitions({"a.py": one, "b.py": other}) == found


def test_what_stands_twice_in_two_languages_is_found() -> None:
    text = "#include <a>\n" + "".join(f"step({number});\n" for number in range(6))
    assert repetitions({"a.cpp": text, "b.hpp": text + "\n"}) == [(("a.cpp", 2, 7), ("b.hpp", 2, 7))]
    assert not repetitions({"a.cpp": text, "b.hpp": "// Twice: a reason\n" + text})
