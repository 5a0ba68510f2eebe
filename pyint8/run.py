"""Run a Python program with its int8 loads by transformers going through pyint8: `python -m pyint8.run PROGRAM ...`.

    python -m pyint8.run script.py --its --arguments
    python -m pyint8.run lm_eval --model hf ...     # by its name on PATH
    python -m pyint8.run -m lm_eval --model hf ...

The program is run as Python itself would run it, within `pyint8.takeover()`.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path

from pyint8 import takeover
from pyint8.host.files import open_file

_USAGE = "usage: python -m pyint8.run (PROGRAM | -m MODULE) [ARGUMENT ...]"


def main(arguments: list[str]) -> None:
    """Runs the program that `arguments` begin with; the rest are its own."""
    is_module = arguments[:1] == ["-m"]
    program = arguments[1:] if is_module else arguments
    if not program or program[0].startswith("-"):
        raise SystemExit(_USAGE)
    name = program[0] if is_module else _file(program[0])
    sys.argv = [name, *program[1:]]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd() if is_module else str(Path(name).resolve().parent)
    with takeover():
        if is_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")


def _file(program: str) -> str:
    """The file of a program: itself, or what PATH has by this name, if that is Python's."""
    if os.path.exists(program):
        return program
    found = shutil.which(program)
    if found is None:
        raise SystemExit(f"there is no program {program}, neither as a file nor on PATH")
    with open_file(found) as file:
        first_line = file.readline(200)
        second_line = file.readline(200)
    if not _is_python(first_line, second_line):
        raise SystemExit(f"{found} is no Python program, and only those can be run")
    return found


def _is_python(first_line: bytes, second_line: bytes) -> bool:
    """Whether a file begins as Python's scripts do; where paths are long, pip makes `sh` look for Python."""
    return first_line.startswith(b"#!") and (b"python" in first_line or b"python" in second_line)


if __name__ == "__main__":
    main(sys.argv[1:])
