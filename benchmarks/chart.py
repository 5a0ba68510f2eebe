"""The chart of a run: `python -m benchmarks chart RESULTS.json CHART.svg [--checkpoint NAME]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS

_OURS, _PEER = "#1b7837", "#9aa5b1"


def draw(results: dict[str, Any], checkpoint: str, path: Path) -> None:
    """Throughput of each contender with the ceiling as a line, and its memory beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entry = results["checkpoints"][checkpoint]
    good = [
        line
        for line in entry["results"]
        if "failed" not in line["summary"]
        and (line["cache"], line["mode"], line["cpus"], line.get("gpus", 1)) == ("hot", "loads", None, 1)
        and line["contender"] != "free-lifecycle"  # moves no bytes
    ]
    good.sort(key=lambda line: line["summary"]["first_gb_per_second"])
    names = [f"{line['contender']} ({CONTENDERS[line['contender']].gives})" for line in good]
    colors = [_OURS if line["contender"] in ("pyint8", "raw-engine") else _PEER for line in good]
    rates = [line["summary"]["first_gb_per_second"] for line in good]
    gpu = "gpu_final" in str(good[-1]["summary"])
    fields = ("first_gpu_peak_allocated", "first_gpu_taken") if gpu else ("first_host_resident_peak",)
    memory = [max(line["summary"].get(field, 0) for field in fields) / 1e9 for line in good]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.45 * len(good) + 1.6), sharey=True)
    left.barh(names, rates, color=colors)
    left.bar_label(left.containers[0], fmt="%.1f", padding=3)
    ceilings = results["ceilings"]
    which = "pinned host to GPU" if ceilings["pinned host to GPU"] else "memory copy"
    left.axvline(ceilings[which], color="black", linestyle="--", linewidth=1)
    left.set_title(f"GB/s of checkpoint, first load (line: {which}, {ceilings[which]:.1f})", fontsize=9)
    right.barh(names, memory, color=colors)
    right.bar_label(right.containers[0], fmt="%.1f", padding=3)
    right.set_title("peak GPU memory, GB" if gpu else "peak resident memory above the start, GB", fontsize=9)
    for axes in (left, right):
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    where = (results["machine"]["gpus"] or [results["machine"]["cpu"]])[0].split(",")[0]
    figure.suptitle(
        f"{checkpoint}, {entry['bytes'] / 1e9:.1f} GB {entry['dtype']}, page cache hot, {where}", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks chart", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("chart", type=Path)
    parser.add_argument("--checkpoint", help="default: the first of the run")
    parsed = parser.parse_args(arguments)
    results = json.loads(parsed.results.read_text())
    draw(results, parsed.checkpoint or next(iter(results["checkpoints"])), parsed.chart)
