"""pyint8 beside every other loader, and beside what the hardware gives.

python -m benchmarks                                  # everything this machine can run
python -m benchmarks --smoke                          # a minute, on any machine: that it runs
python -m benchmarks --checkpoint llama-8b --contender pyint8 --contender transformers-int8 --runs 3
python -m benchmarks --checkpoint llama-8b --contender pyint8 --cache cold --cpus 2 --cpus 4
python -m benchmarks chart out.json out.svg           # the chart of a run
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, machine, page_cache, suite
from benchmarks.checkpoints import NAMES, make
from benchmarks.contenders import CONTENDERS, ON_GPU, shards

_GB = 1e9
_ON_GPU = ("llama-8b", "gpt2-xl", "llama-8b-int8", "qwen3-moe", "llama-70b-layers")
_ON_CPU = ("llama-1b", "gpt2-xl")
_ONLY_COLD = ("pyint8-direct", "read-buffered", "read-direct")  # hot, they read the page cache as others do
_FEW_CPUS = ("pyint8", "raw-engine", "read-buffered")  # and beside them with all CPUs
_COLD = ("pyint8", *_ONLY_COLD, "transformers-int8", "safetensors", "instanttensor")
_OURS = ("pyint8", "pyint8-direct", "raw-engine", "imports")
_MEASURES = ("transformers-int8", "free-lifecycle", "safetensors-prefetch-int8", "read-buffered", "read-direct")
_SPREAD = ("pyint8", "raw-engine", "transformers-int8")
_START = ("imports", "pyint8")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", action="append", choices=NAMES, help="default: what fits the machine")
    parser.add_argument("--contender", action="append", choices=sorted(CONTENDERS), help="default: all")
    parser.add_argument("--cache", action="append", choices=("hot", "half", "cold"), help="default: hot")
    parser.add_argument(
        "--cpus", action="append", type=int, help="also with so many CPUs, for pyint8 and a plain reader"
    )
    parser.add_argument("--gpus", action="append", type=int, help="also spread over so many GPUs; default: one alone")
    parser.add_argument("--start", action="store_true", help="also from process start to model ready")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pyint8-benchmarks"), help="for the checkpoints")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-runs", type=int, help="for those that pyint8 is not measured by; default: as many")
    parser.add_argument("--loads", type=int, default=2, help="loads in each process; all but the first are 'later'")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--smoke", action="store_true", help="the smallest checkpoint, one run, all it can do")
    parsed = parser.parse_args(arguments)
    if parsed.smoke:
        parsed.checkpoint, parsed.runs, parsed.loads, parsed.start = ["llama-tiny", "llama-tiny-int8"], 1, 2, True
        parsed.cache, parsed.cpus = ["hot"], [1]
    elif not arguments:
        parsed.cache, parsed.start = ["hot", "half", "cold"], True
    parsed.checkpoint = parsed.checkpoint or list(_ON_GPU if ON_GPU else _ON_CPU)
    parsed.contender = parsed.contender or list(CONTENDERS)
    parsed.cache = parsed.cache or ["hot"]
    return parsed


def cases(parsed: argparse.Namespace) -> list[suite.Case]:
    """The lines of the table that were asked for; not every contender is worth waiting for a cold disk."""
    beside_few = _FEW_CPUS if parsed.cpus else ()
    hot = [name for name in parsed.contender if name not in _ONLY_COLD or name in beside_few]
    chosen = [suite.Case(name) for name in hot if "hot" in parsed.cache]
    for cache in [cache for cache in ("half", "cold") if cache in parsed.cache]:
        chosen += [suite.Case(name, cache=cache) for name in parsed.contender if name in _COLD]
    for cpus in parsed.cpus or []:
        chosen += [suite.Case(name, cpus=cpus) for name in _FEW_CPUS if name in parsed.contender]
    for gpus in parsed.gpus or []:
        chosen += [suite.Case(name, gpus=gpus) for name in _SPREAD if name in parsed.contender]
    if parsed.start:
        chosen += [suite.Case(name, mode="start") for name in _START]
        chosen += [suite.Case("pyint8", mode="start", cache="cold")] if "cold" in parsed.cache else []
    return chosen


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        "machine": machine.describe(parsed.folder),
        "arguments": _arguments(parsed),
        "checkpoints": {},
    }
    for name in parsed.checkpoint:
        folder = make(name, parsed.folder / f"{name}-{parsed.dtype}", getattr(torch, parsed.dtype))
        files = shards(folder)
        nbytes = sum(path.stat().st_size for path in files)
        page_cache.prepare(files, "hot")
        if "ceilings" not in results:
            results["ceilings"] = ceilings.measure(files, cold="cold" in parsed.cache, few_cpus=parsed.cpus or ())
            for what, rate in results["ceilings"].items():
                print(f"{what:<44}{f'{rate:.1f} GB/s' if rate else 'not to be had here':>20}")
        ceiling = results["ceilings"]["pinned host to GPU"] or results["ceilings"]["memory copy"]
        entry = {"bytes": nbytes, "dtype": parsed.dtype, "tensors": _tensors(files)}
        results["checkpoints"][name] = entry

        def save(
            records: suite.Records, entry: dict[str, Any] = entry, nbytes: int = nbytes, ceiling: float | None = ceiling
        ) -> None:
            entry["results"] = suite.record(records, nbytes, ceiling)
            if parsed.json:  # after each, so that what was measured is not lost
                parsed.json.write_text(json.dumps(results, indent=1) + "\n")

        suite.run_cases(cases(parsed), folder, partial(_runs, parsed), parsed.loads, save)
        lines = entry["results"]
        print(f"\n{name}, {nbytes / _GB:.2f} GB {parsed.dtype}, {entry['tensors']} tensors\n{suite.table(lines)}\n")
    return results


def _arguments(parsed: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(parsed).items() if not isinstance(value, Path)}


def _runs(parsed: argparse.Namespace, case: suite.Case) -> int:
    """pyint8's own, and what it is measured by, run more often than the other peers."""
    is_peer = case.contender not in (*_OURS, *_MEASURES)
    return int(parsed.peer_runs if is_peer and parsed.peer_runs else parsed.runs)


def _tensors(files: list[Path]) -> int:
    count = 0
    for path in files:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        count += len(header) - ("__metadata__" in header)
    return count


def main() -> None:
    if sys.argv[1:2] == ["chart"]:
        from benchmarks import chart

        chart.main(sys.argv[2:])
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    results = run(parse(sys.argv[1:]))
    lines = [line for entry in results["checkpoints"].values() for line in entry["results"]]
    if any(not ({"failed", "first_seconds"} & line["summary"].keys()) for line in lines):
        raise SystemExit("the results have a line that neither failed nor was measured")
    ours = [line for line in lines if line["contender"] in ("pyint8", "raw-engine")]
    if any("failed" in line["summary"] for line in ours):
        raise SystemExit("pyint8 itself failed; see above")


if __name__ == "__main__":
    main()
