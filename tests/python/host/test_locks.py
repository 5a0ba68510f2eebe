"""Locks of files and folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from failing import failing

from pyint8.host.locks import lock, unlock

HOLDS = """
import sys
from pyint8.host.locks import lock
held = lock(sys.argv[1], shared=sys.argv[2] == "shared")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("is_folder", [True, False])
@pytest.mark.parametrize(("theirs", "ours"), [(False, False), (False, True), (True, False), (True, True)])
def test_who_may_have_it(tmp_path: Path, is_folder: bool, theirs: bool, ours: bool) -> None:
    path = tmp_path / "it"
    path.mkdir() if is_folder else path.write_text("")
    command = [sys.executable, "-c", HOLDS, str(path), "shared" if theirs else "alone"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        if theirs and ours:
            held = lock(str(path), shared=True, wait=False)
            assert held is not None
            os.close(held)
        else:
            with pytest.raises(BlockingIOError):
                lock(str(path), shared=ours, wait=False)
        process.kill()
    held = lock(str(path), shared=ours, wait=False)  # it ends with its process
    assert held is not None
    os.close(held)


def test_what_was_replaced_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it"
    for replace in (lambda: shutil.rmtree(path), lambda: (path.rename(tmp_path / "other"), path.mkdir())):
        path.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr("fcntl.flock", lambda *_, replace=replace: replace())
            before = len(os.listdir("/proc/self/fd"))
            assert lock(str(path)) is None
            assert len(os.listdir("/proc/self/fd")) == before


def test_a_close_that_fails_unlocks_even_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = lock(str(tmp_path))
    assert held is not None
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", failing("close"))
        unlock(held)
    again = lock(str(tmp_path), wait=False)
    assert again is not None
    unlock(again)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lock(str(tmp_path / "none"))
