"""pyint8 beside transformers on one checkpoint, page cache hot, interleaved runs in fresh processes.

    python -m benchmarks.side_by_side --checkpoint llama-8b --folder /tmp/llama-8b --json out.json

Also measures, in the same run, what the bus gives: pinned host memory to the GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.checkpoints import CONFIGS, make

_NAMES = ("pyint8", "transformers-int8")
_GB = 1e9


def pinned_ceiling(nbytes: int = 1 << 30, repeats: int = 5) -> float | None:
    """GB/s of one pinned copy to the GPU, the best of a few; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8).pin_memory()
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    best = 0.0
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, nbytes / (time.perf_counter() - start) / _GB)
    return best


def warm_page_cache(folder: Path) -> int:
    """Reads every file once; returns the bytes of the shards."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(1 << 24):
                total += len(chunk)
    return total


def run_contender(name: str, folder: Path, loads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.contender", name, str(folder), "--loads", str(loads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return {"contender": name, "failed": done.stderr[-2000:]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def summarize(runs: list[dict[str, Any]], nbytes: int) -> dict[str, Any]:
    good = [run for run in runs if "failed" not in run]
    if not good:
        return {"failed": runs[0]["failed"]}
    first = [run["loads"][0]["seconds"] for run in good]
    later = [load["seconds"] for run in good for load in run["loads"][1:]]
    summary = {
        "first_seconds": _spread(first),
        "later_seconds": _spread(later) if later else None,
        "first_gb_per_second": nbytes / _GB / statistics.median(first),
        "import_seconds": statistics.median(run["import_seconds"] for run in good),
    }
    for key in ("gpu_peak_allocated", "gpu_peak_reserved", "gpu_final", "host_anonymous_peak"):
        values = [run["loads"][0].get(key) for run in good]
        if None not in values:
            summary[key] = max(values)
    return summary


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", choices=sorted(CONFIGS), default="llama-8b")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--loads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    folder = make(arguments.checkpoint, arguments.folder)
    nbytes = warm_page_cache(folder)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in _NAMES}
    for _ in range(arguments.runs):
        for name in _NAMES:
            runs[name].append(run_contender(name, folder, arguments.loads))
    result = {
        "checkpoint": arguments.checkpoint,
        "checkpoint_bytes": nbytes,
        "page_cache": "hot",
        "machine": machine.describe(),
        "pinned_to_gpu_gb_per_second": pinned_ceiling(),
        "summary": {name: summarize(runs[name], nbytes) for name in _NAMES},
        "runs": runs,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    print_table(result)


def print_table(result: dict[str, Any]) -> None:
    ceiling = result["pinned_to_gpu_gb_per_second"]
    print(f"{result['checkpoint']}, {result['checkpoint_bytes'] / _GB:.2f} GB, page cache hot", end="")
    print(f"; pinned host to GPU {ceiling:.1f} GB/s" if ceiling else "")
    print(f"{'':<20}{'first s':>10}{'later s':>10}{'GB/s':>8}{'GPU peak-final MB':>20}{'host anon MB':>14}")
    for name, summary in result["summary"].items():
        if "failed" in summary:
            print(f"{name:<20} failed: {summary['failed'][-300:]}")
            continue
        later = summary["later_seconds"]
        extra = (summary.get("gpu_peak_allocated", 0) - summary.get("gpu_final", 0)) / 1e6
        print(
            f"{name:<20}{summary['first_seconds']['median']:>10.3f}"
            f"{later['median'] if later else float('nan'):>10.3f}{summary['first_gb_per_second']:>8.2f}"
            f"{extra:>20.0f}{summary['host_anonymous_peak'] / 1e6:>14.0f}"
        )


if __name__ == "__main__":
    main()
