"""One way to load, timed in a process of its own: `python -m benchmarks.contender NAME FOLDER` prints a line of JSON.

Imports and the CUDA context come before the clock starts; `loads` loads follow each other in the process, so the
second one shows what a warm process takes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_GPU = torch.cuda.is_available()
_DEVICE: Any = 0 if _GPU else "cpu"


def _pyint8(folder: str) -> Any:
    import pyint8

    model, report = pyint8.load(folder, device_map={"": _DEVICE}, dtype=torch.float16, return_report=True)
    return model, {"report": str(report), "stream_seconds": report.seconds["stream"], "engine": report.engine}


def _transformers(folder: str) -> Any:
    import transformers

    quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": _DEVICE}, dtype=torch.float16, quantization_config=quantization
    )
    return model, {}


CONTENDERS: dict[str, Callable[[str], Any]] = {"pyint8": _pyint8, "transformers-int8": _transformers}


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


class _HostMemory:
    """Peak growth of anonymous and of locked-by-driver memory, sampled: a page cache that is mapped does not count."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._base = _status_bytes("RssAnon")
        self.peak = 0

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, _status_bytes("RssAnon") - self._base)

    @contextmanager
    def watched(self) -> Any:
        thread = threading.Thread(target=self._sample)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


def _one_load(load: Callable[[str], Any], folder: str) -> dict[str, Any]:
    if _GPU:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() if _GPU else 0
    host = _HostMemory()
    with host.watched():
        start = time.perf_counter()
        model, details = load(folder)
        if _GPU:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    result = {"seconds": seconds, "host_anonymous_peak": host.peak, **details}
    if _GPU:
        result |= {
            "gpu_peak_allocated": torch.cuda.max_memory_allocated() - before,
            "gpu_peak_reserved": torch.cuda.max_memory_reserved(),
            "gpu_final": torch.cuda.memory_allocated() - before,
        }
    del model
    gc.collect()
    if _GPU:
        torch.cuda.empty_cache()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(CONTENDERS))
    parser.add_argument("folder")
    parser.add_argument("--loads", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    start = time.perf_counter()
    import bitsandbytes  # noqa: F401
    import transformers

    if arguments.name == "pyint8":
        import pyint8.models.transformers  # noqa: F401
    config = transformers.AutoConfig.from_pretrained(arguments.folder)
    getattr(transformers, config.architectures[0])  # transformers imports a model's code when it is named
    if _GPU:
        torch.zeros(1, device="cuda")
    imports = time.perf_counter() - start
    loads = [_one_load(CONTENDERS[arguments.name], arguments.folder) for _ in range(arguments.loads)]
    print(json.dumps({"contender": arguments.name, "import_seconds": imports, "loads": loads}))


if __name__ == "__main__":
    main()
