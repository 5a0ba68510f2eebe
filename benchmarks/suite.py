"""Runs contenders on one checkpoint, interleaved, each in a fresh process, and sums up what they took."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, page_cache
from benchmarks.contenders import CONTENDERS, ON_GPU, shards

_GB = 1e9
_MEMORY = (
    "gpu_peak_allocated",
    "gpu_peak_reserved",
    "gpu_final",
    "gpu_taken",
    "host_anonymous_peak",
    "host_shared_peak",
    "host_resident_peak",
    "host_pinned_peak",
)
_PROCESS_SECONDS = 600  # a contender that takes longer has failed


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        contender: Its name, or "imports" with `mode` "start".
        cache: "hot", "half" or "cold".
        mode: "loads" or "start" (see `benchmarks.process`).
        cpus: Allow the process so many CPUs; None for all.
        gpus: How many GPUs it sees; with several, a model is spread over them ("balanced").
    """

    contender: str
    cache: str = "hot"
    mode: str = "loads"
    cpus: int | None = None
    gpus: int = 1

    def __str__(self) -> str:
        notes = [self.cache] if self.cache != "hot" else []
        notes += [f"{self.cpus} CPUs"] if self.cpus else []
        notes += [f"{self.gpus} GPUs"] if self.gpus > 1 else []
        notes += ["process start to ready"] if self.mode == "start" else []
        return f"{self.contender} ({', '.join(notes)})" if notes else self.contender


def run_case(case: Case, folder: Path, loads: int) -> dict[str, Any]:
    """One process. A failure is a record too: {"failed": why}."""
    contender = CONTENDERS.get(case.contender)
    if contender is not None and contender.needs_gpu and not ON_GPU:
        return {"failed": "needs a GPU"}
    if case.gpus > max(1, torch.cuda.device_count()):
        return {"failed": f"there are {torch.cuda.device_count()} GPUs"}
    record: dict[str, Any] = {"residency_before": page_cache.prepare(shards(folder), case.cache)}
    command = [sys.executable, "-m", "benchmarks.process", case.contender, str(folder), "--mode", case.mode]
    command += ["--loads", str(loads if case.cache == "hot" else 1)]
    if case.cpus:
        cpus = ",".join(map(str, machine.first_cpus(case.cpus)))
        command = ["taskset", "--cpu-list", cpus, *command]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROCESS_SECONDS, env=_environment(case.gpus)
        )
    except subprocess.TimeoutExpired:
        return {**record, "failed": f"took more than {_PROCESS_SECONDS} s"}
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        stderr = done.stderr.replace(f"{Path(__file__).parents[1]}/", "")
        return {**record, "failed": reason[0][:500], "stderr": stderr[-2000:]}
    record |= json.loads(done.stdout.strip().splitlines()[-1])
    if case.mode == "start":
        record["loads"] = [{"seconds": record.pop("ready_at") - started}]
    return record


def _environment(gpus: int) -> dict[str, str]:
    """Shows the first so many of the GPUs that are visible here."""
    numbers = ",".join(map(str, range(torch.cuda.device_count())))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", numbers).split(",")[:gpus]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(visible)}


Records = dict[Case, list[dict[str, Any]]]


def run_cases(
    cases: list[Case], folder: Path, runs: Callable[[Case], int], loads: int, save: Callable[[Records], None]
) -> Records:
    """All cases in turn, so that a machine's moods meet all of them. A failure is not repeated.

    Args:
        cases: What to run.
        folder: Of the checkpoint.
        runs: How many processes for a case.
        loads: How many loads in a process.
        save: Called after each, with what there is so far.
    """
    records: Records = {}
    for number in range(max(map(runs, cases))):
        for case in cases:
            if number >= runs(case) or any("failed" in record for record in records.get(case, [])):
                continue
            print(f"{folder.name}, run {number + 1} of {runs(case)}: {case}", file=sys.stderr, flush=True)
            records.setdefault(case, []).append(run_case(case, folder, loads))
            save(records)
    return records


def summarize(records: list[dict[str, Any]], nbytes: int, ceiling: float | None) -> dict[str, Any]:
    """Medians and spreads of the first and of later loads, GB/s, its ratio to the ceiling, and memory peaks.

    Args:
        records: Of one case.
        nbytes: Of the checkpoint.
        ceiling: GB/s of pinned memory to the GPU, or of memory to memory without one.
    """
    good = [record for record in records if "failed" not in record]
    if not good:
        return {"failed": records[0]["failed"]}
    loads = [record["loads"] for record in good]
    first = [load[0]["seconds"] for load in loads]
    later = [load["seconds"] for each in loads for load in each[1:]]
    rate = nbytes / _GB / statistics.median(first)
    summary: dict[str, Any] = {
        "first_seconds": _spread(first),
        "later_seconds": _spread(later) if later else None,
        "first_gb_per_second": rate,
        "later_gb_per_second": nbytes / _GB / statistics.median(later) if later else None,
        "first_ratio_to_ceiling": rate / ceiling if ceiling else None,
    }
    if any(imports := [record["import_seconds"] for record in good if "import_seconds" in record]):
        summary["import_seconds"] = statistics.median(imports)
    for when, number in (("first", 0), ("later", 1)):
        for field in _MEMORY:
            values = [load[number][field] for load in loads if len(load) > number and field in load[number]]
            if values:
                summary[f"{when}_{field}"] = max(values)
    return summary


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def record(cases: Records, nbytes: int, ceiling: float | None) -> list[dict[str, Any]]:
    """What goes into the JSON: for each case its fields, its summary and every run."""
    return [
        {"case": str(case), **case.__dict__, "summary": summarize(records, nbytes, ceiling), "runs": records}
        for case, records in cases.items()
    ]


def table(results: list[dict[str, Any]]) -> str:
    """The summaries, a line each; memory in MB, of the first load."""
    columns = {"first s": 9, "later s": 9, "GB/s": 8, "of bus": 8, "GPU extra": 11, "host anon": 11, "resident": 10}
    lines = [" " * 44 + "".join(f"{name:>{width}}" for name, width in columns.items())]
    for result in results:
        summary = result["summary"]
        if "failed" in summary:
            lines.append(f"{result['case']:<44} failed: {summary['failed'][:90]}")
            continue
        later, ratio = summary["later_seconds"], summary["first_ratio_to_ceiling"]
        extra = summary.get("first_gpu_peak_allocated", 0) - summary.get("first_gpu_final", 0)
        lines.append(
            f"{result['case']:<44}{summary['first_seconds']['median']:>9.3f}"
            + (f"{later['median']:>9.3f}" if later else f"{'':>9}")
            + f"{summary['first_gb_per_second']:>8.2f}"
            + (f"{ratio:>8.2f}" if ratio else f"{'':>8}")
            + f"{extra / 1e6:>11.0f}{summary.get('first_host_anonymous_peak', 0) / 1e6:>11.0f}"
            + f"{summary.get('first_host_resident_peak', 0) / 1e6:>10.0f}"
        )
    return "\n".join(lines)
