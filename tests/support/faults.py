"""Lets every call of the system fail in turn, in each way it can, and looks at what is left.

A program: `faults.py LIBRARY reading|writing FOLDER SAMPLE`, with tests/cpp/support/faulty_system.cpp preloaded, prints
JSON: how much was tried, and what was wrong. SAMPLE is how many faults of each road are tried; 0 for all.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from faulty_roads import ROADS, Road, copied

import pyint8
from pyint8.errors import Pyint8Error

SHORT = -1
_ANY = (errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EACCES)
_OPEN = (*_ANY, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EAGAIN)
_READ = (SHORT, errno.EINTR, errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ENOMEM)
_WRITE = (SHORT, errno.EINTR, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)
_MOVE = (*_ANY, errno.ENOSPC, errno.EINVAL, errno.EXDEV, errno.EPERM)
_FAILURES = {
    "open": _OPEN,
    "openat": _OPEN,
    "opendir": _OPEN,
    "read": _READ,
    "pread": _READ,
    "write": _WRITE,
    "pwrite": _WRITE,
    "mmap": (errno.ENOMEM, errno.EAGAIN, errno.ENODEV, errno.EACCES),
    "flock": (errno.EINTR, errno.ENOLCK, errno.EWOULDBLOCK),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EINTR),
    "fdatasync": (errno.EIO, errno.ENOSPC, errno.EINTR),
    "ftruncate": (errno.EIO, errno.ENOSPC, errno.EINTR),
    "mkdir": (*_ANY, errno.ENOSPC),
    "rename": _MOVE,
    "renameat2": (*_MOVE, errno.ENOSYS),
    "link": (*_MOVE, errno.EMLINK),
    "linkat": (*_MOVE, errno.EMLINK),
    "close": (errno.EIO, errno.EINTR),
    "pthread_create": (errno.EAGAIN,),
    "posix_memalign": (errno.ENOMEM,),
}
# What transformers' own reading of JSON makes of a file that another program has locked.
_NOT_OURS = "can't concat NoneType to bytes"
_NOT_REACHED, _WENT_ROUND = "not reached", "went round"
_DONE = (_NOT_REACHED, _WENT_ROUND)
# After which a conversion keeps what it has done, for the next one; an OptionError says that another process has it.
_RESUMED = ("ReadError", "CancelledError", "OptionError")
_INHERITED = ", inherited"
_NO_MEMORY = ("not enough memory", "can't allocate memory")


class System:
    """The library that is preloaded."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.faults_name.restype = self._library.faults_failed.restype = ctypes.c_char_p
        self._library.faults_begin.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]

    def begin(self, folder: Path, nth: int = 0, error: int = 0) -> None:
        self._library.faults_begin(os.fsencode(folder), nth, error)

    def end(self) -> list[str]:
        """The names of the calls, in order."""
        return [self._library.faults_name(number + 1).decode() for number in range(self._library.faults_end())]

    def failed(self) -> str | None:
        """The name of the call that has; None if none has."""
        name: bytes | None = self._library.faults_failed()
        return None if name is None else _stem(name.decode())


def _stem(name: str) -> str:
    return name.removesuffix("64")


def files_below(folder: Path) -> dict[str, bytes | None]:
    """By path; None for folders."""
    return {str(each.relative_to(folder)): _content(each) for each in sorted(folder.rglob("*"))}


def _content(path: Path) -> bytes | None:
    if path.name == "generation_config.json":  # transformers takes one that it cannot read for one that is not there
        return b""
    return None if path.is_dir() else path.read_bytes()


def of_process() -> dict[str, object]:
    return {
        "open files": sorted(filter(None, map(_open_file, os.listdir("/proc/self/fd")))),
        "threads": sorted(each.name for each in threading.enumerate() if each.name != "tqdm_monitor"),
        "pinned": pyint8._core.pinned_bytes_in_use(),
        "collector": gc.isenabled(),
    }


def _open_file(number: str) -> str | None:
    """What a descriptor is of, and whether processes that are started get it; None if it is closed by now."""
    try:
        return os.readlink(f"/proc/self/fd/{number}") + (_INHERITED if os.get_inheritable(int(number)) else "")
    except OSError:
        return None


def settled(expected: dict[str, object]) -> dict[str, object]:
    """What there is, once threads that end have ended."""
    deadline = time.monotonic() + 2
    while (now := of_process()) != expected and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return now


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, dict):
        return bool(one == other)
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[n]), torch.as_tensor(other[n])) for n in one
    )


