"""Converting a checkpoint, beside loading and saving it, and beside reading its bytes and writing the result's.

python -m benchmarks.convert                                   # what fits the machine
python -m benchmarks.convert --checkpoint llama-8b --runs 2 --json out.json

Each is a process of its own; writing ends when the bytes are on the disk, for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, page_cache
from benchmarks.ceilings import read_by_threads
from benchmarks.checkpoints import NAMES, make
from benchmarks.process import HostMemory

_GB = 1e9
_PIECE = 16 << 20
_WAYS = ("convert", "load and save")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--checkpoint", choices=NAMES, default="llama-8b" if on_gpu else "llama-1b")
    parser.add_argument("--device", help="default: all GPUs, or the CPU")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pyint8-benchmarks"), help="for the checkpoints")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--way", action="append", choices=_WAYS, help="default: both")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--child", choices=_WAYS, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    parsed.way = parsed.way or list(_WAYS)
    return parsed


def convert(source: Path, target: Path, device: str | None) -> None:
    import pyint8

    pyint8.convert(source, target, device=device, progress=False)


def load_and_save(source: Path, target: Path, device: str | None) -> None:
    import pyint8

    model: Any = pyint8.load(source, device or "auto", progress=False)
    pyint8.save(model, target)


def in_this_process(
    way: Callable[[Path, Path, str | None], None], source: Path, target: Path, device: str | None
) -> None:
    """Imports first; prints a line of JSON."""
    import pyint8.models.transformers.loading  # noqa: F401

    for gpu in range(torch.cuda.device_count()):
        torch.zeros(1, device=f"cuda:{gpu}")
    host = HostMemory()
    with host.watched():
        start = time.perf_counter()
        way(source, target, device)
        seconds = time.perf_counter() - start
    peaks = [torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count())]
    print(json.dumps({"seconds": seconds, **host.record(), "gpu_peak_allocated": max(peaks, default=0)}))


def in_another(parsed: argparse.Namespace, way: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.convert", "--child", way, "--checkpoint", parsed.checkpoint]
    command += ["--folder", str(parsed.folder)] + (["--device", parsed.device] if parsed.device else [])
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    record: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return record


def write_plainly(folder: Path, nbytes: int) -> float:
    """Seconds to write so many bytes to one file, by one thread, until they are on the disk."""
    piece, path = os.urandom(_PIECE), folder / "plain"
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(max(1, nbytes // _PIECE)):
            file.write(piece)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parsed = parse(sys.argv[1:])
    source, target = parsed.folder / parsed.checkpoint, parsed.folder / f"{parsed.checkpoint}-converted"
    ways = {"convert": convert, "load and save": load_and_save}
    if parsed.child:
        in_this_process(ways[parsed.child], source, target, parsed.device)
        return
    make(parsed.checkpoint, source)
    files = sorted(source.glob("*.safetensors"))
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in parsed.way}
    plain: list[dict[str, float]] = []
    for _ in range(parsed.runs):
        for way in parsed.way:
            page_cache.fill(files)
            shutil.rmtree(target, ignore_errors=True)
            runs[way].append({**in_another(parsed, way), "nbytes": size(target)})
        rate = read_by_threads(files, len(os.sched_getaffinity(0)))
        nbytes = size(target)
        plain.append({"read": size(source) / _GB / rate, "write": write_plainly(parsed.folder, nbytes)})
    shutil.rmtree(target, ignore_errors=True)
    result = {
        "machine": machine.describe(parsed.folder),
        "checkpoint": {"name": parsed.checkpoint, "nbytes": size(source)},
        "device": parsed.device,
        "ways": runs,
        "plain": plain,
    }
    if parsed.json:
        parsed.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['checkpoint']['name']}: {result['checkpoint']['nbytes'] / _GB:.2f} GB"]
    for way, records in result["ways"].items():
        best = min(records, key=lambda record: record["seconds"])
        host = best["host_anonymous_peak"] + best["host_shared_peak"]
        lines.append(
            f"{way:14} {best['seconds']:7.2f} s, {best['nbytes'] / _GB:.2f} GB written, "
            f"host +{host / _GB:.2f} GB, GPU {best['gpu_peak_allocated'] / _GB:.2f} GB"
        )
    plain = {what: min(run[what] for run in result["plain"]) for what in ("read", "write")}
    lines += [f"{what + ' plainly':14} {seconds:7.2f} s" for what, seconds in plain.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
