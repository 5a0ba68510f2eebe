"""Reading files to measure it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pytest

from pyint8.host import speed
from pyint8.host.files import open_unbuffered
from pyint8.host.speed import drop_from_cache, read_by_threads, takes_direct_reads

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    sizes = {"large": 9 * MIB, "small": 5000, "empty": 0}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    return [tmp_path / name for name in sizes]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each read, and a clock by which all reads together took one second."""
    found: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        found.append(preadv(descriptor, buffers, offset))
        return found[-1]

    ticks = iter(range(1000))
    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    return found


@pytest.mark.parametrize("threads", [1, 3, 20])
def test_each_piece_is_read_once(files: list[Path], threads: int, read: list[int]) -> None:
    """Whole pieces of the large file, all of the small one."""
    assert read_by_threads(files, threads) == pytest.approx((8 * MIB + 5000) / 1e9)
    assert sorted(read) == [0, 5000, *[2 * MIB] * 4]


def test_a_limit(files: list[Path], read: list[int]) -> None:
    assert read_by_threads(files, 2, limit=5 * MIB) == pytest.approx(4 * MIB / 1e9)
    assert read_by_threads(files, 2, limit=1) == pytest.approx(2 * MIB / 1e9)


def test_a_file_that_cannot_be_read(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with pytest.raises(FileNotFoundError):
        read_by_threads([files[0], files[0].parent / "absent"], 2)
    monkeypatch.setattr(speed.os, "preadv", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        read_by_threads(files, 4)
    assert not takes_direct_reads(files[0])


def test_direct_reads_are_asked_for(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[int] = []
    opened: Callable[..., FileIO] = open_unbuffered

    def noted(path: Path, how: int) -> FileIO:
        flags.append(how)
        return opened(path)

    monkeypatch.setattr(speed, "open_unbuffered", noted)
    assert takes_direct_reads(files[0])
    read_by_threads(files[:1], 1)
    assert [bool(each & os.O_DIRECT) for each in flags] == [True, False]


def test_what_is_dropped_is_still_there(files: list[Path]) -> None:
    before = files[0].read_bytes()
    drop_from_cache(files[0])
    assert files[0].read_bytes() == before
