"""The command line as a user has it: in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Done = subprocess.CompletedProcess[str]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Done]:
    """Runs `pyint8 ...`: command("inspect", path, before="a program that runs first")."""

    def run(*arguments: object, before: str = "") -> Done:
        start = ["-c", f"{before}\nfrom pyint8.cli.main import main\nraise SystemExit(main())"]
        words = [sys.executable, *(start if before else ["-m", "pyint8"]), *map(str, arguments)]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    return run
