"""One GPU fed over its own bus, and over other GPUs' buses too (`StreamOptions.borrow_gpus`).

python -m benchmarks.borrow --checkpoint llama-8b --json out.json      # GPU 0, borrowing all the others
python -m benchmarks.borrow --borrow 1 2

The ways take turns: loads, each of which opens and gives back what it borrows, and the engine alone, every tensor
through it into scratch memory, once all roads are open. At first this process has nothing on the borrowed GPUs, so that
a context is made there, and ended, by each load; then it has, as a program that uses these GPUs, too.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, machine, page_cache
from benchmarks.checkpoints import NAMES, make
from benchmarks.contenders import shards
from pyint8 import StreamOptions
from pyint8.checkpoint import open_checkpoint
from pyint8.streaming.requests import TensorRequest
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import Transport

DEVICE = torch.device("cuda", 0)
# Of one bus: at least so many times its rate, and so much of a later load's time.
GOALS = {"stream": 1.4, "later load": 0.85}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.borrow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", choices=NAMES, default="llama-8b")
    parser.add_argument("--borrow", type=int, nargs="+", help="numbers of GPUs; all but the first by default")
    parser.add_argument("--runs", type=int, default=5, help="later loads of each way; default 5")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pyint8-benchmarks"), help="for the checkpoints")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def load(folder: Path, options: StreamOptions) -> dict[str, Any]:
    import pyint8

    gc.collect()
    begin = time.perf_counter()
    _, report = pyint8.load(folder, DEVICE, options=options, progress=False, return_report=True)
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - begin, "report": report.to_dict()}


def stream(folder: Path, options: StreamOptions) -> float:
    """GB/s of the engine."""
    checkpoint = open_checkpoint(str(folder))
    requests = [TensorRequest(entry, DEVICE, in_bands=True) for entry in checkpoint.values()]
    transport = Transport(options)
    transport.lane(DEVICE)
    for detours in transport._detours:
        detours.join()
    begin = time.perf_counter()
    tensors = TensorStream(requests, transport)
    try:
        for request in requests:
            for _ in tensors.bands(request.entry.name):
                pass
        torch.cuda.synchronize()
        return sum(entry.nbytes for entry in checkpoint.values()) / (time.perf_counter() - begin) / 1e9
    finally:
        transport.close()
        tensors.close()


def measure(folder: Path, borrowed: tuple[int, ...], runs: int) -> dict[str, Any]:
    """Both ways by turns."""
    ways = {"own bus": StreamOptions(), "borrowed": StreamOptions(borrow_gpus=borrowed)}
    loads: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(1 + runs):
        for way, options in ways.items():
            loads[way].append(load(folder, options))
            rates[way].append(stream(folder, options))
    later = {way: statistics.median(run["seconds"] for run in of_way[1:]) for way, of_way in loads.items()}
    fastest = {way: max(of_way) for way, of_way in rates.items()}
    return {
        "later_seconds": later,
        "stream_gigabytes_per_second": fastest,
        "borrowed_to_own": {
            "stream": fastest["borrowed"] / fastest["own bus"],
            "later load": later["borrowed"] / later["own bus"],
        },
        "loads": loads,
        "streams": rates,
    }


def main() -> None:
    arguments = parse()
    folder = make(arguments.checkpoint, arguments.folder / arguments.checkpoint)
    borrowed = tuple(arguments.borrow or range(1, torch.cuda.device_count()))
    page_cache.prepare(shards(folder), "hot")
    results: dict[str, Any] = {"checkpoint": arguments.checkpoint, "borrowed": borrowed}
    results["nothing on the others"] = measure(folder, borrowed, arguments.runs)
    for gpu in borrowed:
        torch.zeros(1, device=torch.device("cuda", gpu))
    found = results["contexts on the others"] = measure(folder, borrowed, arguments.runs)
    results["bare_ring_gigabytes_per_second"] = {
        gpus: ceilings.bare_ring(shards(folder), gpus) for gpus in (1, 1 + len(borrowed))
    }
    ratios = found["borrowed_to_own"]
    results["reaches_goals"] = {
        "stream": ratios["stream"] >= GOALS["stream"],
        "later load": ratios["later load"] <= GOALS["later load"],
    }
    print(json.dumps(_short(results), indent=1))
    if arguments.json:
        results["machine"] = machine.describe(arguments.folder)
        arguments.json.write_text(json.dumps(results, indent=1))


def _short(results: Any) -> Any:
    """Without single runs."""
    if not isinstance(results, dict):
        return results
    return {key: _short(value) for key, value in results.items() if key not in ("loads", "streams")}


if __name__ == "__main__":
    main()
