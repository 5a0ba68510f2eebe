"""The command line as a user has it: in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forking import LOADING, ForkingPython

Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def python() -> Iterator[ForkingPython]:
    with ForkingPython(LOADING) as forking:
        yield forking


@pytest.fixture
def command(python: ForkingPython, tmp_path: Path) -> Callable[..., Done]:
    """Runs `pyint8 ...`: command("inspect", path, before="a program that runs first").

    With `afresh`, in a process that has imported nothing yet.
    """

    def run(*arguments: object, before: str = "", afresh: bool = False) -> Done:
        words = [*map(str, arguments)]
        if not afresh:
            return python.run("pyint8", words, tmp_path, before=before)
        start = f"{before}\nfrom pyint8.cli.main import main\nraise SystemExit(main())"
        return subprocess.run([sys.executable, "-c", start, *words], cwd=tmp_path, capture_output=True, text=True)

    return run
