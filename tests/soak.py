"""Thousands of loads and failures in one process: `make soak [SOAK="--rounds 1000 --device cuda"]`.

Each round loads a transformers model, one that lacks a tensor and a plain module, and fails in four ways: a truncated
shard, NaN, an absent folder, Ctrl-C. After a warm-up, memory, descriptors, threads and objects may not
grow. Ends with a table, and with status 1 if something does.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "support"))

import torch
from safetensors.torch import load_file, save_file
from zoo import ZOO, checkpoint_store

import pyint8
from pyint8 import _core
from pyint8.report.progress import ByteProgress

PAGE = os.sysconf("SC_PAGE_SIZE")
SAMPLES = 40
WARM_UP = 0.4  # of the samples: allocators and caches fill
# Growth for each round that is a leak. Of memory, an arena that fills slowly is none.
MOST: dict[str, float] = {
    "memory, bytes": 4096,
    "descriptors": 0,
    "threads": 0,
    "objects": 0.2,
    "pinned, bytes": 0,
    "GPU, bytes": 0,
}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(64, 48), torch.nn.Linear(48, 8)


def damaged(folder: Path) -> dict[str, Path]:
    """Checkpoints by what is wrong with them."""
    source = checkpoint_store(folder / "sources").folder(ZOO["llama"], "bf16")
    made = {"sound": source}
    for name in ("truncated", "not finite", "incomplete"):
        made[name] = folder / name
        made[name].mkdir()
        (made[name] / "config.json").write_bytes((source / "config.json").read_bytes())
    raw = (source / "model.safetensors").read_bytes()
    (made["truncated"] / "model.safetensors").write_bytes(raw[:-10])
    tensors = load_file(source / "model.safetensors")
    weight = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, weight: tensors[weight] * float("nan")}, made["not finite"] / "model.safetensors")
    save_file(
        {name: each for name, each in tensors.items() if name != weight}, made["incomplete"] / "model.safetensors"
    )
    return made


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """Ctrl-C, when bytes land for the n-th time."""
    advance, left = ByteProgress.advance, itertools.count(after, -1)

    def interrupt(*args: Any) -> None:
        if next(left) == 0:
            raise KeyboardInterrupt
        advance(*args)

    ByteProgress.advance = interrupt  # type: ignore[method-assign]
    try:
        yield
    finally:
        ByteProgress.advance = advance  # type: ignore[method-assign]


def fails(kind: type[BaseException], call: Callable[[], Any]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__} was raised")


def one_round(number: int, folders: dict[str, Path], weights: Path, device: str) -> None:
    pyint8.load(folders["sound"], device)
    pyint8.load(weights, device, model=Net())
    for name in ("truncated", "not finite"):
        fails(pyint8.Pyint8Error, lambda name=name: pyint8.load(folders[name], device))  # type: ignore[misc]
    pyint8.load(folders["incomplete"], device)  # with a warning, as transformers
    fails(pyint8.Pyint8Error, lambda: pyint8.load(weights.parent / "absent", device))
    with interrupted(number % 7):
        fails(KeyboardInterrupt, lambda: pyint8.load(folders["sound"], device))


def measured(device: str) -> dict[str, float]:
    gc.collect()
    found: dict[str, float] = {
        "memory, bytes": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "objects": len(gc.get_objects()),
        "pinned, bytes": _core.pinned_bytes_in_use(),
    }
    if device != "cpu":
        torch.cuda.synchronize()
        found["GPU, bytes"] = torch.cuda.memory_allocated()
    return found


def slope(rounds: list[int], values: list[float]) -> float:
    """Of the line through them with the least squares."""
    middle, level = sum(rounds) / len(rounds), sum(values) / len(values)
    spread = sum((each - middle) ** 2 for each in rounds)
    return sum((at - middle) * (value - level) for at, value in zip(rounds, values, strict=True)) / spread


def soak(rounds: int, device: str) -> list[tuple[int, dict[str, float]]]:
    with tempfile.TemporaryDirectory() as name:
        folders = damaged(Path(name))
        weights = Path(name) / "weights.safetensors"
        save_file(Net().state_dict(), weights)
        samples: list[str] = []  # which the collector does not count
        for number in range(rounds):
            one_round(number, folders, weights, device)
            if (number + 1) % max(1, rounds // SAMPLES) == 0:
                samples.append(json.dumps([number + 1, measured(device)]))
    return [json.loads(sample) for sample in samples]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1500, help="of seven loads each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="where to write the samples")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    start = time.monotonic()
    samples = soak(arguments.rounds, arguments.device)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "samples": samples}, indent=1) + "\n")
    late = samples[int(len(samples) * WARM_UP) :]
    grows = []
    for what in late[0][1]:
        growth = slope([at for at, _ in late], [values[what] for _, values in late])
        print(f"{what:16} {late[0][1][what]:14.0f} {late[-1][1][what]:14.0f}   {growth:+10.3f} a round")
        if growth > MOST[what]:
            grows.append(what)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{7 * arguments.rounds} loads in {time.monotonic() - start:.0f} s, at most {peak} MiB")
    print(f"grows: {', '.join(grows)}" if grows else "nothing grows")
    return 1 if grows else 0


if __name__ == "__main__":
    sys.exit(main())
