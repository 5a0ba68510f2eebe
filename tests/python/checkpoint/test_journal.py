"""The journal of a checkpoint that is being written."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyint8.checkpoint.journal import Journal
from pyint8.errors import WriteError


def test_what_is_added_is_there_again(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    with Journal(path, "work") as journal:
        assert journal.done == frozenset()
        journal.add({"a": None, "b": 7})
        journal.add({"ü\n": 0})
    assert Journal.is_of(path, "work")
    for _ in range(2):
        with Journal(path, "work") as journal:
            assert journal.done == {"a", "b", "ü\n"}


def test_other_work_begins_anew(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    with Journal(path, "work") as journal:
        journal.add({"a": None})
    assert not Journal.is_of(path, "other")
    with Journal(path, "other") as journal:
        assert journal.done == frozenset()


@pytest.mark.parametrize("left", range(1, 30))
def test_a_line_that_was_cut_short_does_not_count(tmp_path: Path, left: int) -> None:
    path = tmp_path / "journal"
    with Journal(str(path), "work") as journal:
        journal.add({"aaaa": 1})
        journal.add({"bbbb": 1})
    path.write_bytes(path.read_bytes()[:-left])
    with Journal(str(path), "work") as journal:
        assert journal.done == ({"aaaa"} if left <= 12 else frozenset())
        journal.add({"cccc": 1})
    with Journal(str(path), "work") as journal:
        assert "cccc" in journal.done


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WriteError):
        Journal(str(tmp_path / "none" / "journal"), "work")
