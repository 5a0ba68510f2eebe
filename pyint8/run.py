"""Run a Python program with its int8 loads by transformers going through pyint8: `python -m pyint8.run PROGRAM ...`.

    python -m pyint8.run script.py --its --arguments
    python -m pyint8.run -m lm_eval --model hf ...

The program is run as Python itself would run it, within `pyint8.takeover()`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from pyint8 import takeover

_USAGE = "usage: python -m pyint8.run (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main(arguments: list[str]) -> None:
    """Runs the program that `arguments` begin with; the rest are its own."""
    is_module = arguments[:1] == ["-m"]
    program = arguments[1:] if is_module else arguments
    if not program or program[0].startswith("-"):
        raise SystemExit(_USAGE)
    sys.argv = program
    with takeover():
        if is_module:  # the current folder is first in sys.path already, for this module
            runpy.run_module(program[0], run_name="__main__", alter_sys=True)
        else:
            if not getattr(sys.flags, "safe_path", False):
                sys.path[0] = str(Path(program[0]).resolve().parent)
            runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
