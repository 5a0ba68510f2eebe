"""What a terminal shows: a bar in bytes on standard error, and none where nobody looks."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zoo import ZOO, CheckpointStore

pytestmark = pytest.mark.slow


def shown_on_a_terminal(words: list[str], folder: Path) -> tuple[subprocess.CompletedProcess[str], str]:
    """Runs a command line whose standard error is a terminal; also returns what that shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # without a size bars are empty
    shown: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(ours, 4096):
                shown.append(piece)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    try:
        command = [sys.executable, "-m", "pyint8", *words]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment)
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    return done, b"".join(shown).decode()


@pytest.mark.parametrize("verb", ["load", "convert"])
def test_a_terminal_shows_a_bar(verb: str, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    source = str(checkpoints.folder(ZOO["llama"], "bf16"))
    words = [verb, source, *(["int8", "--device", "cpu"] if verb == "convert" else [])]
    done, shown = shown_on_a_terminal(words, tmp_path)
    assert done.returncode == 0
    assert "Loading int8: 100%" in shown
    assert "156k/156k" in shown
    assert "Loading int8" not in done.stdout


def test_a_terminal_shows_none_where_it_is_not_wanted(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    source = str(checkpoints.folder(ZOO["llama"], "bf16"))
    done, shown = shown_on_a_terminal(["load", source, "--no-progress"], tmp_path)
    assert done.returncode == 0
    assert "Loading int8" not in shown


def test_a_file_gets_none(checkpoints: CheckpointStore, command: Callable[..., Any]) -> None:
    done = command("load", checkpoints.folder(ZOO["llama"], "bf16"))
    assert "Loading int8" not in done.stdout + done.stderr
