"""The chart of a run: `python -m benchmarks chart RESULTS.json CHART.svg [--checkpoint NAME] [--several-gpus]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contenders import CONTENDERS

_OURS, _PEER = "#1b7837", "#9aa5b1"


def draw(results: dict[str, Any], checkpoint: str, path: Path) -> None:
    """Throughput of each contender with the ceiling as a line, and its memory beside it."""
    pyplot = _pyplot()
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
    _save(figure, results, checkpoint, path)


def draw_several_gpus(results: dict[str, Any], checkpoint: str, path: Path) -> None:
    """Throughput onto one GPU and more: of later loads, the engine alone, and a bare ring, beside one GPU's bus."""
    pyplot = _pyplot()
    entry, ceilings = results["checkpoints"][checkpoint], results["ceilings"]
    lines = {(line["contender"], line["gpus"]): line for line in entry["results"]}
    counts = sorted({gpus for _, gpus in lines})
    loads = [lines["pyint8", gpus]["summary"]["later_gb_per_second"] for gpus in counts]
    streams = [entry["bytes"] / _later_stream_seconds(lines["raw-engine", gpus]) / 1e9 for gpus in counts]
    rings = [ceilings[f"page cache to GPUs through a bare ring, {gpus}"] for gpus in counts]
    bars = (
        ("a later load by pyint8", loads, _OURS),
        ("pyint8's engine alone", streams, "#7fbf7b"),
        ("a bare ring", rings, _PEER),
    )
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for place, (label, rates, color) in enumerate(bars):
        drawn = axes.bar([at + 0.27 * (place - 1) for at in range(len(counts))], rates, 0.25, label=label, color=color)
        axes.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8)
    bus = ceilings["pinned host to GPU"]
    axes.axhline(bus, color="black", linestyle="--", linewidth=1, label=f"one GPU's bus, {bus:.1f}")
    axes.set_xticks(range(len(counts)), [f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in counts])
    axes.set_ylabel("GB/s of checkpoint, median")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="upper left")
    axes.margins(y=0.25)
    _save(figure, results, checkpoint, path, f", {results['machine']['cores']} CPUs")


def _pyplot() -> Any:
    """matplotlib's, for pictures that go to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, results: dict[str, Any], checkpoint: str, path: Path, more: str = "") -> None:
    """With a title of what was loaded where, and `more`."""
    entry = results["checkpoints"][checkpoint]
    where = (results["machine"]["gpus"] or [results["machine"]["cpu"]])[0].split(",")[0]
    what = f"{checkpoint}, {entry['bytes'] / 1e9:.1f} GB {entry['dtype']}, page cache hot, {where}"
    figure.suptitle(what + more, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _later_stream_seconds(line: dict[str, Any]) -> float:
    """What the engine took without its set-up, the median of all but first loads."""
    return median(load["stream_seconds"] for run in line["runs"] for load in run["loads"][1:])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks chart", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("chart", type=Path)
    parser.add_argument("--checkpoint", help="default: the first of the run")
    parser.add_argument("--several-gpus", action="store_true", help="of a run with --gpus: rates by number of GPUs")
    parsed = parser.parse_args(arguments)
    results = json.loads(parsed.results.read_text())
    picture = draw_several_gpus if parsed.several_gpus else draw
    picture(results, parsed.checkpoint or next(iter(results["checkpoints"])), parsed.chart)
