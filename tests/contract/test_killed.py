"""kill -9 at any moment of what writes: it leaves all or nothing, and the next try is right and leaves nothing else.

PYINT8_TEST_KILLS=100 kills each of them so often.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill_cases as cases
import pytest
from oracle import differences, show, state
from rank_processes import IMPORTED
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.checkpoint.cache import CacheFolder
from pyint8.operations.cached import wait_for_fills

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("PYINT8_TEST_KILLS", "25"))
_PROCESSES = multiprocessing.get_context("forkserver")  # which has imported everything once
_WITHIN_SECONDS = 0.6


@pytest.fixture
def llama(checkpoints: CheckpointStore) -> Path:
    return Path(checkpoints.folder(ZOO["llama_sharded"], "bf16"))


@pytest.fixture
def kill() -> Callable[..., None]:
    """Has a process do a case, and kills it at some moment of it."""
    moments = random.Random(0)
    _PROCESSES.set_forkserver_preload(IMPORTED)

    def kill_one(case: Callable[..., None], *arguments: Any) -> None:
        ours, theirs = _PROCESSES.Pipe()
        process = _PROCESSES.Process(target=case, args=(theirs, *arguments))
        process.start()
        theirs.close()
        assert ours.recv() == "begun"
        time.sleep(moments.uniform(0, _WITHIN_SECONDS))
        process.kill()
        process.join()
        process.close()
        ours.close()

    return kill_one


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def saved(source: Path, folder: Path) -> dict[str, str]:
    pyint8.save(pyint8.load(source, cases.CPU), folder, max_shard_size=cases.SIZE)
    return files(folder)


def test_convert(kill: Callable[..., None], llama: Path, tmp_path: Path) -> None:
    expected = saved(llama, tmp_path / "expected")
    target, begun, ended = tmp_path / "work" / "int8", 0, 0
    for _ in range(KILLS):
        kill(cases.convert, llama, target)
        begun += any(path.stat().st_size > 100 for path in target.parent.glob(".*/.pyint8-journal"))
        if target.exists():
            ended += 1
            assert files(target) == expected
            shutil.rmtree(target)
    assert begun  # else the moments are wrong
    assert ended
    pyint8.convert(llama, target, device="cpu", max_shard_size=cases.SIZE)
    assert files(target) == expected
    assert os.listdir(target.parent) == [target.name]


def test_save(kill: Callable[..., None], llama: Path, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    """What was there before stays until all of the next is."""
    sources = [llama, Path(checkpoints.folder(ZOO["llama_sharded"], "fp32"))]
    expected = [saved(source, tmp_path / source.name) for source in sources]
    target = tmp_path / "work" / "int8"
    saved(llama, target)
    found, interrupted = set(), 0
    for _ in range(KILLS):
        kill(cases.save_in_turn, sources, target)
        interrupted += any(path != target for path in target.parent.iterdir())
        found.add(expected.index(files(target)))
    assert found == {0, 1}
    assert interrupted  # else the moments are wrong
    assert saved(llama, target) == expected[0]
    assert os.listdir(target.parent) == [target.name]


def test_filling_a_cache(kill: Callable[..., None], llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    begun, ended = 0, 0
    for _ in range(KILLS):
        kill(cases.fill, llama, cache)
        begun += any(path.stat().st_size > 100 for path in cache.glob(".*/.pyint8-journal"))
        entries = CacheFolder(str(cache), 10**9).entries()
        ended += len(entries)
        if entries:
            model, report = pyint8.load(llama, cases.CPU, cache=cache, return_report=True)
            assert report.from_cache
            assert_same(model, llama)
            shutil.rmtree(entries[0].folder)
    assert begun
    assert ended
    for is_there in (False, True):
        model, report = pyint8.load(llama, cases.CPU, cache=cache, return_report=True)
        assert report.from_cache == is_there
        assert_same(model, llama)
        assert wait_for_fills(60)
    assert len(CacheFolder(str(cache), 10**9).entries()) == 1
    assert not list(cache.glob(".*"))


def assert_same(model: Any, source: Path) -> None:
    found = differences(state(model), state(pyint8.load(source, cases.CPU)), allow=["*/attributes/*"])
    assert not found, show(found)
