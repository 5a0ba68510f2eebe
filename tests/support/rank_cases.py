"""What ranks of a process group do in tests, in a module that their processes can import."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from oracle import assert_same, state
from plain_models import ALL, Net
from rank_processes import Outcome, outcome_of
from torch import nn

import pyint8
from pyint8.streaming.ranks import pieces

# Of the sum of a rank's reads: what small tensors and the ends of pieces add to its part.
_MORE = 1.01


@contextmanager
def gathering_small_pieces() -> Iterator[None]:
    with mock.patch.object(pieces, "_LEAST_BYTES", 256):
        yield


def load(folder: Path | str, **kwargs: Any) -> Any:
    return pyint8.load(folder, **({"device_map": "cpu", "process_group": dist.group.WORLD, "progress": False} | kwargs))


def same_as_alone(_: int, folders: list[Path], config: Any = None) -> list[float]:
    """How much of what one rank alone reads each rank reads."""
    shares = []
    with gathering_small_pieces():
        for folder in folders:
            ours, report = load(folder, config=config, return_report=True)
            alone, whole = load(folder, config=config, process_group=None, return_report=True)
            assert_same(ours, alone)
            shares.append(report.engine["bytes_delivered"] / whole.engine["bytes_delivered"])
    return shares


def plain_same_as_alone(_: int, folder: Path) -> float:
    with gathering_small_pieces():
        ours, report = load(folder, model=Net(), config=ALL, return_report=True)
        alone, whole = load(folder, model=Net(), config=ALL, process_group=None, return_report=True)
    assert state(ours) == state(alone)
    return float(report.engine["bytes_read"] / whole.engine["bytes_read"])


def big_net(layers: int = 16) -> nn.Module:
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(layers)))


LAYERS = 40
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def peak_of(work: Callable[[], Any]) -> int:
    """By how many bytes memory grew at most. Tensors have mappings of their own, which the system counts as they come
    and go; the heap would keep some of them, and lend them out again."""
    gc.collect()
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def share_and_memory(_: int, folder: Path) -> tuple[float, int, int]:
    """The bytes read, and the peaks of memory together and alone."""
    read: list[float] = []

    def one(**kwargs: Any) -> None:
        config = pyint8.Int8Config(skip_modules=[])
        with torch.device("meta"):
            module = big_net(LAYERS)
        options = pyint8.StreamOptions(host_scratch=16 << 20)  # else all would come ahead, or less if it is late
        _, report = load(folder, model=module, config=config, options=options, return_report=True, **kwargs)
        read.append(report.engine["bytes_read"])

    for group in (dist.group.WORLD, None):  # what is done once
        one(process_group=group)
    together, alone = (
        statistics.median(peak_of(partial(one, process_group=group)) for _ in range(3))
        for group in (dist.group.WORLD, None)
    )
    return read[0], int(together), int(alone)


# --- failures ---------------------------------------------------------------------------------------------------------


def of_a_server(_: int, url: str, folder: Path) -> None:
    """Of a checkpoint that is elsewhere, what one rank has of it here."""
    ways = ((url, dist.group.WORLD), (folder, None))
    ours, alone = (load(path, model=big_net(), process_group=group).state_dict() for path, group in ways)
    assert list(ours) == list(alone)
    assert all(torch.equal(value, alone[name]) for name, value in ours.items())


@contextmanager
def interrupted(bytes_landed: int) -> Iterator[None]:
    """Ctrl-C, once so many bytes have landed."""
    from pyint8.report.recorder import Recorder

    landed, seen = Recorder.landed, [0]

    def counted(self: Recorder, nbytes: int) -> None:
        landed(self, nbytes)
        seen[0] += nbytes
        if seen[0] - nbytes < bytes_landed <= seen[0]:
            os.kill(os.getpid(), signal.SIGINT)

    with mock.patch.object(Recorder, "landed", counted):
        yield


_STEP = 5000
_ordinary_seconds: list[float] = []
"""What loads took here that nothing happened to."""


@contextmanager
def interrupted_by_a_clock(number: int) -> Iterator[None]:
    """Ctrl-C after the rank has joined (before, nobody can be told), each time later, the last far too late."""
    from pyint8.streaming.ranks.ranks import Ranks

    enter = Ranks.__enter__

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def entered(self: Ranks) -> Ranks:
        found = enter(self)
        times = number / _STEP
        signal.setitimer(signal.ITIMER_REAL, 0.001 + (times / 30 if times < 38 else 100) * _ordinary_seconds[-1])
        return found

    signal.signal(signal.SIGALRM, interrupt)
    try:
        with mock.patch.object(Ranks, "__enter__", entered):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def quantizer_fails(_: int) -> Iterator[None]:
    from pyint8.quantizer import Int8Quantizer

    with mock.patch.object(Int8Quantizer, "create_quantized_param", side_effect=RuntimeError("in the quantizer")):
        yield


@contextmanager
def other_transformers(_: int) -> Iterator[None]:
    import transformers

    with (
        mock.patch.object(transformers, "__version__", "4.0.0"),
        mock.patch("pyint8.operations.load.require_transformers"),
    ):
        yield


def other_release(_: int) -> Any:
    return mock.patch.object(pyint8, "__version__", "0.0.1")


@contextmanager
def interrupted_at_the_end(_: int) -> Iterator[None]:
    """Ctrl-C while the last round is waited for, when all has gone well."""
    from pyint8.streaming.ranks.conductor import Conductor

    with mock.patch.object(Conductor, "join", side_effect=KeyboardInterrupt):
        yield


BREAKS: dict[str, Callable[[int], Any]] = {
    "nothing": lambda _: nullcontext(),
    "Ctrl-C": interrupted,
    "Ctrl-C at any moment": interrupted_by_a_clock,
    "Ctrl-C at the end": interrupted_at_the_end,
    "an exception": quantizer_fails,
    "other transformers": other_transformers,
    "other release": other_release,
}


def load_under(mishap: Any, folder: Path, arguments: dict[str, Any]) -> None:
    with mishap:
        load(folder, **arguments)


def failing(
    rank: int, good: Path, others: dict[int, Path], broken: int, how: str, times: int, arguments: dict[str, Any]
) -> list[Outcome]:
    """`times` loads in which rank `broken` has another folder, arguments or a mishap; then one that must go well."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found = []
    with gathering_small_pieces():
        for _ in range(2):  # the first may take longer
            began = time.monotonic()
            load(good)
            _ordinary_seconds.append(time.monotonic() - began)
        for number in range(times):
            more, mishap = (arguments, BREAKS[how]) if rank == broken else ({}, BREAKS["nothing"])
            found.append(outcome_of(partial(load_under, mishap(1 + number * _STEP), others.get(rank, good), more)))
            if number == times // 2:
                load(good)
        ours = load(good)
    assert_same(ours, load(good, process_group=None))
    return found


