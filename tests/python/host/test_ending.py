"""Python ends while a daemon thread loads: the load ends first, with an error of its own, and nothing aborts."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pyint8.errors import CancelledError
from pyint8.host.ending import _Ending, refuse_at_end

pytestmark = pytest.mark.slow

PROGRAM = """
import sys, threading, time
import torch
from torch import nn
import pyint8, pyint8.models.plain
from pyint8.report.progress import ByteProgress

def load():
    while True:
        pyint8.load(sys.argv[1], "cpu", model=nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 2048)))

begun = threading.Event()
start = ByteProgress.start
ByteProgress.start = lambda *args: (start(*args), begun.set())[0]
threading.Thread(target=load, daemon=True).start()
begun.wait()
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.02, 0.05])
def test_nothing_aborts(delay: float, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({f"{at}.{name}": torch.zeros(shape) for at in range(2) for name, shape in SHAPES.items()}, path)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(delay)], capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "terminate called" not in ran.stderr
    assert "FATAL" not in ran.stderr


SHAPES = {"weight": (2048, 2048), "bias": (2048,)}


class Work:
    """Something to wait for."""


def test_it_waits_for_other_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.host.ending._PATIENCE_SECONDS", 0.2)
    ending, own, other, over = _Ending(), Work(), Work(), threading.Event()
    thread = threading.Thread(target=over.wait, daemon=True)
    thread.start()
    ending.under_way[own] = threading.current_thread()
    ending.under_way[other] = thread
    stopped: list[bool] = []
    ending.stops.append(lambda: stopped.append(thread.is_alive()))
    ending()
    assert stopped == [True]
    assert ending._others()  # patience has an end
    over.set()
    thread.join()
    assert not ending._others()


def test_nothing_begins_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_at_end()
    ending = _Ending()
    ending()
    monkeypatch.setattr("pyint8.host.ending._ending", ending)
    with pytest.raises(CancelledError, match="Python ends"):
        refuse_at_end()
