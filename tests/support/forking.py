"""Programs that a user would start, in forks of a process that has imported everything: an import takes seconds.

As a program: `forking.py MODULE...` imports these, then does what each line of its input says, in JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

LOADING = ("pyint8.models.transformers.loading", "transformers.models.auto.modeling_auto", "transformers.generation")
"""What loading a language model imports."""


class ForkingPython(AbstractContextManager["ForkingPython"]):
    """Runs modules as `python -m MODULE WORDS` would.

    Args:
        imported: What is imported before.
        environment: In which it is, and all programs are; by default what this process has at the time.
    """

    def __init__(self, imported: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-W", "ignore", __file__, *imported]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self._environment = environment

    def run(
        self, module: str, words: Sequence[str], folder: Path, *, before: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Runs it in a folder, and waits for it.

        Args:
            module: Its name; none where `before` is all there is to run.
            words: Its arguments.
            folder: Where it runs.
            before: A program that its process runs first.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as own:
            streams = [Path(own, name) for name in ("out", "err")]
            asked = {"module": module, "words": [*words], "folder": str(folder), "streams": [*map(str, streams)]}
            asked |= {"before": before, "environment": dict(self._environment or os.environ)}
            print(json.dumps(asked), file=self._process.stdin, flush=True)
            code = int(self._process.stdout.readline())
            out, err = (path.read_text() for path in streams)
        return subprocess.CompletedProcess([module, *words], code, out, err)

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def _serve() -> dict[str, Any]:
    """Returns in a fork, with what it is to do; in the process itself it ends with the input."""
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        child = os.fork()
        if not child:
            return asked
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    raise SystemExit


def _become(asked: dict[str, Any]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(asked["streams"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv[1:] = asked["words"]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    program = _serve()
    _become(program)
    exec(program["before"], {"__name__": "before"})
    if program["module"]:
        runpy.run_module(program["module"], run_name="__main__", alter_sys=True)
