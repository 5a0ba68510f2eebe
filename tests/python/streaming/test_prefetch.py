"""What is cold is read into the page cache while nothing else can happen yet; what is not is left alone."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8 import StreamOptions
from pyint8.checkpoint import Checkpoint, checkpoint_of_files
from pyint8.host.page_cache import cold_steps
from pyint8.streaming.prefetch import PageCachePrefetch

pytestmark = pytest.mark.usefixtures("nothing_left")
MIB = 1 << 20
OPTIONS = StreamOptions(threads=2)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    for shard in range(2):
        save_file({f"x{shard}": torch.zeros(20 * MIB, dtype=torch.uint8)}, tmp_path / f"{shard}.safetensors")
    return checkpoint_of_files([str(tmp_path / f"{shard}.safetensors") for shard in range(2)])


def resident(path: str) -> float:
    """The part of a file that is in the page cache, asked without changing that."""
    size = os.stat(path).st_size
    pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
    answer = (ctypes.c_ubyte * pages)()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as view:
        start = ctypes.c_char.from_buffer(view)
        assert ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(size), answer) == 0
        del start
    return sum(page & 1 for page in answer) / pages


def evict(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if resident(path) > 0.01:
        pytest.skip("this file system keeps its pages")


def test_what_is_cached_is_not_read(checkpoint: Checkpoint) -> None:
    for path in checkpoint.files:
        Path(path).read_bytes()
    assert not PageCachePrefetch(checkpoint, OPTIONS).is_reading


def test_what_is_cold_is_read(checkpoint: Checkpoint) -> None:
    hot, cold = checkpoint.files
    Path(hot).read_bytes()
    evict(cold)
    ahead = PageCachePrefetch(checkpoint, OPTIONS)
    assert ahead.is_reading
    deadline = time.monotonic() + 20
    while resident(cold) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    ahead.close()
    ahead.close()
    assert resident(cold) == 1


def test_it_can_be_stopped_at_once(checkpoint: Checkpoint) -> None:
    for path in checkpoint.files:
        evict(path)
    PageCachePrefetch(checkpoint, OPTIONS).close()


def test_the_last_step_may_be_short(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(9 * MIB + 5))
    evict(str(path))
    assert list(cold_steps(str(path), 4 * MIB)) == [(0, 4 * MIB), (4 * MIB, 4 * MIB), (8 * MIB, MIB + 5)]


def test_direct_io_leaves_the_page_cache_alone(checkpoint: Checkpoint) -> None:
    for path in checkpoint.files:
        evict(path)
    assert not PageCachePrefetch(checkpoint, StreamOptions(direct_io=True)).is_reading


def test_no_more_than_half_of_the_memory_is_filled(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in checkpoint.files:
        evict(path)
    monkeypatch.setattr("pyint8.streaming.prefetch.available_memory", lambda: 2 * MIB)
    assert not PageCachePrefetch(checkpoint, OPTIONS).is_reading


def test_a_cold_checkpoint_loads_as_a_hot_one_does(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    hot = pyint8.load(folder, "cpu").state_dict()
    for path in folder.glob("*.safetensors"):
        evict(str(path))
    for name, tensor in pyint8.load(folder, "cpu").state_dict().items():
        assert torch.equal(tensor, hot[name]), name