def is_of_torch(call: str, differing: dict[str, tuple[Any, Any]]) -> bool:
    """torch's own mapping, which transformers looks into, leaves its descriptor open where it cannot be made.

    That is one that started processes inherit; pyint8 has none of that kind.
    """
    if call != "mmap" or differing.keys() != {"open files"}:
        return False
    now, was = map(Counter, differing["open files"])
    return not was - now and [path.endswith(_INHERITED) for path in (now - was).elements()] == [True]


def is_expected(error: BaseException) -> bool:
    out_of_memory = isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)
    return isinstance(error, Pyint8Error) or out_of_memory or _NOT_OURS in str(error)


class Trial:
    """One road, tried with faults."""

    def __init__(self, system: System, folder: Path, name: str, road: Road) -> None:
        self._system, self._folder, self._name, self._road = system, folder, name, road
        self._kept = folder / "kept" / name
        if road.target is not None:
            copied(road.target, self._kept)
        self._expected = road.act()
        self._after = self._files()
        self._process = of_process()
        self.wrong: list[str] = []
        self.outcomes: Counter[str] = Counter()

    def _files(self) -> dict[str, bytes | None]:
        return {} if self._road.target is None else files_below(self._road.target.parent)

    def faults(self) -> list[tuple[int, str, int]]:
        """Each call of a clean run, and each error that it can give: (number, name, errno)."""
        self._start_afresh()
        self._system.begin(self._folder)
        self._road.act()
        calls = self._system.end()
        stems = list(map(_stem, calls))
        return [(number, name, error) for number, name in enumerate(stems, 1) for error in _FAILURES.get(name, _ANY)]

    def _start_afresh(self) -> None:
        """With the folder as it was before the first time, so that nothing follows from what another fault left."""
        if self._road.target is not None:
            copied(self._kept, self._road.target)

    def run(self, number: int, name: str, error: int) -> None:
        self._start_afresh()
        before = self._files()
        self._system.begin(self._folder, number, error)
        found, raised = None, None
        try:
            found = self._road.act()
        except BaseException as caught:
            raised = caught
        self._system.end()
        struck = self._system.failed()
        fault = (number, struck or name, error)  # threads call in another order each time
        outcome = self._judge(found, raised, *fault) if struck else _NOT_REACHED
        self.outcomes[outcome] += 1
        found = raised = None
        self._look(before, outcome, *fault)

    def _judge(self, found: Any, raised: BaseException | None, *fault: Any) -> str:
        if raised is not None:
            if not is_expected(raised):
                self._complain(f"raised {''.join(traceback.format_exception(raised)[-3:])}", *fault)
            return type(raised).__name__
        if same(found, self._expected):
            return _WENT_ROUND
        if found is False:
            return "told"
        self._complain("another result", *fault)
        return "WRONG"

    def _look(self, before: dict[str, bytes | None], outcome: str, *fault: Any) -> None:
        """At what is left, and at what comes next."""
        if (now := settled(self._process)) != self._process:
            differing = {key: (now[key], was) for key, was in self._process.items() if now[key] != was}
            if not is_of_torch(fault[1], differing):
                self._complain(f"left {differing}", *fault)
            self._process = now
        self._look_at_files(before, outcome, *fault)
        self._start_afresh()
        if not same(self._road.act(), self._expected) or self._files() != self._after:
            self._complain("another result the next time", *fault)

    def _look_at_files(self, before: dict[str, bytes | None], outcome: str, *fault: Any) -> None:
        now = self._files()
        if outcome in _RESUMED:
            now = {path: content for path, content in now.items() if not path.split("/")[0].endswith(".saving-resumed")}
        if now == self._after or (now == before and outcome not in _DONE):
            return
        changed = [path for path in {*now, *self._after} if now.get(path, 0) != self._after.get(path, 0)]
        self._complain(f"half done: {sorted(changed)[:5]}", *fault)

    def _complain(self, what: str, number: int, name: str, error: int) -> None:
        how = "short" if error == SHORT else errno.errorcode[error]
        self.wrong.append(f"{self._name}: {name} (call {number}) {how}: {what}")


def main(library: str, kind: str, where: str, sample: str) -> None:
    system, folder = System(library), Path(where)
    tried, wrong = {}, []
    for name, road in ROADS[kind](folder).items():
        trial = Trial(system, folder, name, road)
        faults = trial.faults()
        chosen = faults if sample == "0" else random.Random(name).sample(faults, min(len(faults), int(sample)))
        for fault in chosen:
            trial.run(*fault)
        tried[name] = {"calls": faults[-1][0], "faults": len(chosen), **trial.outcomes}
        wrong += trial.wrong
    print(json.dumps({"tried": tried, "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
