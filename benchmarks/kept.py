"""What it costs to keep the int8 form, and what it gives: by turns, in one process.

python -m benchmarks.kept                                     # the 8B on a GPU
python -m benchmarks.kept --checkpoint llama-8b --json out.json
python -m benchmarks.kept --cold 4 --json out.json            # and cold loads of both forms, which takes a while
python -m benchmarks.kept --smoke                             # a small model, on the CPU: that it runs

Later loads of the 16-bit checkpoint, plain, with a timeline and with a cache to fill; `convert`; later loads of what it
wrote; `reload` of the 16-bit checkpoint into a model. All hot but for cold loads, beside the bus. The cache is filled
behind a load, by a thread whose time is given for itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, machine, page_cache
from benchmarks.checkpoints import NAMES, make
from benchmarks.contenders import DEVICE, ON_GPU, shards

_GB = 1e9


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kept", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", choices=NAMES, default="llama-8b" if ON_GPU else "llama-1b")
    parser.add_argument("--runs", type=int, default=5, help="of each; default 5")
    parser.add_argument("--fills", type=int, default=2, help="of the cache; default 2")
    parser.add_argument("--cold", type=int, default=0, help="cold loads of both forms, by turns; default none")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pyint8-benchmarks"), help="for the checkpoints")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--smoke", action="store_true", help="that it runs")
    parsed = parser.parse_args(arguments)
    if parsed.smoke:
        parsed.checkpoint, parsed.runs, parsed.fills = "llama-small", 2, 1
    return parsed


def timed(work: Callable[[], Any]) -> float:
    """Seconds of it, until the device is done; what it returns is let go of."""
    gc.collect()
    start = time.perf_counter()
    kept = work()
    if ON_GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def load(folder: Path, cache: Any = False, **options: Any) -> Any:
    import pyint8

    return pyint8.load(folder, DEVICE, progress=False, options=pyint8.StreamOptions(**options), cache=cache)


def fill_behind() -> None:
    for thread in threading.enumerate():
        if thread.name == "pyint8 cache":
            thread.join()


def reloads(source: Path, runs: int) -> list[float]:
    import pyint8

    model = load(source)
    return [timed(lambda: pyint8.reload(model, source, progress=False)) for _ in range(runs)]


def measure(parsed: argparse.Namespace) -> dict[str, Any]:
    import pyint8

    source = make(parsed.checkpoint, parsed.folder / parsed.checkpoint)
    target, cache = (parsed.folder / f"{parsed.checkpoint}-{what}" for what in ("kept", "cache"))
    page_cache.prepare(shards(source), "hot")
    seconds: dict[str, list[float]] = {"first load": [timed(lambda: load(source))]}
    for _ in range(parsed.runs):
        for what, options in (("later load", {}), ("with a timeline", {"timeline": True})):
            seconds.setdefault(what, []).append(timed(lambda options=options: load(source, **options)))
    shutil.rmtree(target, ignore_errors=True)
    seconds["convert"] = [timed(lambda: pyint8.convert(source, target, device=DEVICE, progress=False))]
    page_cache.prepare(shards(target), "hot")
    seconds["load of the int8 form"] = [timed(lambda: load(target)) for _ in range(parsed.runs)]
    seconds["reload"] = reloads(source, parsed.runs)
    for _ in range(parsed.fills):
        shutil.rmtree(cache, ignore_errors=True)
        seconds.setdefault("load with a cache to fill", []).append(timed(lambda: load(source, cache)))
        seconds.setdefault("the cache filled behind it", []).append(timed(fill_behind))
    forms = {"16 bit": source, "int8": target}
    for number in range(parsed.cold):
        for what in sorted(forms, reverse=bool(number % 2)):  # a disk gives more or less from one minute to the next
            page_cache.prepare(shards(forms[what]), "cold")
            seconds.setdefault(f"cold, {what}", []).append(timed(lambda what=what: load(forms[what])))
    nbytes = {what: sum(path.stat().st_size for path in shards(folder)) for what, folder in forms.items()}
    for folder in (target, cache):
        shutil.rmtree(folder, ignore_errors=True)
    bus = ceilings.host_to_gpu(pinned=True)
    return {
        "machine": machine.describe(parsed.folder),
        "checkpoint": parsed.checkpoint,
        "bytes": nbytes,
        "bus_gb_per_second": bus,
        "bus_seconds": {what: each / _GB / bus for what, each in nbytes.items()} if bus else None,
        "seconds": seconds,
        "medians": {what: statistics.median(values) for what, values in seconds.items()},
    }


def main() -> int:
    parsed = parse(sys.argv[1:])
    results = measure(parsed)
    if parsed.json:
        parsed.json.write_text(json.dumps(results, indent=1) + "\n")
    for what, seconds in (results["bus_seconds"] or {}).items():
        print(f"{f'the bus, {what}':<28}{seconds:8.3f} s")
    for what, seconds in results["medians"].items():
        print(f"{what:<28}{seconds:8.3f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
