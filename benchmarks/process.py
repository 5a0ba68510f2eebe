"""One contender in a process of its own: `python -m benchmarks.process NAME FOLDER` prints a line of JSON.

`--mode loads`: imports and the GPU's context come first, then the clock; the loads follow each other, so the second
shows what a warm process takes. `--mode start`: nothing is imported before, as in a script of two lines, and the time
when the model is ready is reported, for the parent to compare with the time when it started the process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FIELDS = ("RssAnon", "RssShmem", "VmRSS", "VmPin")
_INTERVAL = 0.002  # seconds

# Run in another process, so that looking costs the loader nothing: says that it looks, and at the end the peaks.
_SAMPLER = f"""
import json, select, sys
def status(fields={_FIELDS}):
    with open(f"/proc/{{sys.argv[1]}}/status") as file:
        lines = (line.split() for line in file)
        return {{line[0][:-1]: int(line[1]) * 1024 for line in lines if line and line[0][:-1] in fields}}
base = status()
peaks = dict.fromkeys(base, 0)
print("looking", flush=True)
while True:
    over = select.select([sys.stdin], [], [], {_INTERVAL})[0]
    for name, value in status().items():
        peaks[name] = max(peaks[name], value - base[name])
    if over:
        break
print(json.dumps(peaks))
"""


class HostMemory:
    """Growth of the process's memory while it is watched. Mapped files are in `resident` alone."""

    def __init__(self) -> None:
        self._peaks: dict[str, int] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        command = [sys.executable, "-S", "-E", "-c", _SAMPLER, str(os.getpid())]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sampler:
            assert sampler.stdout is not None
            sampler.stdout.readline()
            try:
                yield
            finally:
                self._peaks = json.loads(sampler.communicate("enough\n")[0])

    def record(self) -> dict[str, int]:
        return {
            "host_anonymous_peak": self._peaks.get("RssAnon", 0),
            "host_shared_peak": self._peaks.get("RssShmem", 0),
            "host_resident_peak": self._peaks.get("VmRSS", 0),
            "host_pinned_peak": self._peaks.get("VmPin", 0),
        }


def _timed_load(contender: Any, folder: Path) -> dict[str, Any]:
    import torch

    on_gpu = torch.cuda.is_available()
    gpus = range(torch.cuda.device_count())
    if on_gpu:
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
            torch.cuda.synchronize(gpu)
    before = sum(map(torch.cuda.memory_allocated, gpus))
    free_before = sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    host = HostMemory()
    with host.watched():
        start = time.perf_counter()
        loaded, details = contender.load(folder)
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        seconds = time.perf_counter() - start
    record = {"seconds": seconds, **host.record(), **details}
    if on_gpu:
        record |= {
            "gpu_peak_allocated": sum(map(torch.cuda.max_memory_allocated, gpus)) - before,
            "gpu_peak_reserved": sum(map(torch.cuda.max_memory_reserved, gpus)),
            "gpu_final": sum(map(torch.cuda.memory_allocated, gpus)) - before,
            "gpu_taken": free_before
            - sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus),  # by other allocators than torch's too
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
    for gpu in range(torch.cuda.device_count()):
        torch.zeros(1, device=f"cuda:{gpu}")
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

        device = 0 if torch.cuda.is_available() else "cpu"
        pyint8.load(folder, device_map={"": device}, dtype="float16", progress=False)
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
