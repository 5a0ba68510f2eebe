"""What fuzzing has found worth keeping, judged again: see tests/support/judges.py, and `make fuzz` for more of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus import FOLDER, inputs
from judges import JUDGES, judged

SMALL = 150_000


@pytest.mark.parametrize("name", JUDGES)
def test_it_is_judged_right(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYINT8_FUZZ_FOLDER", str(tmp_path))
    verdicts = [judged(name, raw) for raw in inputs(name)]
    assert verdicts.count(True) > 3
    assert verdicts.count(False) > 10


def test_all_of_it_is_small() -> None:
    assert sum(len(raw) for path in FOLDER.glob("*.txt") for raw in inputs(path.stem)) < SMALL