def refused(_: int, folder: Path, arguments: dict[str, Any]) -> None:
    load(folder, **arguments)


def refused_group(rank: int, folder: Path) -> list[Outcome]:
    """What is no group of this process."""
    smaller = dist.new_group([0])
    groups = ["WORLD", smaller] if rank else ["WORLD"]
    return [outcome_of(lambda: load(folder, process_group=group)) for group in groups]  # noqa: B023


def of_one(rank: int, folder: Path) -> float:
    """A group of one rank loads as one does alone."""
    groups = [dist.new_group([number]) for number in range(dist.get_world_size())]
    _, report = load(folder, process_group=groups[rank], return_report=True)
    return float(report.engine["bytes_read"])


def in_part(rank: int, folder: Path) -> float | None:
    """A group of some of the ranks."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return None
    with gathering_small_pieces():
        _, report = load(folder, process_group=group, return_report=True)
    return float(report.engine["bytes_read"])


def backend_for_gpus(_: int, folder: Path) -> None:
    group = "pyint8.streaming.ranks.group.Group"
    with (
        mock.patch(f"{group}._backends", return_value={"cuda": "nccl"}),
        mock.patch(f"{group}._tells_on_cpu", True),
    ):
        load(folder)


# --- takeover ---------------------------------------------------------------------------------------------------------


def taken_over(_: int, folder: Path, own: bool) -> tuple[list[float], float]:
    """Two loads by transformers in one block; what each read, and what one reads alone."""
    import transformers as tf

    wanted = pyint8.Int8Config() if own else tf.BitsAndBytesConfig(load_in_8bit=True)
    with gathering_small_pieces(), pyint8.takeover(process_group=dist.group.WORLD) as reports:
        models = [
            tf.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", quantization_config=wanted)
            for _ in range(2)
        ]
    alone, report = load(folder, process_group=None, return_report=True)
    for model in models:
        assert_same(model, alone)
    return [report.engine["bytes_delivered"] for report in reports], report.engine["bytes_delivered"]


def block_that_one_leaves(rank: int, folder: Path, stage: str) -> None:
    """Rank 1 leaves the block with an error: before its load, at a point that only transformers sees, or after."""
    import transformers as tf

    with pyint8.takeover(process_group=dist.group.WORLD):
        if rank == 1 and stage == "before":
            raise ZeroDivisionError("before")
        path = folder.parent / "nothing here" if rank == 1 and stage == "in transformers" else folder
        wanted = tf.BitsAndBytesConfig(load_in_8bit=True)
        tf.AutoModelForCausalLM.from_pretrained(path, device_map="cpu", quantization_config=wanted)
        if rank == 1:
            raise ZeroDivisionError("after")


def planned_in_a_block(_: int, folder: Path) -> None:
    import transformers as tf

    with pyint8.takeover(process_group=dist.group.WORLD):
        wanted = tf.BitsAndBytesConfig(load_in_8bit=True)
        tf.AutoModelForCausalLM.from_pretrained(folder, device_map="auto", quantization_config=wanted)


def dies(rank: int, folder: Path) -> None:
    """Rank 1 is killed in the middle of a load."""

    def die(*_: Any) -> None:
        time.sleep(0.2)  # the others are waiting for it
        os.kill(os.getpid(), signal.SIGKILL)

    with gathering_small_pieces(), mock.patch("pyint8.report.recorder.Recorder.landed", die) if rank else nullcontext():
        load(folder)
