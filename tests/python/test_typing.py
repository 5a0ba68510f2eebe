"""What a type checker knows of `pyint8.load`, for a program that is checked strictly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyint8

pytestmark = pytest.mark.slow

pytest.importorskip("mypy")

PROGRAM = """
import torch
from torch import nn
from transformers import LlamaForCausalLM, AutoModelForCausalLM, PreTrainedModel
import pyint8

def loaded(path: str) -> PreTrainedModel:
    return pyint8.load(path)

class Own(nn.Module):
    pass

reveal_type(pyint8.load("p"))
reveal_type(pyint8.load("p", return_report=True))
reveal_type(pyint8.load("p", "cpu", model=LlamaForCausalLM, dtype=torch.float16))
reveal_type(pyint8.load("p", model=AutoModelForCausalLM, attn_implementation="sdpa"))
reveal_type(pyint8.load("p", model=Own()))
reveal_type(pyint8.load("p", model=Own(), return_report=True))
_, report = pyint8.load("p", return_report=True)
reveal_type(report.gigabytes_per_second)
try:
    loaded("p")
except pyint8.Pyint8Error as error:
    reveal_type((error.path, error.tensor, error.offset))
with pyint8.takeover() as loads:
    reveal_type(loads)
"""
REVEALED = [
    "PreTrainedModel",
    "tuple[PreTrainedModel, LoadReport]",
    "LlamaForCausalLM",
    "PreTrainedModel",
    "Own",
    "tuple[Own, LoadReport]",
    "float",
    "tuple[str | None, str | None, int | None]",
    "list[LoadReport]",
]
WRONG = {
    "pyint8.load('p', dtype=3)": "call-overload",
    "pyint8.load('p', strict='yes')": "call-overload",
    "pyint8.load('p', return_report=True)[1].gigabyte_per_second": "attr-defined",
}


def check(program: str, folder: Path) -> str:
    """mypy's words, with transformers' classes but not their insides."""
    (folder / "program.py").write_text(program)
    (folder / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-torch.*]\nfollow_imports = silent\n")
    where = Path(pyint8.__file__).parents[1]
    environment = dict(os.environ) if where.name == "site-packages" else {**os.environ, "MYPYPATH": str(where)}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "program.py"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    return done.stdout


def test_a_strict_program_knows_what_it_gets(tmp_path: Path) -> None:
    said = check(PROGRAM + "\n".join(WRONG), tmp_path)
    revealed = [re.sub(r"([a-z_]\w*\.)+", "", text) for text in re.findall(r'Revealed type is "(.*)"', said)]
    assert revealed == REVEALED, said
    assert re.findall(r"error: .*\[([a-z-]+)\]", said) == list(WRONG.values()), said
