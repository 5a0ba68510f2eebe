"""What the hardware gives: the rates no loader can pass, measured beside the loaders in the same run."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from benchmarks import machine, page_cache
from pyint8.config import StreamOptions
from pyint8.host.speed import read_by_threads

_GB = 1e9
_COPY_BYTES = 1 << 30
_SMALL_COPY_BYTES = 1 << 27  # without a GPU
_COLD_BYTES = 4 << 30
_SOURCES = Path(__file__).parents[1] / "csrc" / "core"
_RING_PASSES = 4


def _best(work: Callable[[], int], repeats: int) -> float:
    """GB/s of the fastest of `repeats`; `work` returns the bytes it moved."""
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        nbytes = work()
        best = max(best, nbytes / (time.perf_counter() - start) / _GB)
    return best


def host_to_gpu(*, pinned: bool, repeats: int = 5) -> float | None:
    """GB/s of one copy of 1 GiB to the GPU; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    source = torch.randint(0, 255, (_COPY_BYTES,), dtype=torch.uint8)
    source = source.pin_memory() if pinned else source
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")

    def copy() -> int:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return _COPY_BYTES

    return _best(copy, repeats)


def memory_copy(repeats: int = 5) -> float:
    """GB/s of torch's copy within host memory, by all its threads."""
    nbytes = _COPY_BYTES if torch.cuda.is_available() else _SMALL_COPY_BYTES
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8)
    target = torch.zeros_like(source)

    def copy() -> int:
        target.copy_(source)
        return nbytes

    return _best(copy, repeats)


@cache
def _bare_ring_program() -> Path:
    """bare_ring.cpp, compiled with what it uses of the core by the compiler that `c++` is."""
    sources = [Path(__file__).with_name("bare_ring.cpp"), _SOURCES / "error.cpp"]
    sources += [path for room in ("storage", "numeric", "device") for path in (_SOURCES / room).glob("*.cpp")]
    folder = tempfile.TemporaryDirectory(prefix="pyint8-")
    atexit.register(folder.cleanup)
    program = Path(folder.name) / "bare_ring"
    command = ["c++", "-O2", "-std=c++20", f"-I{_SOURCES}", *map(str, sources), "-o", str(program), "-pthread", "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


def bare_ring(files: list[Path], gpus: int) -> float | None:
    """GB/s from the page cache to so many GPUs through the simplest ring there is, with as many threads as the engine.

    Of two forms of the ring, the engine's own and one of more, smaller slots, the faster; None where there is no
    compiler.
    """
    options = StreamOptions()
    threads = options.worker_threads(gpus)
    forms = ((options.slots_per_thread, options.slot_size(threads)), (3, 1 << 20))
    rates = [_ring_rate(files, options.libcuda, gpus, threads, slots, nbytes) for slots, nbytes in forms]
    return max((rate for rate in rates if rate is not None), default=None)


def _ring_rate(files: list[Path], library: str, gpus: int, threads: int, slots: int, nbytes: int) -> float | None:
    """GB/s of the fastest pass."""
    try:
        command = [str(_bare_ring_program()), library, *map(str, (gpus, threads, slots, nbytes, _RING_PASSES))]
        done = subprocess.run([*command, *map(str, files)], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no bare ring: {getattr(error, 'stderr', None) or error}", file=sys.stderr)
        return None
    measured = json.loads(done.stdout)
    return float(measured["bytes"] / min(measured["seconds"]) / _GB)


def cold_read(files: list[Path], threads: int, *, direct: bool) -> float | None:
    """GB/s of the disk, of files verified cold; None where the file system refuses O_DIRECT."""
    page_cache.prepare(files, "cold")
    try:
        return read_by_threads(files, threads, direct=direct, limit=_COLD_BYTES)
    except OSError:
        return None


@contextmanager
def _allowed(cpus: int) -> Iterator[None]:
    """Threads that begin in the block have the same CPUs as a contender that is allowed so many."""
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, machine.first_cpus(cpus))
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


def measure(files: list[Path], *, cold: bool, few_cpus: Iterable[int] = ()) -> dict[str, float | None]:
    """All of them, in GB/s; reading also with only so many CPUs allowed, and as many threads."""
    cpus = len(os.sched_getaffinity(0))
    page_cache.prepare(files, "hot")
    ceilings: dict[str, float | None] = {
        "pinned host to GPU": host_to_gpu(pinned=True),
        "pageable host to GPU": host_to_gpu(pinned=False),
        "memory copy": memory_copy(),
    }
    for threads in sorted({1, 4, 8, cpus} & set(range(1, cpus + 1))):
        ceilings[f"page cache to memory, {threads} threads"] = max(read_by_threads(files, threads) for _ in range(3))
    for gpus in (1, 2, 4, 8):
        if gpus <= torch.cuda.device_count():
            ceilings[f"page cache to GPUs through a bare ring, {gpus}"] = bare_ring(files, gpus)
    for few in sorted(set(few_cpus)):
        with _allowed(few):
            rate = max(read_by_threads(files, few) for _ in range(3))
        ceilings[f"page cache to memory, {few} threads, {few} CPUs"] = rate
    if cold:
        ceilings["cold disk, O_DIRECT"] = cold_read(files, cpus, direct=True)
        ceilings["cold disk, buffered"] = cold_read(files, cpus, direct=False)
        page_cache.prepare(files, "hot")
    return ceilings
