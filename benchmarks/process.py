"""One contender in a process of its own: `python -m benchmarks.process NAME FOLDER` prints a line of JSON.

`--mode loads`: imports and the GPU's context come first, then the clock; the loads follow each other, so the second
shows what a warm process takes. `--mode start`: nothing is imported before, as in a script of two lines, and the moment
when the model is ready is told, for the parent to compare with the moment it started the process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FIELDS = ("RssAnon", "RssShmem", "VmRSS", "VmPin")


def _status() -> dict[str, int]:
    """Bytes by field of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {fields[0][:-1]: int(fields[1]) * 1024 for fields in lines if fields and fields[0][:-1] in _FIELDS}


class HostMemory:
    """Growth of the process's memory, sampled every 2 ms. Mapped files are in `resident` alone."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._base = _status()
        self.anonymous = self.shared = self.resident = self.pinned = 0

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            now = {name: value - self._base.get(name, 0) for name, value in _status().items()}
            self.anonymous = max(self.anonymous, now.get("RssAnon", 0))
            self.shared = max(self.shared, now.get("RssShmem", 0))
            self.resident = max(self.resident, now.get("VmRSS", 0))
            self.pinned = max(self.pinned, now.get("VmPin", 0))

    @contextmanager
    def watched(self) -> Iterator[None]:
        thread = threading.Thread(target=self._sample)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def record(self) -> dict[str, int]:
        return {
            "host_anonymous_peak": self.anonymous,
            "host_shared_peak": self.shared,
            "host_resident_peak": self.resident,
            "host_pinned_peak": self.pinned,
        }


def _timed_load(contender: Any, folder: Path) -> dict[str, Any]:
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    host = HostMemory()
    with host.watched():
        start = time.perf_counter()
        loaded, details = contender.load(folder)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    record = {"seconds": seconds, **host.record(), **details}
    if on_gpu:
        record |= {
            "gpu_peak_allocated": torch.cuda.max_memory_allocated() - before,
            "gpu_peak_reserved": torch.cuda.max_memory_reserved(),
            "gpu_final": torch.cuda.memory_allocated() - before,
        }
    del loaded
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return record


def run_loads(name: str, folder: Path, loads: int) -> dict[str, Any]:
    """Imports first, then `loads` loads."""
    start = time.perf_counter()
    import torch

    from benchmarks.contenders import CONTENDERS

    contender = CONTENDERS[name]
    contender.imports(folder)
    imported = time.perf_counter() - start
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    return {"import_seconds": imported, "loads": [_timed_load(contender, folder) for _ in range(loads)]}


def run_start(name: str, folder: Path) -> dict[str, Any]:
    """A script of two lines; "imports" is what every user of transformers pays, without a load."""
    if name == "imports":
        import torch
        import transformers

        model_class = json.loads((folder / "config.json").read_text())["architectures"][0]
        getattr(transformers, model_class)
    elif name == "pyint8":
        import torch

        import pyint8

        pyint8.load(folder, device_map={"": 0 if torch.cuda.is_available() else "cpu"}, progress=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    else:
        from benchmarks.contenders import CONTENDERS

        CONTENDERS[name].load(folder)
    return {"ready_at": time.monotonic()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", choices=("loads", "start"), default="loads")
    parser.add_argument("--loads", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if arguments.mode == "loads":
        record = run_loads(arguments.name, arguments.folder, arguments.loads)
    else:
        record = run_start(arguments.name, arguments.folder)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
