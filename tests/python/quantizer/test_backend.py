"""bitsandbytes is imported without torch's compiler, and nothing else changes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pyint8.quantizer.backend import deferred_compile


def _run(code: str, folder: object) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout


def _function_of(module: str):
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.__module__ = module
    return double


def test_importing_leaves_the_compiler_out_and_torch_as_it_was(tmp_path):
    code = (
        "import sys, torch; compile = torch.compile; import pyint8.quantizer.backend as backend; "
        "print('torch._inductor' in sys.modules, torch.compile is compile, backend.bitsandbytes.__name__)"
    )
    assert _run(code, tmp_path).split() == ["False", "True", "bitsandbytes"]


def test_a_bitsandbytes_that_is_there_is_left_alone(tmp_path):
    code = (
        "import bitsandbytes, torch; compile = torch.compile; from pyint8.quantizer import backend; "
        "print(backend.bitsandbytes is bitsandbytes, torch.compile is compile)"
    )
    assert _run(code, tmp_path).split() == ["True", "True"]


@pytest.mark.parametrize("spelling", ["plain", "with options"])
def test_functions_are_compiled_in_their_first_call(monkeypatch, spelling):
    calls = []

    def compile_(function, **options):
        calls.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    function = _function_of("bitsandbytes.some")
    with deferred_compile():
        deferred = torch.compile(function) if spelling == "plain" else torch.compile(dynamic=False)(function)
    assert torch.compile is compile_
    assert calls == []
    assert deferred.__name__ == "double"
    for _ in range(2):
        torch.testing.assert_close(deferred(torch.ones(2)), torch.full((2,), 2.0))
    assert calls == [(function, {} if spelling == "plain" else {"dynamic": False})]


def test_functions_of_others_are_compiled_at_once(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append(function) or function)
    function, module = _function_of("somebody.else"), torch.nn.Linear(1, 1)
    with deferred_compile():
        torch.compile(function)
        torch.compile(module)
    assert calls == [function, module]


def test_the_real_compiler_is_put_back_after_an_error():
    compile_ = torch.compile
    with pytest.raises(ImportError), deferred_compile():
        raise ImportError
    assert torch.compile is compile_


def test_a_compiled_caller_traces_through(monkeypatch):
    with deferred_compile():
        deferred = torch.compile(_function_of("bitsandbytes.some"))

    @torch.compile(backend="eager", fullgraph=True)
    def caller(x: torch.Tensor) -> torch.Tensor:
        return deferred(x) + 1

    torch.testing.assert_close(caller(torch.ones(2)), torch.full((2,), 3.0))
