"""Processes that fork: children load as their parent does, also where it was loading when it forked."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loading_processes import Loading, load_small
from torch import nn
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.errors import CancelledError
from pyint8.host import garbage
from pyint8.host.imports import importing
from pyint8.report.progress import ByteProgress
from pyint8.streaming.extension import open_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),  # what the tests are about
]
PATIENCE = 120


def in_child(action: Callable[[], object]) -> None:
    """Fails unless a forked child does `action` without an error, and soon."""
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)
        code = 1
        try:
            torch.set_num_threads(1)  # the parent's OpenMP threads are not there (docs/limits.md)
            action()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def while_another_thread_loads(
    checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> Iterator[Callable[[], Any]]:
    """What loads the same model again; a thread is in the middle of loading it meanwhile."""
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    begun, go_on, start = threading.Event(), threading.Event(), ByteProgress.start

    def hold(*args: Any) -> None:
        start(*args)
        if threading.current_thread() is thread and os.getpid() == parent:
            begun.set()
            go_on.wait()

    monkeypatch.setattr(ByteProgress, "start", hold)
    parent = os.getpid()
    thread = threading.Thread(target=pyint8.load, args=(folder, "cpu"))
    thread.start()
    assert begun.wait(PATIENCE)
    yield lambda: pyint8.load(folder, "cpu")
    go_on.set()
    thread.join()


def test_a_child_of_a_parent_that_loads(while_another_thread_loads: Callable[[], Any]) -> None:
    in_child(while_another_thread_loads)


def test_its_collector_is_on(while_another_thread_loads: Callable[[], Any]) -> None:
    assert not gc.isenabled()

    def check() -> None:
        assert gc.isenabled()
        with garbage.paused():
            assert not gc.isenabled()
        assert gc.isenabled()

    in_child(check)
    assert not gc.isenabled()  # the parent still loads


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with garbage.paused():
            in_child(lambda: None if not gc.isenabled() else os._exit(3))
    finally:
        gc.enable()


def test_a_fork_waits_for_imports() -> None:
    inside, leave, forked = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        with importing:
            inside.set()
            leave.wait()

    def fork() -> None:
        in_child(lambda: importing.acquire(timeout=0) or os._exit(3))
        forked.set()

    holder, forker = threading.Thread(target=hold), threading.Thread(target=fork)
    holder.start()
    inside.wait()
    forker.start()
    assert not forked.wait(0.3)
    leave.set()
    assert forked.wait(PATIENCE)
    holder.join()
    forker.join()


def test_a_child_has_no_part_in_its_parents_engine(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    engine = open_engine(threads=2, slots_per_thread=1, slot_bytes=8192, direct_io=False)

    def use_and_let_go() -> None:
        nonlocal engine
        with pytest.raises(CancelledError, match="belongs to the process that forked"):
            engine.add_file(str(tmp_path / "x"))
        engine.close()
        del engine
        gc.collect()

    in_child(use_and_let_go)
    engine.add_file(str(tmp_path / "x"))
    engine.close()


def test_a_child_that_leaves_its_parents_load(checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that loads forks: the child unwinds, and its parent's load goes on."""
    parent, start = os.getpid(), ByteProgress.start

    class Left(BaseException):
        pass

    def fork(*args: Any) -> None:
        start(*args)
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE)
            raise Left
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    monkeypatch.setattr(ByteProgress, "start", fork)
    try:
        pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), "cpu")
    except Left:
        os._exit(0)
    finally:
        if os.getpid() != parent:
            os._exit(1)


@pytest.fixture
def small(tmp_path: Path) -> str:
    torch.save(nn.Sequential(nn.Linear(64, 64)).state_dict(), tmp_path / "w.bin")
    return str(tmp_path / "w.bin")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pools_of_every_kind(method: str, small: str) -> None:
    context = multiprocessing.get_context(method)
    with context.Pool(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        assert pool.map_async(load_small, [small] * 4).get(PATIENCE) == [load_small(small)] * 4
        pool.close()
        pool.join()


def test_workers_of_a_data_loader(small: str) -> None:
    loaded = list(torch.utils.data.DataLoader(Loading(small), num_workers=2, timeout=PATIENCE))
    assert [int(count) for count in loaded] == [2] * 4
