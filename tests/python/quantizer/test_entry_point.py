"""When bitsandbytes' C function is called without Python in between: with libraries that stand in for its own."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pyint8.quantizer import find_entry_point

SIGNATURE = [ctypes.c_void_p] * 3 + [ctypes.c_float, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared library with a function of that name."""
    if shutil.which("cc") is None:  # as in tests/tools/test_wheel
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.c").write_text("void cint8_vector_quant(void) {}\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "stub.so", folder / "stub.c"], check=True)
    return folder / "stub.so"


def loaded(library: Path, argtypes: Any = None) -> ctypes.CDLL:
    found = ctypes.CDLL(str(library))
    if argtypes is not None:
        found.cint8_vector_quant.argtypes = argtypes
    return found


def test_the_address_is_that_of_the_function(library: Path) -> None:
    found = loaded(library, SIGNATURE)
    assert find_entry_point(found) == ctypes.cast(found.cint8_vector_quant, ctypes.c_void_p).value


@pytest.mark.parametrize("argtypes", [SIGNATURE[:-1], [*SIGNATURE, ctypes.c_int32], [ctypes.c_float] * 7], ids=len)
def test_other_arguments_are_not_called(library: Path, argtypes: list[Any]) -> None:
    assert find_entry_point(loaded(library, argtypes)) is None


@pytest.mark.parametrize(
    ("version", "is_known"), [("0.45.5", False), ("0.46.0", True), ("0.49.2", True), ("0.50.0", False), ("1.0", False)]
)
def test_undeclared_arguments_are_known_by_the_version(
    library: Path, installed: Any, version: str, is_known: bool
) -> None:
    installed(bitsandbytes=version)
    assert (find_entry_point(loaded(library)) is not None) == is_known


def test_a_library_without_it(library: Path) -> None:
    class Mock:
        """As bitsandbytes' own for a library that does not load: whatever is asked for, a function that raises."""

        def __getattr__(self, name: str) -> Any:
            return lambda *_: pytest.fail("called")

    assert find_entry_point(Mock()) is None
    assert find_entry_point(object()) is None


def test_no_cuda_no_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert find_entry_point() is None
