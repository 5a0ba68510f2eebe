"""Every call of the system that a verb makes fails in turn: an error of ours or the right result, and nothing is left.

A sample of calls and errors runs always; all of them with PYINT8_TEST_EVERY_FAULT=1 (`make faults`), which takes long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from bitsandbytes import functional
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.errors import Pyint8Error

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parents[1] / "support" / "faults.py"
SAMPLE = "0" if os.environ.get("PYINT8_TEST_EVERY_FAULT") == "1" else "8"
ROADS = {"reading": 11, "writing": 6}


@pytest.fixture
def library() -> Path:
    driver = os.environ.get("PYINT8_TEST_LIBCUDA")
    if driver is None:
        assert os.environ.get("PYINT8_REQUIRE_FAKE_CUDA") != "1", "PYINT8_TEST_LIBCUDA is not set"
        pytest.skip("PYINT8_TEST_LIBCUDA is not set")
    return Path(driver).with_name("libfaults.so")


def tried(kind: str, library: Path, folder: Path) -> dict[str, Any]:
    environment = dict(os.environ) | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(PROGRAM.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", str(PROGRAM), str(library), kind, str(folder), SAMPLE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kind", ROADS)
def test_a_call_that_fails(kind: str, library: Path, tmp_path: Path) -> None:
    found = tried(kind, library, tmp_path)
    print(json.dumps(found["tried"], indent=1))
    assert not found["wrong"], "\n".join(found["wrong"])
    assert len(found["tried"]) == ROADS[kind]
    for name, road in found["tried"].items():
        assert road["calls"] > 20, name  # the library is there, and sees them


@pytest.mark.parametrize(
    ("call", "left", "is_let_pass"),
    [
        ("mmap", ["w, inherited"], True),
        ("mmap", ["w"], False),
        ("pread", ["w, inherited"], False),
        ("mmap", ["w, inherited", "w, inherited"], False),
        ("mmap", ["w, inherited", "w"], False),
    ],
)
def test_the_descriptor_that_torch_leaves_is_told_from_others(call: str, left: list[str], is_let_pass: bool) -> None:
    before = ["/dev/null", "w, inherited"]
    assert faults.is_of_torch(call, {"open files": (before + left, before)}) == is_let_pass
    assert not faults.is_of_torch(call, {"open files": (left, before)})
    assert not faults.is_of_torch(call, {"open files": (before + left, before), "threads": (["a"], [])})


class Quantizer:
    """bitsandbytes', of which one call fails."""

    def __init__(self, failing: int = 0, error: Exception | None = None) -> None:
        self._quantize: Any = functional.int8_vectorwise_quant
        self._failing, self._error = failing, error
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self._failing and self._error is not None:
            raise self._error
        return self._quantize(*args, **kwargs)


def loaded(folder: Path, quantizer: Quantizer) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "int8_vectorwise_quant", quantizer)
        return dict(pyint8.load(folder, "cpu").state_dict())


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, torch.OutOfMemoryError, ValueError])
@pytest.mark.usefixtures("nothing_left")
def test_a_quantizer_that_fails(kind: type[Exception], checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    sound = Quantizer()
    expected = loaded(folder, sound)
    assert sound.calls > 10
    for call in range(1, sound.calls + 1):
        with pytest.raises((kind, Pyint8Error), match=f"call {call} failed"):
            loaded(folder, Quantizer(call, kind(f"call {call} failed")))
    again = loaded(folder, Quantizer())
    assert all(torch.equal(again[name], value) for name, value in expected.items())
