"""One model on every rank: read by one alone, by each for itself, and by all together.

python -m benchmarks.ranks                                          # all GPUs of this host, one a rank
python -m benchmarks.ranks --ranks 2 --checkpoint llama-8b --json out.json
python -m benchmarks.ranks --smoke                                  # two ranks on the CPU, over gloo, a small model

On hosts of your own, or several: torchrun ... -m benchmarks.ranks --child ... (see --help). The ways take turns; a load
begins on all ranks at once, and its time is that of the last.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import machine
from benchmarks.checkpoints import NAMES, make

# "alone": rank 0, while the others wait.
WAYS = ("alone", "each", "together")
# What the later loads of `together` should take at most, of those of the other ways, where NVLink joins two GPUs.
GOALS = {"alone": 0.85, "each": 0.65}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", choices=NAMES, default="llama-8b")
    parser.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--runs", type=int, default=5, help="later loads of each way; default 5")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pyint8-benchmarks"), help="for the checkpoints")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--smoke", action="store_true", help="that it runs")
    parser.add_argument("--child", action="store_true", help="this process is a rank that torchrun started")
    parsed = parser.parse_args(arguments)
    if parsed.smoke:
        parsed.checkpoint, parsed.ranks, parsed.runs = "llama-small", 2, 2
    return parsed


def launch(arguments: argparse.Namespace) -> int:
    """Makes the checkpoint, and starts the ranks."""
    make(arguments.checkpoint, arguments.folder / arguments.checkpoint)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
    return subprocess.call([*command, "-m", "benchmarks.ranks", "--child", *sys.argv[1:]])


class Rank:
    """This process, among the others.

    Args:
        arguments: Those of the program.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        from pyint8.host.processes import processes

        self.on_gpu = torch.cuda.is_available() and not arguments.smoke
        self.device = torch.device("cuda", processes().local_rank) if self.on_gpu else torch.device("cpu")
        if self.on_gpu:
            torch.cuda.set_device(self.device)
            dist.init_process_group("nccl", device_id=self.device)
        else:
            dist.init_process_group("gloo")
        self.folder = make(arguments.checkpoint, arguments.folder / arguments.checkpoint)
        self.number = dist.get_rank()

    def slowest(self, seconds: float) -> float:
        """Of all ranks; also where they wait for each other."""
        value = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value.item())

    def time(self, way: str) -> dict[str, Any]:
        """One load by all ranks, or by rank 0."""
        import pyint8

        gc.collect()
        self.slowest(0)
        began = time.perf_counter()
        report: dict[str, Any] = {}
        if way != "alone" or self.number == 0:
            group = dist.group.WORLD if way == "together" else None
            _, found = pyint8.load(self.folder, self.device, process_group=group, progress=False, return_report=True)
            self.synchronize()
            report = found.to_dict()
        seconds = self.slowest(time.perf_counter() - began if report else 0.0)
        return {"seconds": seconds, "report of rank 0": report}

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The first load of each way, and the later ones; the ways take turns."""
    rank = Rank(arguments)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(1 + arguments.runs):
        for way in WAYS:
            runs[way].append(rank.time(way))
    later = {way: statistics.median(run["seconds"] for run in runs[way][1:]) for way in WAYS}
    ratios = {way: later["together"] / later[way] for way in GOALS}
    return {
        "checkpoint": arguments.checkpoint,
        "ranks": dist.get_world_size(),
        "machine": machine.describe(arguments.folder),
        "later_seconds": later,
        "together_to": ratios,
        "reaches_goals": {way: ratios[way] <= goal for way, goal in GOALS.items()},
        "runs": runs,
    }


def main() -> int:
    arguments = parse(sys.argv[1:])
    if not arguments.child:
        return launch(arguments)
    results = measure(arguments)
    if dist.get_rank() == 0:
        shown = {key: results[key] for key in ("checkpoint", "ranks", "later_seconds", "together_to", "reaches_goals")}
        print(json.dumps(shown, indent=1))
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
