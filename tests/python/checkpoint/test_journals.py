"""Journals of several processes: all that are of the work count, and none of a process that is alive is touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from failing import failing

from pyint8.checkpoint.journal import Journal
from pyint8.checkpoint.journals import gathered, journal_file, remove_all, remove_others
from pyint8.checkpoint.shards import shards_of
from pyint8.checkpoint.writer import TensorPlan
from pyint8.errors import ReadError
from pyint8.host.locks import lock


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """With three journals of one work, and one of another."""
    for rank, (identity, noted) in enumerate(
        [("work", {"a": 1}), ("work", {"b": None}), ("other", {"c": 3}), ("work", {})]
    ):
        with Journal(journal_file(str(tmp_path), rank), identity) as journal:
            if noted:
                journal.add(noted)
    return str(tmp_path)


def test_all_that_are_of_the_work_count(folder: str) -> None:
    assert gathered(folder, "work") == {"a": 1, "b": None}
    assert gathered(folder, "other") == {"c": 3}
    assert gathered(folder, "third") is None


def test_a_journal_begins_with_what_all_have(folder: str) -> None:
    with Journal(journal_file(folder), "work", gathered(folder, "work")) as journal:
        assert journal.done == {"a", "b"}
        assert journal.checksums == {"a": 1}
    remove_others(folder)
    assert gathered(folder, "work") == {"a": 1, "b": None}
    assert os.listdir(folder) == [".pyint8-journal"]
    remove_all(folder)
    assert os.listdir(folder) == []


def test_a_process_that_is_alive_is_seen(folder: str) -> None:
    locked = lock(journal_file(folder, 1))
    assert locked is not None
    with pytest.raises(BlockingIOError):
        gathered(folder, "work")
    os.close(locked)
    assert gathered(folder, "work")


@pytest.mark.parametrize("name", ["listdir", "open", "stat", "fstat"])
def test_a_disk_that_fails_has_not_lost_them(folder: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(name, 1))
        with pytest.raises(ReadError, match="Input/output error"):
            gathered(folder, "work")
    assert gathered(folder, "work") == {"a": 1, "b": None}


@pytest.mark.parametrize("remove", [remove_all, remove_others])
def test_those_that_are_not_seen_are_not_taken_for_removed(
    folder: str, monkeypatch: pytest.MonkeyPatch, remove: Callable[[str], None]
) -> None:
    monkeypatch.setattr(os, "listdir", failing("listdir", 1))
    with pytest.raises(OSError, match="Input/output error"):
        remove(folder)
    assert len(os.listdir(folder)) == 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 10])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_every_file_is_one_rank_s(count: int, ranks: int) -> None:
    shards = shards_of([TensorPlan(f"{number}", "I8", (1000,)) for number in range(count)], 1000)
    names = {f"{number}" for number in range(count)}
    parts = [names - shards.names_of_others(rank, ranks) for rank in range(ranks)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert max(map(len, parts)) <= -(-count // ranks)
