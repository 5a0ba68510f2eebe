"""`pyint8 doctor` and `pyint8 bench`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., Any]

BROKEN = """
import pyint8.cli.doctor as verb
from pyint8.report.finding import Finding
def examine(path):
    yield Finding("one", "ok", "well")
    yield Finding("other", "broken", "bad", {"a": 1}, "nothing works", "mend it")
verb.examine = examine
"""
UNFINISHED = """
import pyint8.cli.doctor as verb
from pyint8.report.finding import Finding
def examine(path):
    yield Finding("one", "ok", "well")
    raise KeyboardInterrupt
verb.examine = examine
"""


def test_doctor(command: Command) -> None:
    done = command("doctor", "--json")
    value = json.loads(done.stdout)
    assert done.returncode == (0 if value["works"] else 3)
    names = [finding["name"] for finding in value["findings"]]
    assert names[0] == "pyint8"
    assert {"transformers", "CPUs", "memory", "torch at work"} < set(names)


def test_doctor_says_no_by_3(command: Command) -> None:
    done = command("doctor", before=BROKEN)
    assert done.returncode == 3
    assert done.stdout.splitlines() == [
        "ok       one               well",
        "broken   other             bad",
        "         means       nothing works",
        "         mend        mend it",
    ]
    value = json.loads(command("doctor", "--json", before=BROKEN).stdout)
    assert value["works"] is False
    assert value["findings"][1]["facts"] == {"a": 1}


def test_what_the_doctor_found_is_shown_at_once(command: Command) -> None:
    done = command("doctor", before=UNFINISHED)
    assert (done.returncode, done.stdout) == (130, "ok       one               well\n")


def test_doctor_of_nothing(command: Command) -> None:
    done = command("doctor", "absent")
    assert done.returncode == 1
    assert "pyint8 doctor: absent: there is no such file" in done.stderr


def test_bench(command: Command, tmp_path: Path) -> None:
    done = command("bench", "--folder", tmp_path, "--size", "8MiB", "--json")
    assert done.returncode == 0, done.stderr
    speeds = {speed["name"]: speed for speed in json.loads(done.stdout)["speeds"]}
    assert speeds["load"]["gigabytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == []
