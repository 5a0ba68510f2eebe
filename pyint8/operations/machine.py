"""What `pyint8 doctor` finds out about packages, CPUs, memory and storage; imports neither torch nor transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from pyint8.config import StreamOptions
from pyint8.errors import Pyint8Error, ReadError
from pyint8.host.cpus import usable_cpus
from pyint8.host.files import open_file
from pyint8.host.limits import file_system, lockable_bytes, memory_limit
from pyint8.host.memory import available_memory
from pyint8.host.page_cache import is_cached
from pyint8.host.speed import read_by_threads, takes_direct_reads
from pyint8.models.transformers.releases import KNOWN
from pyint8.report import readable_size
from pyint8.report.finding import Finding

_FEW_CPUS = 4
_LITTLE_MEMORY = 2 << 30  # beside a model on a GPU: torch, transformers, the rings
_SAMPLE = 256 << 20
_LEAST_SAMPLE = 32 << 20  # less is read before all threads run
_SLOW_DISK = 2.0  # GB/s: below, a cold checkpoint of 16 GB takes 8 seconds or more
_SLOW_CACHE = 4.0


def look_at_packages() -> Iterator[Finding]:
    """One finding for each package that pyint8 needs, and whether the installed version is one that it works with."""
    try:
        wanted = [Requirement(text) for text in metadata.requires("pyint8") or ()]
        version = metadata.version("pyint8")
    except metadata.PackageNotFoundError:
        yield Finding("pyint8", "broken", "not installed", {}, "nothing can be loaded", "`pip install pyint8`")
        return
    yield Finding("pyint8", "ok", version, {"version": version})
    yield from (_package(each) for each in wanted if each.marker is None or each.marker.evaluate())


def _package(wanted: Requirement) -> Finding:
    name, known = wanted.name, str(wanted.specifier)
    mend = f'`pip install "{name}{known}"`'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "broken", f"absent; known: {known}", {"version": None}, "nothing can be loaded", mend)
    facts = {"version": version, "known": known}
    value = f"{version} (known: {known})"
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(name, "broken", value, facts, "loads may fail, or are refused", mend)
    if name == "transformers" and Version(version).release[:2] > Version(KNOWN).release:
        return Finding(name, "unknown", value, facts, f"releases after {KNOWN} were not tried")
    return Finding(name, "ok", value, facts)


def look_at_machine() -> Iterator[Finding]:
    """CPUs, memory, and what may be locked of it."""
    yield _cpus()
    yield _memory()
    yield _locked()


def _cpus() -> Finding:
    count, threads = usable_cpus(), StreamOptions.from_environment().worker_threads()
    value = f"{count} usable of {os.cpu_count()}, {threads} threads read"
    facts = {"usable": count, "all": os.cpu_count(), "threads": threads}
    if count >= _FEW_CPUS:
        return Finding("CPUs", "ok", value, facts)
    mend = "give the process more: its affinity (`taskset`), its cgroup (`docker --cpus`)"
    return Finding("CPUs", "slow", value, facts, "few threads read, and quantizing on the CPU shares them", mend)


def _memory() -> Finding:
    limit, available = memory_limit(), available_memory()
    usable = available if limit is None else min(limit, available)
    value = f"{readable_size(available)} available" + ("" if limit is None else f", limit {readable_size(limit)}")
    facts = {"available": available, "limit": limit}
    if usable >= _LITTLE_MEMORY:
        return Finding("memory", "ok", value, facts)
    consequence = "the system may end the process, and the page cache keeps no checkpoint"
    return Finding("memory", "slow", value, facts, consequence, "free some, or raise the cgroup's limit (`docker -m`)")


def _locked() -> Finding:
    limit, options = lockable_bytes(), StreamOptions.from_environment()
    threads = options.worker_threads()
    ring = threads * options.slots_per_thread * options.slot_size(threads)
    value = "no limit" if limit is None else f"at most {readable_size(limit)}"
    facts = {"limit": limit, "ring": ring}
    if limit is None or limit >= ring:
        return Finding("memlock", "ok", value, facts)
    mend = "`ulimit -l unlimited`, or `docker --ulimit memlock=-1`, should pinning memory fail"
    consequence = f"a GPU's ring pins {readable_size(ring)}; NVIDIA's driver does not usually count that"
    return Finding("memlock", "ok", value, facts, consequence, mend)


def look_at_storage(path: str) -> Iterator[Finding]:
    """The file system that a checkpoint lies on, and how fast it is read: 256 MiB at most, three times.

    Raises:
        ReadError: There is nothing at `path`, or it cannot be read.
    """
    if not os.path.exists(path):
        raise ReadError("there is no such file or folder; check the path", path=path)
    kind = file_system(path)
    facts = {"kind": kind.kind, "device": kind.device, "is_remote": kind.is_remote}
    finding = Finding("file system", "ok", f"{kind.kind} on {kind.device}", facts)
    if kind.is_remote:
        mend = "copy the checkpoint to a local disk, or convert it: int8 files are half as large"
        finding = replace(finding, state="slow", consequence="cold files come over a network", mend=mend)
    yield finding
    files = _files(path)
    nbytes = sum(os.path.getsize(file) for file in files)
    if nbytes < _LEAST_SAMPLE:
        value = f"{readable_size(nbytes)} of weights are there, too little to measure by"
        yield Finding("storage", "unknown", value, {"bytes": nbytes}, None, "name the folder of a larger checkpoint")
        return
    try:
        yield _disk(files)
        yield _page_cache(files)
    except OSError as error:
        raise ReadError(f"cannot be read: {error.strerror or error}", path=path, errno=error.errno) from error


def _files(path: str) -> list[str]:
    from pyint8.checkpoint import open_checkpoint

    try:
        return list(open_checkpoint(path).files)
    except (Pyint8Error, OSError):
        return [path] if os.path.isfile(path) else []


def _disk(files: list[str]) -> Finding:
    """Measured past the page cache, which keeps what it has."""
    threads = StreamOptions.from_environment().worker_threads()
    is_direct = takes_direct_reads(files[0])
    facts: dict[str, object] = {"direct_io": is_direct}
    if not is_direct and _is_warm(files):
        value = "in the page cache, and the file system takes no direct reads: only cold files would show"
        return Finding("disk", "unknown", value, facts)
    speed = read_by_threads(files, threads, direct=is_direct, limit=_SAMPLE)
    facts["gigabytes_per_second"] = speed
    value = f"{speed:.2f} GB/s {'by direct reads' if is_direct else 'cold; no direct reads here'}"
    if speed >= _SLOW_DISK:
        return Finding("disk", "ok", value, facts)
    consequence = f"a cold checkpoint of 16 GB takes {16 / max(speed, 0.01):.0f} s"
    mend = "convert it once (`pyint8 convert`): int8 files are half as large; or use a faster disk"
    return Finding("disk", "slow", value, facts, consequence, mend)


def _is_warm(files: list[str]) -> bool:
    with open_file(files[0]) as file:
        return is_cached(file.fileno(), 0)


def _page_cache(files: list[str]) -> Finding:
    threads = StreamOptions.from_environment().worker_threads()
    read_by_threads(files, threads, limit=_SAMPLE)  # now it is there
    speed = max(read_by_threads(files, threads, limit=_SAMPLE) for _ in range(2))
    facts = {"gigabytes_per_second": speed, "threads": threads}
    value = f"{speed:.1f} GB/s with {threads} threads"
    if speed >= _SLOW_CACHE:
        return Finding("page cache", "ok", value, facts)
    mend = "more CPUs for the process; a local file system"
    return Finding("page cache", "slow", value, facts, "later loads are no faster than that", mend)
