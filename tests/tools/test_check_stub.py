"""Arguments that differ between the stub and what pybind11 says of the binary are found."""

from __future__ import annotations

import check_stub
import pytest

STUB = """
class Engine:
    def __init__(self, *, threads: int, direct_io: bool = False) -> None: ...
    def add(self, path: str, stamp: tuple[int, int] | None = None) -> int: ...

def count() -> int: ...
"""
BINARY = {
    "Engine.__init__": "__init__(self: pyint8._core.Engine, *, threads: typing.SupportsInt, direct_io: bool = False)",
    "Engine.add": "add(self: pyint8._core.Engine, path: str, stamp: tuple[int, int] | None = None) -> int\n\nMore.",
    "count": "count() -> int\n",
}


def differences(**changed: str) -> list[str]:
    binary = {name: check_stub.of_docstring(changed.get(name, text)) for name, text in BINARY.items()}
    return check_stub.differences(check_stub.of_stub(STUB), binary)


def test_the_same() -> None:
    assert differences() == []


@pytest.mark.parametrize(
    "docstring",
    [
        "add(self: E, file: str, stamp: object | None = None) -> int",
        "add(self: E, stamp: object | None = None, path: str = 'a') -> int",
        "add(self: E, path: str, stamp: object | None) -> int",
        "add(self: E, path: str, *, stamp: object | None = None) -> int",
        "add(self: E, path: str, stamp: object | None = None, more: int = 1) -> int",
    ],
)
def test_another_signature(docstring: str) -> None:
    (found,) = differences(**{"Engine.add": docstring})
    assert found.startswith("Engine.add: the stub says ['self', 'path', 'stamp=None'], the binary ")


def test_a_default_without_a_python_form() -> None:
    assert check_stub.of_docstring("f(kind: Kind = <Kind.fast: 1>) -> None") == ["kind=..."]
