"""`pyint8 run`: scripts, modules, and programs by their name on PATH."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(sys.argv[1:], AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"].__module__, sys.path[0])
raise SystemExit(7)
"""
OURS = "pyint8.models.transformers.hooks"


def run(folder: Path, *arguments: str, module: str = "pyint8", path: str = "") -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", module, *(["run"] if module == "pyint8" else []), *arguments]
    environment = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A program as a file, a module, and one on PATH as pip installs it."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "program.py").write_text(PROGRAM)
    (tmp_path / "bin").mkdir()
    for name, first in (
        ("installed", f"#!{sys.executable}\n"),
        ("deep", f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''\n"),
        ("shell", "#!/bin/sh\n"),
    ):
        (tmp_path / "bin" / name).write_text(first + PROGRAM)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("module", ["pyint8", "pyint8.run"])
@pytest.mark.parametrize("program", [["program.py"], ["-m", "program"], ["installed"], ["deep"]], ids=" ".join)
def test_a_program_is_run_with_its_own_arguments(program: list[str], module: str, folder: Path) -> None:
    done = run(folder / "here", *program, "-m", "--json", "x", module=module, path=str(folder / "bin"))
    assert done.returncode == 7, done.stderr
    where = folder / ("bin" if program[0] in ("installed", "deep") else "here")
    assert done.stdout == f"{['-m', '--json', 'x']} {OURS} {where}\n"


@pytest.mark.parametrize(
    ("program", "found"),
    [("nothing-of-the-kind", "there is no program nothing-of-the-kind"), ("shell", "is no Python program")],
)
def test_what_cannot_be_run_is_said(program: str, found: str, folder: Path) -> None:
    done = run(folder / "here", program, path=str(folder / "bin"))
    assert (done.returncode, done.stdout) == (1, "")
    assert found in done.stderr
    assert "Traceback" not in done.stderr
