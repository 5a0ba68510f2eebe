"""Whether pyint8/_core.pyi is the installed binary's: `python check_stub.py`, where mypy is installed too.

stubtest compares names; what pybind11 compiles has no signature that it could read, so the arguments' names, order and
defaults are compared here, with those in the docstrings that pybind11 writes.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

# pybind11's classes have a metaclass of its own.
ALLOWED = r"pyint8\._core\.[A-Z]\w*"

Signatures = dict[str, list[str]]


def described(function: ast.FunctionDef) -> list[str]:
    """The arguments of a function in order: a name, "name=default", and "*" before those that are by keyword only."""
    spec = function.args
    defaults = [*[None] * (len(spec.args) - len(spec.defaults)), *spec.defaults]
    plain = [named(*pair) for pair in zip(spec.args, defaults, strict=True)]
    keywords = [named(*pair) for pair in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    return [*plain, *["*"][: len(keywords)], *keywords]


def named(argument: ast.arg, default: ast.expr | None) -> str:
    return argument.arg if default is None else f"{argument.arg}={ast.unparse(default)}"


def functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, described(node)
        elif isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{node.name}.")


def of_stub(text: str) -> Signatures:
    return dict(functions(ast.parse(text).body))


def of_docstring(docstring: str) -> list[str]:
    """pybind11 writes `name(self: module.Class, lane: typing.SupportsInt, first: bool = False) -> int`."""
    line = docstring.strip().splitlines()[0]
    header = re.sub(r"<[^<>]*>", "...", line)  # a default without a Python form
    parsed = ast.parse(f"def {header}: ...").body[0]
    assert isinstance(parsed, ast.FunctionDef)
    return described(parsed)


def of_binary(names: Signatures) -> Signatures:
    """The same functions as the binary describes them."""
    from pyint8 import _core

    found = {}
    for name in names:
        value: object = _core
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = of_docstring(value.__doc__ or "")
    return found


def differences(stub: Signatures, binary: Signatures) -> list[str]:
    unlike = [name for name in stub if stub[name] != binary[name]]
    return [f"{name}: the stub says {stub[name]}, the binary {binary[name]}" for name in unlike]


def stubtest() -> int:
    with tempfile.TemporaryDirectory() as folder:
        allowed = Path(folder) / "allowed"
        allowed.write_text(ALLOWED + "\n")
        command = [sys.executable, "-m", "mypy.stubtest", "pyint8._core", "--allowlist", str(allowed)]
        return subprocess.run([*command, "--ignore-unused-allowlist"], cwd=folder).returncode


def main() -> int:
    stub = of_stub((resources.files("pyint8") / "_core.pyi").read_text())
    found = differences(stub, of_binary(stub))
    print("\n".join(found) or f"the stub is the binary's: {len(stub)} signatures")
    return 1 if stubtest() or found else 0


if __name__ == "__main__":
    sys.exit(main())
