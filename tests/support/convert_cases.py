"""What ranks of a process group convert in tests, in a module that their processes can import."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import pyint8
from pyint8.errors import ReadError, WriteError
from pyint8.models import converted_files
from pyint8.operations import convert_together
from pyint8.streaming.ranks.ranks import Ranks
from pyint8.streaming.write_behind import WriteBehind

SIZE = "40KB"


def convert(_: int, source: Path, target: Path, **options: Any) -> int:
    """How many bytes this rank has read."""
    torch.manual_seed(0)  # of weights that the checkpoint lacks
    options = {"process_group": dist.group.WORLD, "device": "cpu", "progress": False, "max_shard_size": SIZE} | options
    return pyint8.convert(source, target, **options).checkpoint_bytes


def with_options(rank: int, source: Path, target: Path, options: dict[str, Any]) -> int:
    return convert(rank, source, target, **options)


def with_other_options(rank: int, source: Path, target: Path, options: list[dict[str, Any]]) -> int:
    return convert(rank, source, target, **options[rank])


def into_other_folders(rank: int, source: Path, targets: list[Path]) -> int:
    return convert(rank, source, targets[rank])


def failing(rank: int, source: Path, target: Path, failing_rank: int, after: int, kind: str) -> int:
    """One rank meets its end once it has written so much; what each has written is noted at once."""
    ends = {
        "full": WriteError("full", errno=errno.ENOSPC),
        "gone": ReadError("the network is gone", errno=errno.EIO),
        "Ctrl-C": KeyboardInterrupt(),
        "killed": None,
    }
    put, written = WriteBehind.put, 0

    def put_some(behind: WriteBehind, *args: Any) -> Any:
        nonlocal written
        if rank == failing_rank and written == after:
            if (error := ends[kind]) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise error
        written += 1
        future = put(behind, *args)
        future.result()
        if rank != failing_rank:
            time.sleep(0.03)  # it has not written all when the other fails
        return future

    with mock.patch.object(WriteBehind, "put", put_some), mock.patch.object(converted_files, "_NOTED_BYTES", 1):
        return convert(rank, source, target)


def failing_soon(rank: int, source: Path, target: Path, failing_rank: int) -> int:
    """One rank is done with it before another has begun to write, and leaves late."""
    journal, leave = convert_together._journal, Ranks.__exit__

    def begin_late(*args: Any) -> Any:
        time.sleep(1)
        return journal(*args)

    def leave_late(self: Ranks, *error: Any) -> None:
        time.sleep(2)
        leave(self, *error)

    patch = mock.patch.object(convert_together, "_journal", begin_late)
    if rank == failing_rank:
        patch = mock.patch.object(Ranks, "__exit__", leave_late)
    with patch:
        return failing(rank, source, target, failing_rank, 0, "full")
