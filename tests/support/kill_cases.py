"""What processes are killed at in tests, in a module that they can import. Each says when it begins."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyint8
from pyint8.models import converted_files
from pyint8.models.transformers import converting
from pyint8.operations.cached import wait_for_fills
from pyint8.streaming.write_behind import WriteBehind

CPU = {"": "cpu"}
SIZE = "40KB"
# A write takes so long, so that most kills find some files written and others not.
_SECONDS = 0.01


def _slow_writes() -> None:
    """Each of which is noted in the journal."""
    put = WriteBehind.put

    def slow_put(*args: Any) -> Any:
        time.sleep(_SECONDS)
        return put(*args)

    converted_files._NOTED_BYTES = 1
    WriteBehind.put = slow_put  # type: ignore[method-assign]


def _announced(said: Connection) -> None:
    run = converting.Conversion.run

    def announced_run(*args: Any) -> None:
        said.send("begun")
        run(*args)

    converting.Conversion.run = announced_run  # type: ignore[method-assign]


def convert(said: Connection, source: Path, target: Path) -> None:
    _slow_writes()
    _announced(said)
    pyint8.convert(source, target, device="cpu", max_shard_size=SIZE, progress=False)


def save_in_turn(said: Connection, sources: list[Path], target: Path) -> None:
    """One model after another into the same folder, for ever."""
    models = [pyint8.load(source, CPU) for source in sources]
    said.send("begun")
    while True:
        for model in models:
            pyint8.save(model, target, max_shard_size=SIZE)


def fill(said: Connection, source: Path, cache: Path) -> None:
    _slow_writes()
    _announced(said)
    pyint8.load(source, CPU, cache=cache)
    wait_for_fills(60)
